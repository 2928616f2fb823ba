"""Stage `prior`: the base draws the prior images of a class word (Sec. 3.2)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from svdiff.config import Config
from svdiff.data.prior import prior_folder
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import family_of, load_pipeline, scratch
from svdiff.sampling.images import Job, sample_images
from svdiff.spectral import weights_hash
from svdiff.words import did_you_mean, fill

CHUNK = 8  # pictures between two savings


def make_prior_images(config: Config, class_word: str) -> Path:
    """Stage `prior`: sample `prior.images` pictures of the class prompt from the base into out/prior/<class>/.

    Pictures already made with the same base and settings are kept through a kill, and reused when only more are asked for.
    Writes NNN.png and prompts.csv (file, prompt, seed). Raises SvdiffError for a class word that is not in use.
    """
    if class_word not in config.classes:
        raise SvdiffError(
            f"class word '{class_word}' is not in classes ({', '.join(config.classes)}) of params.yaml"
            + did_you_mean(class_word, config.classes)
        )
    settings = config.prior
    prompt = fill(settings.prompt, subject=class_word)
    pipe = load_pipeline(config.base)
    store = scratch() / "prior" / _key(config, prompt, pipe)
    missing = [i for i in range(settings.images) if not (store / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        images = sample_images(
            pipe,
            [Job(prompt, settings.seed + i) for i in chunk],
            steps=settings.steps,
            guidance=settings.guidance,
            eta=settings.eta,
            progress=f"prior {class_word} {start}/{len(missing)}",
        )
        for i, image in zip(chunk, images, strict=True):
            with atomic_file(store / f"{i:05d}.png") as temporary:
                image.save(temporary)
    with atomic_dir(prior_folder(class_word)) as folder:
        rows = []
        for i in range(settings.images):
            file = f"{i:03d}.png"
            (folder / file).write_bytes((store / f"{i:05d}.png").read_bytes())
            rows.append({"file": file, "prompt": prompt, "seed": settings.seed + i})
        pd.DataFrame(rows).to_csv(folder / "prompts.csv", index=False)
    return prior_folder(class_word)


def _key(config: Config, prompt: str, pipe: object) -> str:
    """Everything that a prior picture depends on, but its seed."""
    settings = config.prior
    parts = [
        [weights_hash(part) for part in family_of(pipe).parts.values()],
        [prompt, settings.steps, settings.guidance, settings.eta, settings.seed],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

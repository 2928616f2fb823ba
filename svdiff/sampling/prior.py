"""Stages `prior` and `own-prior`: prior images of a class word (Sec. 3.2), drawn by the base or brought by the user."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pandas as pd

from svdiff.config import Config
from svdiff.data.concepts import load_concept_images, to_square
from svdiff.data.prior import prior_folder
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import family_of, load_pipeline, native_size, scratch
from svdiff.peaks import Peaks
from svdiff.sampling.images import Job, sample_images
from svdiff.spectral import weights_hash
from svdiff.words import did_you_mean, fill

CHUNK = 8  # pictures between two savings
MOST_OWN = 10_000  # pictures of a folder under `regularisation`


def make_prior_images(config: Config, class_word: str) -> Path:
    """Write the prior images of a class to out/prior/<class>/, as NNN.png and prompts.csv (file, prompt, seed or source).

    They are `prior.images` pictures of the class prompt by the base, or those of the class's folder under
    `regularisation`. Pictures already made with the same base and settings are kept through a kill, and reused when only
    more are asked for. Raises SvdiffError for a class word that is not in use.
    """
    if class_word not in config.class_words:
        raise SvdiffError(
            f"class word '{class_word}' is not in classes ({', '.join(config.class_words)}) of params.yaml"
            + did_you_mean(class_word, config.class_words)
        )
    settings = config.prior
    prompt = fill(settings.prompt, subject=class_word)
    if class_word in config.regularisation:
        return _own_images(config, class_word, prompt)
    peaks = Peaks()
    with peaks.phase("loading"):
        pipe = load_pipeline(config.base)
    store = scratch() / "prior" / _key(config, prompt, pipe)
    missing = [i for i in range(settings.images) if not (store / f"{i:05d}.png").is_file()]
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        with peaks.phase("sampling"):
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
    peaks.say()
    return prior_folder(class_word)


def _own_images(config: Config, class_word: str, prompt: str) -> Path:
    """The user's pictures of a class, as squares of the base's size."""
    size = native_size(config.base)
    pictures = load_concept_images(
        config.regularisation[class_word],
        maximum=MOST_OWN,
        captions=False,
        prepare=lambda picture: to_square(picture, size),
    )
    with atomic_dir(prior_folder(class_word)) as folder:
        rows = []
        for i, picture in enumerate(pictures):
            file = f"{i:05d}.png"
            picture.image.save(folder / file)
            rows.append({"file": file, "prompt": prompt, "source": picture.path.name})
        pd.DataFrame(rows).to_csv(folder / "prompts.csv", index=False)
    return prior_folder(class_word)


def _key(config: Config, prompt: str, pipe: object) -> str:
    """Everything that a prior picture depends on, but its seed."""
    settings, family = config.prior, family_of(pipe)
    parts = [
        [weights_hash(part) for part in family.parts.values()],
        [family.image_size, config.base.vae_tiling, family.pipe.scheduler.to_json_string()],
        [prompt, settings.steps, settings.guidance, settings.eta, settings.seed],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

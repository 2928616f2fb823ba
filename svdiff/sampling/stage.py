"""Stage `sample`: the evaluation pictures of a concept, and pictures for anyone who wants one now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pandas as pd

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import load_pipeline, scratch
from svdiff.sampling.images import Job, sample_images
from svdiff.spectral import SpectralPipeline
from svdiff.training.methods.weights_delta import is_weights_delta, load_weights_delta

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def delta_path(concept: str) -> Path:
    """Where a trained concept's delta lies."""
    return Path("out/train") / concept / "delta.safetensors"


class Personalised(Protocol):
    """What was put on a pipeline, and the way back."""

    def unload(self) -> None:
        """The base's own weights again, bit for bit."""
        ...


def personalise(pipe: StableDiffusionPipeline, path: Path, scale: float = 1.0) -> Personalised:
    """Put a trained delta of any method on `pipe`, at strength s = `scale` (Fig. 26).

    Raises SvdiffError for a missing file, or one that was trained on another base.
    """
    if not path.is_file():
        raise SvdiffError(f"{path} not found; train the concept first, with `dvc repro train@{path.parent.name}`")
    if is_weights_delta(path):
        return load_weights_delta(pipe, path, scale)
    spectral = SpectralPipeline(pipe, cache=scratch() / "bases")
    spectral.load_delta(path, "concept")
    spectral.set_deltas({"concept": scale})
    return spectral


def sample_concept(config: Config, concept: str) -> Path:
    """Every evaluation prompt at every seed, from the trained model and from the untouched base.

    Writes images.csv (file, model, prompt, prompt_index, seed) and trained/*.png, base/*.png to out/sample/<concept>/.
    """
    settings, subject = config.sample, config.concept(concept).subject
    prompts = [prompt.format(subject=subject) for prompt in settings.prompts]
    jobs = [Job(prompt, seed) for prompt in prompts for seed in settings.seeds]
    pipe = load_pipeline(config.base)
    personal = personalise(pipe, delta_path(concept))
    rows = []
    with atomic_dir(Path("out/sample") / concept) as folder:
        for model in ("trained", "base"):
            if model == "base":
                personal.unload()
            images = sample_images(
                pipe,
                jobs,
                steps=settings.steps,
                guidance=settings.guidance,
                eta=settings.eta,
                batch_size=settings.batch_size,
                progress=f"sample {concept} ({model})",
            )
            (folder / model).mkdir()
            for job, image in zip(jobs, images, strict=True):
                index = prompts.index(job.prompt)
                file = f"{model}/p{index:02d}-s{job.seed:04d}.png"
                image.save(folder / file)
                rows.append(
                    {"file": file, "model": model, "prompt": job.prompt, "prompt_index": index, "seed": job.seed}
                )
        pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    return Path("out/sample") / concept


def sample_prompts(
    config: Config,
    concept: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    output: Path,
    scale: float = 1.0,
    guidance: float | None = None,
    steps: int | None = None,
) -> list[Path]:
    """Pictures of a trained concept for any prompts; '{subject}' in a prompt becomes '<token> <class word>'."""
    subject = config.concept(concept).subject
    jobs = [Job(prompt.replace("{subject}", subject), seed) for prompt in prompts for seed in seeds]
    pipe = load_pipeline(config.base)
    personalise(pipe, delta_path(concept), scale)
    images = sample_images(
        pipe,
        jobs,
        steps=steps or config.sample.steps,
        guidance=config.sample.guidance if guidance is None else guidance,
        progress=f"sample {concept}",
    )
    paths = []
    for job, image in zip(jobs, images, strict=True):
        name = "-".join(job.prompt.split())[:80]
        path = output / f"{name}-s{job.seed}.png"
        with atomic_file(path) as temporary:
            image.save(temporary)
        paths.append(path)
    return paths

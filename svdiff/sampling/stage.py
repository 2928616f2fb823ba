"""Stage `sample`: the evaluation pictures of a concept, and pictures for anyone who wants one now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import load_pipeline, scratch
from svdiff.sampling.images import Job, sample_images
from svdiff.spectral import SpectralPipeline


def delta_path(concept: str) -> Path:
    """Where a trained concept's delta lies."""
    return Path("out/train") / concept / "delta.safetensors"


def _with_delta(config: Config, concept: str, scale: float = 1.0) -> SpectralPipeline:
    if not delta_path(concept).is_file():
        raise SvdiffError(f"{delta_path(concept)} not found; train the concept first: `dvc repro train@{concept}`")
    personal = SpectralPipeline(load_pipeline(config.base), cache=scratch() / "bases")
    personal.load_delta(delta_path(concept), concept)
    personal.set_deltas({concept: scale})
    return personal


def sample_concept(config: Config, concept: str) -> Path:
    """Every evaluation prompt at every seed, from the trained model and from the untouched base.

    Writes images.csv (file, model, prompt, prompt_index, seed) and trained/*.png, base/*.png to out/sample/<concept>/.
    """
    settings, subject = config.sample, config.concept(concept).subject
    prompts = [prompt.format(subject=subject) for prompt in settings.prompts]
    jobs = [Job(prompt, seed) for prompt in prompts for seed in settings.seeds]
    personal = _with_delta(config, concept)
    rows = []
    with atomic_dir(Path("out/sample") / concept) as folder:
        for model in ("trained", "base"):
            if model == "base":
                personal.delete_delta(concept)
            images = sample_images(
                personal.pipe,
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
    personal = _with_delta(config, concept, scale)
    images = sample_images(
        personal.pipe,
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

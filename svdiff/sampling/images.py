"""Pictures from prompts at fixed seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm.auto import tqdm

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from PIL.Image import Image


class Job(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


def check_prompts(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> None:
    """Refuse prompts that the tokenizer would cut short. Raises SvdiffError with the prompt and the limit."""
    limit = pipe.tokenizer.model_max_length
    for prompt in dict.fromkeys(prompts):
        length = len(pipe.tokenizer(prompt).input_ids)
        if length > limit:
            raise SvdiffError(f"prompt '{prompt}' is {length} tokens long; the text encoder reads {limit}: shorten it")


@torch.no_grad()
def sample_images(
    pipe: StableDiffusionPipeline,
    jobs: Sequence[Job],
    *,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    negative: str | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> list[Image]:
    """DDIM pictures for `jobs`, in order; each depends on its own prompt and seed only, not on its neighbours.

    `guidance` is the scale s of Eq. 9 (1 is none), `eta` the η of DDIM. `progress` names the bar, None shows none.
    """
    check_prompts(pipe, [job.prompt for job in jobs])
    images: list[Image] = []
    with tqdm(total=len(jobs), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            # Noise is drawn on the CPU, a generator a picture: the same seed is the same noise on every device and in every batch.
            generators = [torch.Generator().manual_seed(job.seed) for job in batch]
            images += pipe(
                prompt=[job.prompt for job in batch],
                negative_prompt=None if negative is None else [negative] * len(batch),
                num_inference_steps=steps,
                guidance_scale=guidance,
                eta=eta,
                generator=generators,
            ).images
            bar.update(len(batch))
    return images

"""Pictures from prompts at fixed seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm.auto import tqdm

from svdiff.models import family_of
from svdiff.sampling.noise import seeded_generators

if TYPE_CHECKING:
    from PIL.Image import Image


class Job(NamedTuple):
    """One picture to make."""

    prompt: str
    seed: int


def check_prompts(pipe: Any, prompts: Sequence[str]) -> None:
    """Refuse prompts that the tokenizer would cut short. Raises SvdiffError with the prompt and the limit."""
    family = family_of(pipe)
    for prompt in dict.fromkeys(prompts):
        family.check_prompt(prompt)


@torch.no_grad()
def sample_images(
    pipe: Any,
    jobs: Sequence[Job],
    *,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    negative: str | None = None,
    batch_size: int = 8,
    progress: str | None = None,
) -> list[Image]:
    """Pictures for `jobs`, in order; each depends on its own prompt and seed only, not on its neighbours.

    `guidance` is the scale s of Eq. 9 (1 is none), `eta` the η of DDIM. `progress` names the bar, None shows none.
    """
    check_prompts(pipe, [job.prompt for job in jobs])
    draw = partial(family_of(pipe).draw, steps=steps, guidance=guidance, eta=eta, negative=negative)
    return draw_batches(jobs, batch_size, draw, progress)


def draw_batches(
    jobs: Sequence[Job],
    batch_size: int,
    draw: Callable[[list[str], list[torch.Generator]], list[Image]],
    progress: str | None = None,
) -> list[Image]:
    """What `draw` makes of the prompts and seeded generators of each batch, one after the other."""
    images: list[Image] = []
    with tqdm(total=len(jobs), desc=progress, unit="image", disable=progress is None) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images += draw([job.prompt for job in batch], seeded_generators([job.seed for job in batch]))
            bar.update(len(batch))
    return images

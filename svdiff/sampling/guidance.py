"""Classifier-free guidance with negative prompts (Eq. 9 and 10), on a DDIM loop of our own.

diffusers' pipelines know one negative prompt that replaces the empty one; Eq. 10 mixes *scores*, so it needs a loop
that sees them. Without negative prompts the loop makes the pipeline's pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdiff.errors import SvdiffError
from svdiff.models import Conditions, family_of
from svdiff.sampling.images import Job, check_prompts, draw_batches
from svdiff.sampling.noise import draw_noise

if TYPE_CHECKING:
    from PIL.Image import Image


def guided_noise(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Eq. 9: s · ε̂(z|c) + (1 − s) · ε̂(z|∅); written as diffusers does, for the same rounding."""
    return unconditional + scale * (conditional - unconditional)


def negative_noise(unconditional: Tensor, negatives: Sequence[Tensor], beta: float) -> Tensor:
    """Eq. 10: β · ε̂(z|∅) + (1 − β) · ε̂(z|c^neg), what takes the place of ε̂(z|∅) in Eq. 9.

    Several negatives share 1 − β equally. β = 1 returns ε̂(z|∅) itself.
    """
    if beta == 1:
        return unconditional
    return beta * unconditional + (1 - beta) * torch.stack(list(negatives)).mean(0)


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: Sequence[str]) -> Conditions:
    """What prompts mean to the network. Raises SvdiffError for a prompt that is too long."""
    check_prompts(pipe, prompts)
    return family_of(pipe).encode(prompts)


@torch.no_grad()
def denoise(
    pipe: Any,
    latents: Tensor,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance: float,
    beta: float = 1.0,
    negatives: Sequence[str] = (),
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """DDIM from z_T to z_0 under Eq. 9 and 10.

    Args:
        pipe: a pipeline of `load_pipeline`.
        latents: z_T, (B, C, h, w): noise, or what `inversion.invert` found.
        prompts: B prompts c.
        steps: DDIM steps.
        guidance: s of Eq. 9; 1 is none. Unlike in diffusers, values below 1 are Eq. 9 too.
        beta: β of Eq. 10; 1 is plain guidance.
        negatives: c^neg, the same for all pictures; each costs one more pass of the network.
        eta: η of DDIM; above 0 it injects noise from `generators`.
        generators: one a picture, for η > 0.

    Returns:
        z_0, (B, C, h, w).

    Raises:
        SvdiffError: β outside 0 to 1, β < 1 without negatives or guidance, η > 0 without generators.
    """
    _check(beta, negatives, guidance, eta, generators)
    count = len(prompts)
    # One entry an evaluation of the network: ∅, the negatives, then c. Without guidance c alone.
    texts: list[Sequence[str]] = [prompts]
    if guidance != 1:
        texts = [[""] * count, *([text] * count for text in (negatives if beta < 1 else ())), prompts]
    family = family_of(pipe)
    if family.is_distilled:
        if beta < 1:
            raise SvdiffError(
                f"β of Eq. 10 is {beta}, and this {family.title} is distilled and knows no negative prompts: set β to 1"
            )
        texts = [prompts]
    conditions = encode_prompts(pipe, [prompt for text in texts for prompt in text])
    objective = family.objective
    for level in objective.levels(steps, latents.device):
        timesteps = level.timestep.expand(len(texts) * count)
        noises = family.predict(torch.cat([latents] * len(texts)), timesteps, conditions, guidance=guidance).chunk(
            len(texts)
        )
        noise = noises[-1]
        if len(texts) > 1:
            noise = guided_noise(noise, negative_noise(noises[0], noises[1:-1], beta), guidance)
        latents = objective.step(noise, level, latents, eta, generators)
    return latents


def _check(
    beta: float,
    negatives: Sequence[str],
    guidance: float,
    eta: float,
    generators: Sequence[torch.Generator] | None,
) -> None:
    if not 0 <= beta <= 1:
        raise SvdiffError(f"β of Eq. 10 is {beta}; expected 0 to 1 (1 is plain guidance)")
    if beta < 1 and (not negatives or guidance == 1):
        missing = "negative prompts" if not negatives else "guidance: its scale is 1"
        raise SvdiffError(f"β of Eq. 10 is {beta} without {missing}; give some, or set β to 1")
    if eta > 0 and generators is None:
        raise SvdiffError(f"η is {eta}, which injects noise: give one generator a picture, or set η to 0")


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> list[Image]:
    """Pictures of z_0, (B, C, h, w)."""
    return family_of(pipe).to_pictures(latents)


def sample_guided(
    pipe: Any,
    jobs: Sequence[Job],
    *,
    steps: int,
    guidance: float,
    beta: float = 1.0,
    negatives: Sequence[str] = (),
    eta: float = 0.0,
    batch_size: int = 8,
    progress: str | None = None,
) -> list[Image]:
    """`sample_images` with the negative prompts of Eq. 10; the same pictures where β is 1."""

    def draw(prompts: list[str], generators: list[torch.Generator]) -> list[Image]:
        latents = denoise(
            pipe,
            draw_noise(pipe, generators),
            prompts,
            steps=steps,
            guidance=guidance,
            beta=beta,
            negatives=negatives,
            eta=eta,
            generators=generators,
        )
        return decode(pipe, latents)

    return draw_batches(jobs, batch_size, draw, progress)

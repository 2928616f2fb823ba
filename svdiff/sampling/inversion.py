"""DDIM inversion and the editing of a single picture (Sec. 3.4, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdiff.models import family_of
from svdiff.sampling.guidance import decode, denoise, encode_prompts
from svdiff.sampling.noise import draw_noise, seeded_generators, slerp

if TYPE_CHECKING:
    from PIL.Image import Image


@torch.no_grad()
def encode_images(pipe: Any, images: Sequence[Image]) -> Tensor:
    """z* of pictures of one size, (N, C, h, w): the mean of the autoencoder's posterior."""
    family = family_of(pipe)
    mean, _ = family.to_latents(pipe.image_processor.preprocess(list(images)))
    return mean.to(family.dtype)


@torch.no_grad()
def invert(pipe: Any, latents: Tensor, prompts: Sequence[str], *, steps: int) -> Tensor:
    """Eq. 6: z_T = DDIMInvert(z*, c; θ'), at guidance scale 1.

    Every DDIM step from level t to the one below is run backwards with the noise that the network predicts at (z, t), z
    being what is known: the latents of the level below. Nothing is clipped, whatever the scheduler does in sampling.

    Args:
        pipe: the fine-tuned pipeline.
        latents: z*, (B, C, h, w).
        prompts: B target prompts c.
        steps: DDIM steps; sample with as many.

    Returns:
        z_T, (B, C, h, w).
    """
    family, conditions = family_of(pipe), encode_prompts(pipe, prompts)
    objective = family.objective
    for level in reversed(objective.levels(steps, latents.device)):
        predicted = family.predict(latents, level.timestep.expand(len(latents)), conditions)
        clean, noise = objective.clean_and_noise(predicted, latents, level.signal_below, level.spread_below)
        latents = (level.signal * clean + level.spread * noise).to(latents.dtype)
    return latents


def reconstruct(pipe: Any, inverted: Tensor, prompts: Sequence[str], *, steps: int) -> list[Image]:
    """Pictures that z_T leads back to, with nothing random and at guidance 1: what inversion alone keeps.

    `inverted` is z_T of `invert` for the same prompts and steps; with more steps the pictures come nearer to the inverted ones.
    """
    return decode(pipe, denoise(pipe, inverted, prompts, steps=steps, guidance=1.0))


def edit_image(
    pipe: Any,
    inverted: Tensor,
    target: str,
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    eta: float = 0.5,
    alpha: float = 0.0,
) -> list[Image]:
    """Pictures of `target` from a model fine-tuned on one picture, one a seed (Sec. 3.4).

    Sampling starts from slerp(α, z_T, ε) (Eq. 7) and injects noise by DDIM's η: (η, α) is (0.5, 0) for small edits,
    (0.9, 0.9) for structural ones (supplement C). α = 1 starts from random noise, without inversion; the paper's η is 0 then.

    Args:
        pipe: the fine-tuned pipeline.
        inverted: z_T, (1, C, h, w): the picture inverted under `target` in as many steps (`invert`).
        target: the edited prompt.
        seeds: of the noise; η = 0 and α = 0 leave nothing random.
        steps, guidance: of sampling.
        eta: η of DDIM.
        alpha: α of Eq. 7.
    """
    generators = seeded_generators(seeds)
    noise = draw_noise(pipe, generators)
    start = slerp(alpha, inverted.expand_as(noise), noise)
    prompts = [target] * len(seeds)
    return decode(pipe, denoise(pipe, start, prompts, steps=steps, guidance=guidance, eta=eta, generators=generators))

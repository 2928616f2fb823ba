"""Starting noise: per seed, and mixed with inverted noise (Eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdiff.errors import SvdiffError
from svdiff.models import family_of

NEARLY_PARALLEL = 1e-6  # radians


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a picture: the same seed is the same noise on every device and in every batch."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(pipe: Any, generators: Sequence[torch.Generator]) -> Tensor:
    """ε ~ N(0, I) of the pipeline's native size, (len(generators), C, h, w), as the pipeline itself draws it."""
    family = family_of(pipe)
    shape, dtype = (1, *family.latent_shape), family.dtype
    return torch.cat([torch.randn(shape, generator=g, dtype=dtype) for g in generators]).to(family_of(pipe).device)


def slerp(alpha: float, z: Tensor, noise: Tensor) -> Tensor:
    """Eq. 7: sin((1−α)φ)/sin φ · z + sin(αφ)/sin φ · ε with φ = arccos(cos(z, ε)), one φ a sample.

    Args:
        alpha: share of the random noise, 0 to 1; the ends are `z` and `noise` exactly.
        z: (B, …), inverted noise z_T.
        noise: ε, of the same shape.

    Returns:
        (B, …) in the type of `z`. Parallel vectors, where sin φ vanishes, are interpolated linearly: the formula's limit.

    Raises:
        SvdiffError: α outside 0 to 1, other shapes, or vectors that point in opposite directions.
    """
    if not 0 <= alpha <= 1:
        raise SvdiffError(f"slerp with α = {alpha}; expected 0 (the inverted noise) to 1 (random noise)")
    if z.shape != noise.shape:
        raise SvdiffError(f"slerp between shapes {tuple(z.shape)} and {tuple(noise.shape)}; expected the same")
    if alpha in (0, 1):
        return (noise if alpha else z).clone().to(z.dtype)
    a, b = z.double().flatten(1), noise.double().flatten(1)
    phi = torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-300).clamp(-1, 1))
    if (phi > torch.pi - NEARLY_PARALLEL).any():
        raise SvdiffError("slerp between opposite noises, between which no shortest arc is unique; use another seed")
    parallel = phi < NEARLY_PARALLEL
    sine = torch.where(parallel, 1.0, torch.sin(phi))
    first = torch.where(parallel, 1 - alpha, torch.sin((1 - alpha) * phi) / sine)
    second = torch.where(parallel, alpha, torch.sin(alpha * phi) / sine)
    return (first[:, None] * a + second[:, None] * b).reshape(z.shape).to(z.dtype)

"""The training losses: Eq. 1 and Eq. 3."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


class Loss(NamedTuple):
    """What a step minimises, and its parts: Eq. 3's two, and those of `regularisers`, each before its weight."""

    total: Tensor
    instance: Tensor
    prior: Tensor
    extra: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)


def denoising_target(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the network has to predict: ε in Eq. 1 (Stable Diffusion 1.x), or v for the bases trained on it (2.x)."""
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise SvdiffError(f"the base predicts '{kind}'; expected epsilon or v_prediction in its scheduler_config.json")


def denoising_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Eq. 1: mean over batch and elements of ‖ε̂ − ε‖². Both (B, C, H, W); computed in float32."""
    return torch.nn.functional.mse_loss(predicted.float(), target.float())


def prior_preservation_loss(predicted: Tensor, target: Tensor, instances: int, weight: float) -> Loss:
    """Eq. 3: the loss on the first `instances` samples plus λ times the loss on the rest, the prior samples.

    Args:
        predicted, target: (B, C, H, W), instance samples first.
        instances: how many of the B samples show the concept.
        weight: λ.
    """
    instance = denoising_loss(predicted[:instances], target[:instances])
    if instances == len(predicted):
        return Loss(instance, instance, torch.zeros_like(instance))
    prior = denoising_loss(predicted[instances:], target[instances:])
    return Loss(instance + weight * prior, instance, prior)

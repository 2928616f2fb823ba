"""The training losses as formulas: Eq. 1, Eq. 3, and those on cross-attention maps (supplement B): unmix and Eq. 8.

Attention maps are (B, h, w) of one token each, as `attention.token_map` gives them; their gradients reach the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from svdiff.errors import SvdiffError


class Loss(NamedTuple):
    """What a step minimises, and its parts: Eq. 3's two, and those on attention maps, each before its weight."""

    total: Tensor
    instance: Tensor
    prior: Tensor
    extra: dict[str, Tensor] = {}  # noqa: RUF012 (never changed)

    def detach(self) -> Loss:
        """The numbers without the graph behind them."""
        extra = {name: part.detach() for name, part in self.extra.items()}
        return Loss(self.total.detach(), self.instance.detach(), self.prior.detach(), extra)


def denoising_loss(
    predicted: Tensor, target: Tensor, weights: Tensor | None = None, masks: Tensor | None = None
) -> Tensor:
    """Eq. 1: mean over batch and elements of ‖ε̂ − ε‖², each sample times its weight (B,) where given.

    Both (B, C, H, W); computed in float32. With `masks` (B, 1, H, W) the mean over a sample's elements is weighted by
    them, so that a small subject counts as much as a large one.
    """
    if weights is None and masks is None:
        return torch.nn.functional.mse_loss(predicted.float(), target.float())
    errors = torch.nn.functional.mse_loss(predicted.float(), target.float(), reduction="none")
    samples = errors.flatten(1).mean(1) if masks is None else masked_means(errors, masks)
    return (samples if weights is None else samples * weights).mean()


def masked_means(errors: Tensor, masks: Tensor) -> Tensor:
    """Σ M ⊙ e / Σ M over the elements of each sample, (B,), of errors (B, C, H, W) and masks (B, 1, H, W) from 0 to 1."""
    masks = masks.expand_as(errors)
    return (masks * errors).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp_min(1e-12)


def min_snr_weights(signal: Tensor, noise: Tensor, gamma: float, prediction: str) -> Tensor:
    """min(SNR, γ) over SNR for ε, SNR + 1 for v, 1 for x; SNR = a²/b² of z = a x + b ε (Hang et al. 2023, Sec. 3.4).

    Raises SvdiffError for flow matching, whose loss is weighted by its timesteps.
    """
    if prediction == "flow":
        raise SvdiffError(
            "train.min_snr_gamma is set, and the base predicts a flow, which has no such weights: leave it out"
        )
    snr = (signal / noise).square()
    of_prediction = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=gamma) / of_prediction[prediction]


def prior_preservation_loss(
    predicted: Tensor,
    target: Tensor,
    instances: int,
    weight: float,
    weights: Tensor | None = None,
    masks: Tensor | None = None,
) -> Loss:
    """Eq. 3: the loss on the first `instances` samples plus λ times the loss on the rest, the prior samples.

    Args:
        predicted, target: (B, C, H, W), instance samples first.
        instances: how many of the B samples show the concept.
        weight: λ.
        weights: of each sample, (B,); None: 1.
        masks: of the elements of each sample, (B, 1, H, W), for instance samples alone; None: 1.
    """
    first, rest = (None, None) if weights is None else (weights[:instances], weights[instances:])
    masks = None if masks is None else masks[:instances]
    instance = denoising_loss(predicted[:instances], target[:instances], first, masks)
    if instances == len(predicted):
        return Loss(instance, instance, torch.zeros_like(instance))
    prior = denoising_loss(predicted[instances:], target[instances:], rest)
    return Loss(instance + weight * prior, instance, prior)


def unmix_loss(special: Sequence[Tensor], regions: Sequence[Tensor]) -> Tensor:
    """MSE of each subject's map over the regions of the others: [V₁] shall not attend to subject 2, nor the reverse.

    Args:
        special: for each subject the map A of its special token, (B, h, w).
        regions: for each subject where it is, (B, h, w), 0 to 1; `cutmix.Region.mask` makes them.

    Returns:
        The mean over subjects and pictures of Σ M ⊙ A² / Σ M, M being where the other subjects are; 0 where M is empty,
        as for pictures that are not mixed.
    """
    losses = []
    for i, attention in enumerate(special):
        others = torch.stack([region for j, region in enumerate(regions) if j != i]).amax(0).to(attention)
        area = others.sum(dim=(1, 2))
        leaked = (others * attention.square()).sum(dim=(1, 2))
        losses.append((leaked / area.clamp_min(1e-12)).mean())
    return torch.stack(losses).mean()


def subject_mask(class_map: Tensor, threshold: float = 0.5) -> Tensor:
    """M_t: where the coarse class token's map exceeds `threshold` of its own maximum; (B, h, w) of 0 and 1, no gradient."""
    class_map = class_map.detach()
    return (class_map > threshold * class_map.amax(dim=(1, 2), keepdim=True)).to(class_map.dtype)


def single_subject_loss(special: Tensor, mask: Tensor) -> Tensor:
    """Eq. 8: ‖A^V − sg(A^V ⊙ M)‖², summed over positions, averaged over pictures.

    Its gradient is 2A outside the mask and zero inside: the special token's attention is drawn back from the background
    and left alone on the subject.

    Args:
        special: A^V, the special token's map, (B, h, w).
        mask: M, (B, h, w), of `subject_mask`.
    """
    return (special - (special * mask).detach()).square().sum(dim=(1, 2)).mean()

"""Eq. 1 and Eq. 3 against formulas written out by hand in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdiff.training.losses import denoising_loss, prior_preservation_loss


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("instances", "priors"), [(1, 1), (2, 2), (1, 3)])
def test_eq_3(weight: float, instances: int, priors: int) -> None:
    random = np.random.default_rng(0)
    predicted, target = random.standard_normal((2, instances + priors, 4, 3, 3))
    squares = ((predicted - target) ** 2).reshape(instances + priors, -1).mean(1)
    expected = squares[:instances].sum() / instances + weight * squares[instances:].sum() / priors
    loss = prior_preservation_loss(torch.tensor(predicted).float(), torch.tensor(target).float(), instances, weight)
    assert float(loss.total) == pytest.approx(expected, rel=1e-6)
    assert float(loss.instance) == pytest.approx(squares[:instances].mean(), rel=1e-6)
    assert float(loss.prior) == pytest.approx(squares[instances:].mean(), rel=1e-6)


def test_eq_3_without_prior_samples_is_eq_1() -> None:
    predicted, target = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    loss = prior_preservation_loss(predicted, target, 2, weight=7.0)
    assert loss.total == loss.instance == ((predicted - target) ** 2).mean()
    assert loss.prior == 0


def test_eq_3_is_taken_in_float32_whatever_the_network_computes_in() -> None:
    predicted, target = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    loss = prior_preservation_loss(predicted.bfloat16(), target, 1, weight=1.0)
    assert loss.total.dtype == torch.float32


def test_a_masked_loss_is_the_mean_over_the_mask_and_its_gradient_is_zero_outside() -> None:
    random = torch.Generator().manual_seed(0)
    predicted, target = torch.randn(2, 3, 4, 6, 6, generator=random)
    predicted.requires_grad_()
    masks = torch.zeros(2, 1, 6, 6)
    masks[0, :, :2, :3], masks[1, :, 4, 4] = 1, 0.5
    loss = prior_preservation_loss(predicted, target, 2, weight=1.0, masks=torch.cat([masks, torch.ones(1, 1, 6, 6)]))
    squares = (predicted - target) ** 2
    assert float(loss.instance) == pytest.approx(
        float(squares[0, :, :2, :3].mean().detach() + squares[1, :, 4, 4].mean().detach()) / 2
    )
    loss.total.backward()
    seen = predicted.grad.ne(0)
    assert torch.equal(seen[:2], masks.bool().expand(2, 4, 6, 6))
    assert seen[2].all()


def test_a_mask_of_everything_is_no_mask() -> None:
    predicted, target = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.5, 2.0])
    whole = denoising_loss(predicted, target, weights, torch.full((3, 1, 6, 6), 0.3))
    assert float(whole) == pytest.approx(float(denoising_loss(predicted, target, weights)))

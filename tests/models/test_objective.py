"""Noising and targets against formulas in float64 and diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from svdiff.errors import SvdiffError
from svdiff.models.objective import Diffusion


def test_targets_and_noising_of_diffusion() -> None:
    latents, noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 500, 999])
    scheduler = DDIMScheduler()
    assert Diffusion(scheduler).target(latents, noise, timesteps) is noise
    velocity = Diffusion(DDIMScheduler(prediction_type="v_prediction"))
    alpha = scheduler.alphas_cumprod.double()[timesteps].reshape(3, 1, 1, 1)
    # v = √ᾱ ε − √(1−ᾱ) z (Salimans & Ho 2022)
    expected = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    torch.testing.assert_close(velocity.target(latents, noise, timesteps), expected, rtol=1e-6, atol=1e-6)
    theirs = scheduler.add_noise(latents.float(), noise.float(), timesteps)
    assert torch.equal(velocity.noised(latents.float(), noise.float(), timesteps), theirs)
    assert Diffusion(DDIMScheduler(prediction_type="sample")).target(latents, noise, timesteps) is latents
    with pytest.raises(SvdiffError, match="'flow'; expected epsilon, sample or v_prediction"):
        Diffusion(DDIMScheduler(prediction_type="flow"))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_prediction_names_the_picture_and_the_noise(prediction: str) -> None:
    objective = Diffusion(DDIMScheduler(prediction_type=prediction))
    latents, noise = torch.randn(2, 1, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([300])
    signal, spread = objective.signal_and_noise(t)
    found = objective.clean_and_noise(
        objective.target(latents, noise, t), objective.noised(latents, noise, t), signal, spread
    )
    for got, expected in zip(found, (latents, noise), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

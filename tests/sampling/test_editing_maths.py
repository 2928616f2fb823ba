"""Inversion, slerp and η once more, against references that share nothing with the code: float64 formulas and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from svdiff.sampling.guidance import denoise, encode_prompts
from svdiff.sampling.inversion import invert
from svdiff.sampling.noise import seeded_generators, slerp


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def predicted(pipe, z: torch.Tensor, t: int, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.unet(z, t, **encode_prompts(pipe, [prompt])).sample.double()


def test_eq_6_by_hand(tiny_pipe) -> None:
    """Two steps of DDIM run backwards: the noise is asked for at the level that is left to, from what is known below."""
    z = normal(1, 4, 8, 8)
    got = invert(tiny_pipe, z, ["a red house"], steps=2)
    scheduler = tiny_pipe.scheduler
    levels = [float(scheduler.final_alpha_cumprod), *(float(scheduler.alphas_cumprod[t]) for t in (1, 501))]
    expected = z.double()
    for t, low, high in ((1, levels[0], levels[1]), (501, levels[1], levels[2])):
        noise = predicted(tiny_pipe, expected.float(), t, "a red house")
        clean = (expected - math.sqrt(1 - low) * noise) / math.sqrt(low)
        expected = math.sqrt(high) * clean + math.sqrt(1 - high) * noise
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 0.9, 1.0])
def test_eta_is_ddims(tiny_pipe, eta: float) -> None:
    """σ = η √((1−ᾱ′)/(1−ᾱ)) √(1−ᾱ/ᾱ′), the direction shortened to √(1−ᾱ′−σ²) (DDIM, Eq. 12 and 16)."""
    z, seed = normal(1, 4, 8, 8, seed=1), 5
    got = denoise(tiny_pipe, z, ["a cat"], steps=2, guidance=1.0, eta=eta, generators=seeded_generators([seed]))
    scheduler, random = tiny_pipe.scheduler, torch.Generator().manual_seed(seed)
    levels = [float(scheduler.alphas_cumprod[501]), float(scheduler.alphas_cumprod[1])]
    expected = z.double()
    for t, now, then in ((501, *levels), (1, levels[1], float(scheduler.final_alpha_cumprod))):
        noise = predicted(tiny_pipe, expected.float(), t, "a cat")
        clean = (expected - math.sqrt(1 - now) * noise) / math.sqrt(now)
        sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        fresh = torch.randn(z.shape, generator=random).double()
        expected = math.sqrt(then) * clean + math.sqrt(1 - then - sigma**2) * noise + sigma * fresh
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_slerp_of_unit_vectors_is_scipys(alpha: float) -> None:
    z, noise = (v / np.linalg.norm(v) for v in np.random.default_rng(3).standard_normal((2, 64)))
    got = slerp(alpha, torch.tensor(z)[None], torch.tensor(noise)[None])[0].numpy()
    np.testing.assert_allclose(got, geometric_slerp(z, noise, [alpha])[0], rtol=0, atol=1e-12)


def test_the_midpoint_of_slerp_is_as_far_from_both_ends() -> None:
    z, noise = normal(1, 4, 8, 8, seed=1).double(), normal(1, 4, 8, 8, seed=2).double()
    noise *= z.norm() / noise.norm()
    middle = slerp(0.5, z, noise)
    angles = [torch.acos(torch.cosine_similarity(middle.flatten(), end.flatten(), dim=0)) for end in (z, noise)]
    assert float(angles[0]) == pytest.approx(float(angles[1]), abs=1e-9)
    assert float(middle.norm()) == pytest.approx(float(z.norm()), rel=1e-9)

"""Sampling against outside references: diffusers' pipeline and schedulers, and formulas in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svdiff.errors import SvdiffError
from svdiff.sampling import Job, sample_images
from svdiff.sampling.guidance import decode, denoise, encode_prompts, guided_noise, negative_noise, sample_guided
from svdiff.sampling.inversion import edit_image, encode_images, invert
from svdiff.sampling.noise import draw_noise, seeded_generators, slerp

JOBS = [Job("a sks dog", 0), Job("a cat on a red background", 7), Job("a house", 3)]


def as_array(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---- guidance: Eq. 9 and 10 ----


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_eq_9(scale: float) -> None:
    c, empty = normal(2, 4, 3, 3, seed=1), normal(2, 4, 3, 3, seed=2)
    torch.testing.assert_close(guided_noise(c, empty, scale), scale * c + (1 - scale) * empty, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_eq_10(beta: float) -> None:
    empty, first, second = (normal(2, 4, 3, 3, seed=seed) for seed in range(3))
    expected = beta * empty + (1 - beta) * first
    torch.testing.assert_close(negative_noise(empty, [first], beta), expected, rtol=0, atol=1e-12)
    expected = beta * empty + (1 - beta) / 2 * first + (1 - beta) / 2 * second
    torch.testing.assert_close(negative_noise(empty, [first, second], beta), expected, rtol=0, atol=1e-12)
    assert negative_noise(empty, [first], 1.0) is empty


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_own_loop_makes_the_pictures_of_the_pipeline(tiny_pipe, guidance: float, eta: float) -> None:
    theirs = sample_images(tiny_pipe, JOBS, steps=4, guidance=guidance, eta=eta)
    ours = sample_guided(tiny_pipe, JOBS, steps=4, guidance=guidance, eta=eta)
    assert np.array_equal(as_array(ours), as_array(theirs))


def test_beta_1_is_plain_guidance_exactly(tiny_pipe) -> None:
    plain = sample_guided(tiny_pipe, JOBS, steps=4, guidance=3.0)
    with_negatives = sample_guided(tiny_pipe, JOBS, steps=4, guidance=3.0, beta=1.0, negatives=["a panda", "a car"])
    assert np.array_equal(as_array(plain), as_array(with_negatives))


def test_beta_0_with_one_negative_is_the_negative_prompt_of_the_pipeline(tiny_pipe) -> None:
    theirs = sample_images(tiny_pipe, JOBS, steps=4, guidance=3.0, negative="a panda")
    ours = sample_guided(tiny_pipe, JOBS, steps=4, guidance=3.0, beta=0.0, negatives=["a panda"])
    assert np.abs(as_array(ours) - as_array(theirs)).max() <= 1
    plain = sample_images(tiny_pipe, JOBS, steps=4, guidance=3.0)
    assert np.abs(as_array(plain) - as_array(theirs)).max() > 1


def test_one_step_of_the_loop_by_hand(tiny_pipe) -> None:
    """Eq. 9 and 10 with two negatives and DDIM's update, written out from four separate passes of the network."""
    z, s, beta = normal(1, 4, 8, 8, dtype=torch.float32), 4.0, 0.6
    got = denoise(tiny_pipe, z, ["a sks dog"], steps=1, guidance=s, beta=beta, negatives=["a dog", "a cat"])
    scheduler = tiny_pipe.scheduler
    [t] = scheduler.timesteps
    with torch.no_grad():
        c, empty, n1, n2 = (
            tiny_pipe.unet(z, t, **encode_prompts(tiny_pipe, [text])).sample.double()
            for text in ("a sks dog", "", "a dog", "a cat")
        )
    noise = s * c + (1 - s) * (beta * empty + (1 - beta) * (n1 + n2) / 2)
    now, then = float(scheduler.alphas_cumprod[t]), float(scheduler.final_alpha_cumprod)
    clean = (z.double() - math.sqrt(1 - now) * noise) / math.sqrt(now)
    expected = math.sqrt(then) * clean + math.sqrt(1 - then) * noise
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.2, "negatives": ["a dog"]}, r"β of Eq. 10 is 1\.2"),
        ({"beta": 0.5}, "without negative prompts"),
        ({"beta": 0.5, "negatives": ["a dog"], "guidance": 1.0}, "its scale is 1"),
        ({"eta": 0.5}, "η is 0.5"),
    ],
)
def test_impossible_settings_are_refused(tiny_pipe, settings: dict, message: str) -> None:
    with pytest.raises(SvdiffError, match=message):
        denoise(tiny_pipe, normal(1, 4, 8, 8), ["a dog"], **({"steps": 2, "guidance": 3.0} | settings))


# ---- inversion: Eq. 6 ----


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [7, 20])
def test_eq_6_equals_the_inverse_scheduler_of_diffusers(tiny_pipe, prediction: str, steps: int) -> None:
    tiny_pipe.scheduler.register_to_config(prediction_type=prediction)
    z = normal(2, 4, 8, 8, dtype=torch.float32)
    prompts = ["a sks dog", "a red house"]
    reference = DDIMInverseScheduler.from_config(tiny_pipe.scheduler.config)
    reference.set_timesteps(steps)
    context, expected = encode_prompts(tiny_pipe, prompts), z
    with torch.no_grad():
        for t in reference.timesteps:
            output = tiny_pipe.unet(expected, t, **context).sample
            expected = reference.step(output, int(t), expected).prev_sample
    got = invert(tiny_pipe, z, prompts, steps=steps)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - z).abs().max() > 0.1


MEAN, DEVIATION = 0.8, 0.5


def know_a_gaussian(pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the network be the exact denoiser of latents from N(MEAN, DEVIATION²), whose flow has a closed form."""

    def forward(z: torch.Tensor, t: torch.Tensor | int, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        level = pipe.scheduler.alphas_cumprod[int(t[0])].to(z.dtype)
        return SimpleNamespace(
            sample=(1 - level).sqrt() * (z - level.sqrt() * MEAN) / (level * DEVIATION**2 + 1 - level)
        )

    monkeypatch.setattr(pipe.unet, "forward", forward)


def test_inversion_follows_the_exact_flow_of_a_gaussian(tiny_pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deterministic flow keeps (z − mean) / deviation; at level ᾱ these are √ᾱ·MEAN and √(ᾱ·DEVIATION² + 1 − ᾱ)."""
    know_a_gaussian(tiny_pipe, monkeypatch)
    z = MEAN + DEVIATION * normal(1, 4, 8, 8)
    errors = []
    for steps in (10, 50, 250):
        got = invert(tiny_pipe, z, ["a dog"], steps=steps)
        last = tiny_pipe.scheduler.alphas_cumprod[tiny_pipe.scheduler.timesteps[0]].double()
        exact = last.sqrt() * MEAN + (last * DEVIATION**2 + 1 - last).sqrt() * (z - MEAN) / DEVIATION
        errors.append(float((got - exact).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_sampling_after_inversion_reconstructs_and_improves_with_steps(
    tiny_pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_a_gaussian(tiny_pipe, monkeypatch)
    z = MEAN + DEVIATION * normal(2, 4, 8, 8)
    errors = []
    for steps in (10, 50, 250):
        noise = invert(tiny_pipe, z, ["a dog", "a cat"], steps=steps)
        back = denoise(tiny_pipe, noise, ["a dog", "a cat"], steps=steps, guidance=1.0)
        errors.append(float((back - z).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_inversion_is_conditioned_on_its_prompt(tiny_pipe) -> None:
    z = normal(1, 4, 8, 8, dtype=torch.float32)
    dog, cat = (invert(tiny_pipe, z, [prompt], steps=5) for prompt in ("a sks dog", "a blue cat"))
    assert not torch.equal(dog, cat)


# ---- slerp: Eq. 7 ----


@settings(deadline=None, max_examples=50)
@given(st.floats(0.001, 0.999), st.integers(0, 2**31))
def test_eq_7(alpha: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    z, noise = random.standard_normal((2, 3, 4, 5, 5))
    got = slerp(alpha, torch.tensor(z), torch.tensor(noise)).numpy()
    for i in range(3):
        a, b = z[i].ravel(), noise[i].ravel()
        phi = math.acos(a @ b / math.sqrt((a @ a) * (b @ b)))
        expected = (math.sin((1 - alpha) * phi) * a + math.sin(alpha * phi) * b) / math.sin(phi)
        np.testing.assert_allclose(got[i].ravel(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slerp_ends_are_exact_and_the_type_stays(dtype: torch.dtype) -> None:
    z, noise = normal(2, 4, 8, 8, seed=1).to(dtype), normal(2, 4, 8, 8, seed=2).to(dtype)
    assert torch.equal(slerp(0.0, z, noise), z)
    assert torch.equal(slerp(1.0, z, noise), noise)
    assert slerp(0.3, z, noise).dtype == dtype


def test_slerp_keeps_the_length_of_noise() -> None:
    """Why it is spherical: a linear mean of independent noises would be short by √2, and pictures grey."""
    z, noise = normal(1, 4, 64, 64, seed=1), normal(1, 4, 64, 64, seed=2)
    assert float(slerp(0.5, z, noise).std()) == pytest.approx(1.0, abs=0.02)
    assert float(((z + noise) / 2).std()) == pytest.approx(1 / math.sqrt(2), abs=0.02)


def test_slerp_of_parallel_and_opposite_vectors() -> None:
    z = normal(2, 4, 8, 8)
    torch.testing.assert_close(slerp(0.25, z, z), z)
    torch.testing.assert_close(slerp(0.25, z, 3 * z), 1.5 * z)
    with pytest.raises(SvdiffError, match="opposite"):
        slerp(0.25, z, -z)
    with pytest.raises(SvdiffError, match=r"α = 1\.5"):
        slerp(1.5, z, z)
    with pytest.raises(SvdiffError, match="shapes"):
        slerp(0.5, z, z[:1])


# ---- editing: Sec. 3.4 ----


def test_editing_without_randomness_is_inversion_then_sampling(tiny_pipe) -> None:
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    noise = invert(tiny_pipe, encode_images(tiny_pipe, [image]), ["a red house"], steps=4)
    [expected] = decode(tiny_pipe, denoise(tiny_pipe, noise, ["a red house"], steps=4, guidance=3.0))
    edits = edit_image(tiny_pipe, noise, "a red house", [0, 1], steps=4, guidance=3.0, eta=0.0)
    for edit in edits:
        assert np.abs(as_array([edit]) - as_array([expected])).max() <= 1
    one, other = as_array(edit_image(tiny_pipe, noise, "a red house", [0, 1], steps=4, guidance=3.0, alpha=0.9))
    assert np.abs(one - other).max() > 1


def test_editing_without_inversion_is_plain_sampling(tiny_pipe) -> None:
    inverted = normal(1, 4, 8, 8, dtype=torch.float32)
    edits = edit_image(tiny_pipe, inverted, "a car", [3, 4], steps=4, guidance=3.0, eta=0.0, alpha=1.0)
    plain = sample_images(tiny_pipe, [Job("a car", 3), Job("a car", 4)], steps=4, guidance=3.0)
    assert np.array_equal(as_array(edits), as_array(plain))


def test_inversion_starts_from_the_mean_of_the_posterior(tiny_pipe) -> None:
    image = Image.new("RGB", (16, 16), "red")
    pixels = torch.tensor([255.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
    with torch.no_grad():
        expected = tiny_pipe.vae.encode(pixels).latent_dist.mode() * tiny_pipe.vae.config.scaling_factor
    torch.testing.assert_close(encode_images(tiny_pipe, [image]), expected)


def test_noise_of_a_picture_depends_on_its_seed_alone(tiny_pipe) -> None:
    both = draw_noise(tiny_pipe, seeded_generators([4, 9]))
    assert both.shape == (2, 4, 8, 8)
    assert torch.equal(draw_noise(tiny_pipe, seeded_generators([9])), both[1:])

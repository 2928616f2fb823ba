"""DDIM inversion and the editing of a single picture (Sec. 3.4, Eq. 6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from svdiff.errors import SvdiffError
from svdiff.sampling.guidance import decode, denoise, encode_prompts
from svdiff.sampling.noise import draw_noise, seeded_generators, slerp

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from PIL.Image import Image


@torch.no_grad()
def encode_images(pipe: StableDiffusionPipeline, images: Sequence[Image]) -> Tensor:
    """z* of pictures of one size, (N, C, h, w): the mean of the autoencoder's posterior."""
    pixels = pipe.image_processor.preprocess(list(images)).to(pipe.device, pipe.vae.dtype)
    return (pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor).to(pipe.unet.dtype)


def denoised_and_noise(scheduler: DDIMScheduler, output: Tensor, z: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """The network's output as (ẑ_0, ε̂) at level ᾱ, from z = √ᾱ z_0 + √(1−ᾱ) ε."""
    signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (z - spread * output) / signal, output
    if kind == "v_prediction":
        return signal * z - spread * output, signal * output + spread * z
    raise SvdiffError(f"the base predicts '{kind}'; expected epsilon or v_prediction in its scheduler_config.json")


@torch.no_grad()
def invert(pipe: StableDiffusionPipeline, latents: Tensor, prompts: Sequence[str], *, steps: int) -> Tensor:
    """Eq. 6: z_T = DDIMInvert(z*, c; θ'), at guidance scale 1.

    Every DDIM step from level t to the one below is run backwards with the noise that the network predicts at (z, t), z
    being what is known: the latents of the level below. Nothing is clipped, whatever the scheduler does in sampling.

    Args:
        pipe: the fine-tuned pipeline, with a DDIM scheduler.
        latents: z*, (B, C, h, w).
        prompts: B target prompts c.
        steps: DDIM steps; sample with as many.

    Returns:
        z_T, (B, C, h, w).
    """
    context = encode_prompts(pipe, prompts)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    levels = scheduler.alphas_cumprod.to(latents.device)
    stride = scheduler.config.num_train_timesteps // steps
    for t in reversed(scheduler.timesteps.tolist()):
        below = levels[t - stride] if t >= stride else scheduler.final_alpha_cumprod.to(latents.device)
        output = pipe.unet(latents, t, encoder_hidden_states=context).sample
        clean, noise = denoised_and_noise(scheduler, output, latents, below)
        latents = (levels[t].sqrt() * clean + (1 - levels[t]).sqrt() * noise).to(latents.dtype)
    return latents


def reconstruct(pipe: StableDiffusionPipeline, inverted: Tensor, prompts: Sequence[str], *, steps: int) -> list[Image]:
    """Pictures that z_T leads back to, with nothing random and at guidance 1: what inversion alone keeps.

    `inverted` is z_T of `invert` for the same prompts and steps; with more steps the pictures come nearer to the inverted ones.
    """
    return decode(pipe, denoise(pipe, inverted, prompts, steps=steps, guidance=1.0))


def edit_image(
    pipe: StableDiffusionPipeline,
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

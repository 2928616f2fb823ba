"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention, one CLIP text encoder, noise or v prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdiff.models.family import Conditions, Family, to_8_bits
from svdiff.models.objective import Diffusion

if TYPE_CHECKING:
    from PIL.Image import Image


class StableDiffusion(Family):
    """See `Family`."""

    title = "Stable Diffusion 1.x and 2.x"
    pipeline = "StableDiffusionPipeline"
    load_options = {"safety_checker": None, "requires_safety_checker": False}  # noqa: RUF012
    network_name = "unet"
    encoder_names = ("text_encoder",)
    attention = "cross"
    lora_names = {"unet": "lora_unet", "text_encoder": "lora_te"}  # noqa: RUF012

    @classmethod
    def prepare(cls, pipe: Any) -> None:
        """DDIM in the place of the scheduler that the base came with (Sec. 4)."""
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    @property
    def image_size(self) -> int:
        """See `Family`."""
        return int(self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor)

    @classmethod
    def native_size(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `Family`."""
        return int(configs["unet"]["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `Family`."""
        side = self.image_size // self.pipe.vae_scale_factor
        return self.pipe.unet.config.in_channels, side, side

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids.to(self.pipe.device))[0]}

    @property
    def objective(self) -> Diffusion:
        """See `Family`."""
        return Diffusion(self.pipe.scheduler)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """See `Family`."""
        cast = {name: condition.to(self.dtype) for name, condition in conditions.items()}
        predicted: Tensor = self.network(noisy.to(self.dtype), timesteps, **cast).sample
        return predicted

    def draw(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        steps: int,
        guidance: float,
        eta: float = 0.0,
        negative: str | None = None,
        callback: Any = None,
    ) -> list[Image]:
        """See `Family`."""
        pixels = self.pipe(
            prompt=list(prompts),
            negative_prompt=None if negative is None else [negative] * len(prompts),
            height=self.image_size,
            width=self.image_size,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            generator=list(generators),
            callback_on_step_end=callback,
            output_type="np",
        ).images
        return to_8_bits(pixels)

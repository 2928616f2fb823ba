"""Stable Diffusion 1.x and 2.x: a UNet with cross-attention, one CLIP text encoder, noise or v prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from svdiff.models.family import Conditions, Family
from svdiff.models.objective import Diffusion

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


class StableDiffusion(Family):
    """See `Family`."""

    title = "Stable Diffusion 1.x and 2.x"
    pipeline = "StableDiffusionPipeline"
    load_options = {"safety_checker": None, "requires_safety_checker": False}  # noqa: RUF012
    network_name = "unet"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attention = "cross"
    lora_names = {"unet": "lora_unet", "text_encoder": "lora_te"}  # noqa: RUF012
    sizes = {  # noqa: RUF012
        "sd15": {"unet": ("UNet2DConditionModel", UNET), "text_encoder": ("CLIPTextModel", CLIP_L)}
    }

    @classmethod
    def grid(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `Family`: the network halves latents between its blocks."""
        return super().grid(configs) * 2 ** (len(configs["unet"]["block_out_channels"]) - 1)

    @classmethod
    def prepare(cls, pipe: Any) -> None:
        """DDIM in the place of the scheduler that the base came with (Sec. 4)."""
        from diffusers import DDIMScheduler

        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids.to(self.device))[0]}

    @property
    def objective(self) -> Diffusion:
        """See `Family`."""
        return Diffusion(self.pipe.scheduler)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """See `Family`."""
        cast = {name: condition.to(self.dtype) for name, condition in conditions.items()}
        predicted: Tensor = self.network(noisy.to(self.dtype), timesteps, **cast).sample
        return predicted

    def guided(self, count: int, guidance: float, eta: float, negative: str | None) -> dict[str, Any]:
        """See `Family`."""
        negatives = None if negative is None else [negative] * count
        return {"guidance_scale": guidance, "eta": eta, "negative_prompt": negatives}

"""Stable Diffusion XL: two CLIP text encoders, a pooled embedding, and the picture's size as conditions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdiff.models.family import Conditions
from svdiff.models.stable_diffusion import CLIP_L, StableDiffusion

UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_G = {
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "max_position_embeddings": 77,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


class StableDiffusionXL(StableDiffusion):
    """See `Family`."""

    title = "Stable Diffusion XL"
    pipeline = "StableDiffusionXLPipeline"
    load_options = {}  # noqa: RUF012
    encoder_names = ("text_encoder", "text_encoder_2")
    lora_names = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}  # noqa: RUF012
    sizes = {  # noqa: RUF012
        "sdxl": {
            "unet": ("UNet2DConditionModel", UNET),
            "text_encoder": ("CLIPTextModel", CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
        }
    }

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        embedded, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            written = torch.tensor([prompt != "" for prompt in prompts], device=embedded.device).to(embedded)
            embedded, pooled = embedded * written[:, None, None], pooled * written[:, None]
        return {"encoder_hidden_states": embedded, "text_embeds": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """See `Family`."""
        cast = {name: condition.to(self.dtype) for name, condition in conditions.items()}
        height, width = (side * self.pipe.vae_scale_factor for side in noisy.shape[2:])
        # Original size, corner of the crop, target size.
        sizes = torch.tensor([height, width, 0, 0, height, width]).to(noisy.device, self.dtype)
        cast["time_ids"] = sizes.expand(len(noisy), -1)
        predicted: Tensor = self.network(
            noisy.to(self.dtype),
            timesteps,
            encoder_hidden_states=cast.pop("encoder_hidden_states"),
            added_cond_kwargs=cast,
        ).sample
        return predicted

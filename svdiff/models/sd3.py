"""Stable Diffusion 3 and 3.5: a transformer with joint attention, two CLIP encoders and T5, flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from svdiff.models.family import Conditions, Family
from svdiff.models.objective import Flow, no_eta, shift_by_size
from svdiff.models.sdxl import CLIP_G
from svdiff.models.stable_diffusion import CLIP_L

T5_TOKENS = 256
COMMON = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
MEDIUM = COMMON | {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
LARGE = COMMON | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
ENCODERS = {
    "text_encoder": ("CLIPTextModelWithProjection", CLIP_L),
    "text_encoder_2": ("CLIPTextModelWithProjection", CLIP_G),
}


class StableDiffusion3(Family):
    """See `Family`. T5, which has more weights than the network, is not trained."""

    title = "Stable Diffusion 3"
    pipeline = "StableDiffusion3Pipeline"
    network_name = "transformer"
    encoder_names = ("text_encoder", "text_encoder_2")
    attention = "joint"
    flow = True
    patch = 2
    sizes = {  # noqa: RUF012
        "sd3.5-medium": {"transformer": ("SD3Transformer2DModel", MEDIUM)} | ENCODERS,
        "sd3.5-large": {"transformer": ("SD3Transformer2DModel", LARGE)} | ENCODERS,
    }

    @property
    def text_length(self) -> int:
        """Tokens that T5 is given."""
        tokenizer = self.pipe.tokenizer_3
        return T5_TOKENS if tokenizer is None else min(T5_TOKENS, tokenizer.model_max_length)

    @property
    def reader(self) -> tuple[Any, int]:
        """See `Family`."""
        return super().reader if self.pipe.tokenizer_3 is None else (self.pipe.tokenizer_3, self.text_length)

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        embedded, _, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length,
        )
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    @property
    def objective(self) -> Flow:
        """See `Family`."""
        scheduler = self.pipe.scheduler
        tokens = (self.latent_shape[1] // self.pipe.transformer.config.patch_size) ** 2
        return Flow(scheduler, lambda steps: shift_by_size(scheduler.config, tokens))

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """See `Family`."""
        cast = {name: condition.to(self.dtype) for name, condition in conditions.items()}
        predicted: Tensor = self.network(hidden_states=noisy.to(self.dtype), timestep=timesteps, **cast).sample
        return predicted

    def guided(self, count: int, guidance: float, eta: float, negative: str | None) -> dict[str, Any]:
        """See `Family`."""
        no_eta(eta)
        negatives = None if negative is None else [negative] * count
        return {"guidance_scale": guidance, "negative_prompt": negatives, "max_sequence_length": self.text_length}

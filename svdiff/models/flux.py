"""Flux.1: a transformer with joint attention, CLIP's pooled embedding and T5, flow matching, guidance as an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdiff.models.family import Conditions, Family
from svdiff.models.objective import Flow, no_eta, shift_by_size
from svdiff.models.stable_diffusion import CLIP_L

T5_TOKENS = 512
LATENT_SIDE = 128  # of native pictures; no configuration says so


def plain_sigmas(steps: int) -> list[float]:
    """The unshifted σ that Flux's pipelines start from: 1 to 1/steps."""
    return [1 - i / steps for i in range(steps)]


class Flux(Family):
    """See `Family`. Pictures go to the network as patches of 2 × 2 latents. T5 is not trained."""

    title = "Flux.1"
    pipeline = "FluxPipeline"
    network_name = "transformer"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    attention = "joint"
    flow = True
    patch = 2
    sizes = {  # noqa: RUF012
        "flux": {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "text_encoder": ("CLIPTextModel", CLIP_L),
        }
    }

    @classmethod
    def native_size(cls, configs: Mapping[str, Mapping[str, Any]]) -> int:
        """See `Family`."""
        return int(LATENT_SIDE * 2 ** (len(configs["vae"]["block_out_channels"]) - 1))

    @property
    def guidance_is_learned(self) -> bool:
        """See `Family`: so is Flux.1-dev, Flux.1-schnell is not."""
        return bool(self.pipe.transformer.config.guidance_embeds)

    @property
    def reader(self) -> tuple[Any, int]:
        """See `Family`."""
        return self.pipe.tokenizer_2, min(T5_TOKENS, self.pipe.tokenizer_2.model_max_length)

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        embedded, pooled, _ = self.pipe.encode_prompt(
            prompt=list(prompts), device=self.device, max_sequence_length=self.reader[1]
        )
        return {"encoder_hidden_states": embedded, "pooled_projections": pooled}

    @property
    def objective(self) -> Flow:
        """See `Family`."""
        scheduler, tokens = self.pipe.scheduler, (self.latent_shape[1] // 2) ** 2
        return Flow(scheduler, lambda steps: shift_by_size(scheduler.config, tokens), plain_sigmas)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """See `Family`."""
        cast = {name: condition.to(self.dtype) for name, condition in conditions.items()}
        count, channels, height, width = noisy.shape
        text = torch.zeros(cast["encoder_hidden_states"].shape[1], 3).to(noisy.device, self.dtype)
        places = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, self.dtype)
        scale = torch.full((count,), guidance, device=noisy.device) if self.guidance_is_learned else None
        packed = self.network(
            hidden_states=self.pipe._pack_latents(noisy.to(self.dtype), count, channels, height, width),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=scale,
            txt_ids=text,
            img_ids=places,
            **cast,
        ).sample
        factor = self.pipe.vae_scale_factor
        predicted: Tensor = self.pipe._unpack_latents(packed, height * factor, width * factor, factor)
        return predicted

    def guided(self, count: int, guidance: float, eta: float, negative: str | None) -> dict[str, Any]:
        """See `Family`; a network that does not read the scale is guided by Eq. 9."""
        no_eta(eta)
        length = {"max_sequence_length": self.reader[1]}
        if self.guidance_is_learned:
            return length | {"guidance_scale": guidance}
        return length | {"true_cfg_scale": guidance, "negative_prompt": [negative or ""] * count}

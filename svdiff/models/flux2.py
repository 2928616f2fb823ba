"""Flux.2: a transformer with joint attention, a language model as text encoder, latents in patches, flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from svdiff.errors import SvdiffError
from svdiff.models.family import Conditions
from svdiff.models.flux import Flux, plain_sigmas
from svdiff.models.objective import Flow, no_eta

TOKENS = 512


class Flux2(Flux):
    """See `Family`: Flux.2-dev. Channels of latents are patches of 2 × 2, normalised by the autoencoder's statistics."""

    title = "Flux.2"
    pipeline = "Flux2Pipeline"
    encoder_names = ()
    sizes = {"flux2": {"transformer": ("Flux2Transformer2DModel", {})}}  # noqa: RUF012
    layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    """Whose outputs of the language model are the text's embedding."""

    @property
    def tokenizer(self) -> Any:
        """See `Family`; without what prepares pictures for the language model."""
        return getattr(self.pipe.tokenizer, "tokenizer", self.pipe.tokenizer)

    @property
    def reader(self) -> tuple[Any, int]:
        """See `Family`."""
        return self.tokenizer, min(TOKENS, self.tokenizer.model_max_length)

    def check_token(self, token: str) -> None:
        """Any word will do: a language model reads it by its pieces, and they are not trained."""
        if not self.tokenizer.tokenize(token):
            raise SvdiffError(f"token '{token}' is nothing to the base's tokenizer; expected a word, e.g. sks")

    @property
    def _text(self) -> dict[str, Any]:
        """How the pipeline encodes prompts: as many layers as a small language model has."""
        depth = self.pipe.text_encoder.config.get_text_config().num_hidden_layers
        layers = tuple(min(layer, depth) for layer in self.layers)
        return {"max_sequence_length": self.reader[1], "text_encoder_out_layers": layers}

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """See `Family`."""
        embedded, _ = self.pipe.encode_prompt(prompt=list(prompts), device=self.device, **self._text)
        return {"encoder_hidden_states": embedded}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `Family`."""
        channels, height, width = super().latent_shape
        return 4 * channels, height // 2, width // 2

    def scaled(self, latents: Tensor, *, deviation: bool = False) -> Tensor:
        """See `Family`."""
        mean, spread = self._statistics(latents)
        patches: Tensor = self.pipe._patchify_latents(latents)
        return (patches if deviation else patches - mean) / spread

    def unscaled(self, latents: Tensor) -> Tensor:
        """See `Family`."""
        mean, spread = self._statistics(latents)
        whole: Tensor = self.pipe._unpatchify_latents(latents * spread + mean)
        return whole

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        norm = self.pipe.vae.bn
        spread = torch.sqrt(norm.running_var + self.pipe.vae.config.batch_norm_eps)
        return norm.running_mean.to(latents).view(1, -1, 1, 1), spread.to(latents).view(1, -1, 1, 1)

    @property
    def objective(self) -> Flow:
        """See `Family`."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        tokens = self.latent_shape[1] * self.latent_shape[2]
        return Flow(self.pipe.scheduler, lambda steps: compute_empirical_mu(tokens, steps), plain_sigmas)

    def predict(self, noisy: Tensor, timesteps: Tensor, conditions: Conditions, *, guidance: float = 1.0) -> Tensor:
        """See `Family`."""
        text = conditions["encoder_hidden_states"].to(self.dtype)
        latents = noisy.to(self.dtype)
        packed = self.network(
            hidden_states=self.pipe._pack_latents(latents),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=torch.full((len(noisy),), guidance, device=noisy.device) if self.guidance_is_learned else None,
            encoder_hidden_states=text,
            txt_ids=self.pipe._prepare_text_ids(text).to(noisy.device),
            img_ids=self.pipe._prepare_latent_ids(latents).to(noisy.device),
        ).sample
        predicted: Tensor = packed.transpose(1, 2).reshape(noisy.shape)
        return predicted

    def guided(self, count: int, guidance: float, eta: float, negative: str | None) -> dict[str, Any]:
        """See `Family`."""
        no_eta(eta)
        if negative:
            raise SvdiffError(f"the negative prompt '{negative}' has no effect on {self.title}: leave it away")
        return {"guidance_scale": guidance} | self._text


class Flux2Klein(Flux2):
    """See `Family`: Flux.2-klein, guided by Eq. 9 where it is not distilled."""

    title = "Flux.2-klein"
    pipeline = "Flux2KleinPipeline"
    sizes = {}  # noqa: RUF012
    layers = (9, 18, 27)

    @property
    def is_distilled(self) -> bool:
        """See `Family`."""
        return self.guidance_is_learned or bool(self.pipe.config.is_distilled)

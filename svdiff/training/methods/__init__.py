"""Training methods behind one interface: spectral shifts, full weights, LoRA, Custom Diffusion (Sec. 4.1).

A method changes the pipeline's networks in place so that some parameters are trainable, and can write what it learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.models import family_of
from svdiff.training.methods.tokens import WithTokens, special_tokens, wants_tokens


class Method(Protocol):
    """A way to personalise the networks of a pipeline."""

    @property
    def base_hash(self) -> str:
        """Hash of the base weights that the method starts from."""
        ...

    def parameters(self) -> dict[str, list[Parameter]]:
        """Trainable float32 parameters by the name of their learning rate in `TrainConfig`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything trainable, by name, for a resume state."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...

    def save(self, path: Path, metadata: dict[str, str], tokens: Mapping[str, Tensor] | None = None) -> None:
        """Write what was learned, and changes of tokens' embeddings, as one safetensors file."""
        ...

    def detach(self) -> None:
        """Give the pipeline its base weights back."""
        ...


def apply_method(pipe: Any, config: TrainConfig, tokens: Sequence[str]) -> Method:
    """Make `pipe` trainable by `config.method`, with the embeddings of the special `tokens` where they are trained or set."""
    embeddings = special_tokens(family_of(pipe), tokens, config) if wants_tokens(config) else {}
    try:
        method = _apply(pipe, config)
    except BaseException:
        for embedding in embeddings.values():
            embedding.remove()
        raise
    return WithTokens(method, embeddings) if embeddings else method


def _apply(pipe: Any, config: TrainConfig) -> Method:
    if config.method == "svdiff":
        from svdiff.training.methods.spectral import SpectralMethod

        return SpectralMethod(pipe, config)
    if config.method == "lora":
        from svdiff.training.methods.lora import LoraMethod

        return LoraMethod(pipe, config)
    from svdiff.training.methods.weights import WeightsMethod

    return WeightsMethod(pipe, config)

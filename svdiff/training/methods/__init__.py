"""Training methods behind one interface: spectral shifts, full weights, LoRA, Custom Diffusion (Sec. 4.1).

A method changes the pipeline's networks in place so that some parameters are trainable, and can write what it learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Parameter

from svdiff.config import TrainConfig


class Method(Protocol):
    """A way to personalise the networks of a pipeline."""

    @property
    def base_hash(self) -> str:
        """Hash of the base weights that the method starts from."""
        ...

    def parameters(self) -> dict[str, list[Parameter]]:
        """Trainable float32 parameters by learning rate: 'lr' (2-D and 4-D weights) and 'lr_1d' (norms)."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything trainable, by name, for a resume state."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        ...

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write what was learned as one safetensors file."""
        ...

    def detach(self) -> None:
        """Give the pipeline its base weights back."""
        ...


def apply_method(pipe: Any, config: TrainConfig, tokens: Sequence[str]) -> Method:
    """Make `pipe` trainable by `config.method`. `tokens` are the special tokens, which Custom Diffusion trains as well."""
    if config.method == "svdiff":
        from svdiff.training.methods.spectral import SpectralMethod

        return SpectralMethod(pipe, config)
    if config.method == "lora":
        from svdiff.training.methods.lora import LoraMethod

        return LoraMethod(pipe, config)
    from svdiff.training.methods.weights import WeightsMethod

    return WeightsMethod(pipe, config, tokens)

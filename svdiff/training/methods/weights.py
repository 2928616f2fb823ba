"""The baselines that train weights as they are: full fine-tuning (DreamBooth) and Custom Diffusion (Sec. 4.1).

What they learn is saved as differences, W − W₀, so that W₀ + sΔW (Fig. 26) can be had at any scale s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import family_of
from svdiff.sampling.weights_delta import base_hashes, save_weights_delta
from svdiff.spectral import select

# Custom Diffusion (Kumari et al. 2023): the cross-attention's key and value projections.
CUSTOM_DIFFUSION = re.compile(r"(^|\.)attn2\.to_[kv]\.weight$")


class OpenWeights:
    """Parameters opened for training in float32, whatever they were; the base's tensors wait beside them."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)
        self.base = {name: parameter.data for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)

    def deltas(self) -> dict[str, Tensor]:
        """W − W₀ of each, float32 on the CPU."""
        return {
            name: (parameter.detach() - self.base[name].float()).cpu() for name, parameter in self.parameters.items()
        }

    def close(self) -> None:
        """The base again, bit for bit: they are its own tensors."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.base[name]


class WeightsMethod:
    """Full fine-tuning: every weight and bias of the subset's layers, and of the text encoder when asked.

    Custom Diffusion: `attn2.to_k` and `attn2.to_v`; its special tokens are added by `WithTokens`.
    """

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        custom = config.method == "custom-diffusion"
        _refuse_unused(config)
        family = family_of(pipe)
        subsets = family.trained(config.subset, text_encoder=config.text_encoder)
        self.base_hashes = base_hashes(pipe, [*subsets, *(family.encoder_names if custom else ())])
        chosen: dict[str, Parameter] = {}
        for network, subset in subsets.items():
            module = getattr(pipe, network)
            layers = layers_of(module, subset)
            for name, parameter in module.named_parameters():
                if CUSTOM_DIFFUSION.search(name) if custom else name.rpartition(".")[0] in layers:
                    chosen[f"{network}.{name}"] = parameter
        self.weights = OpenWeights(chosen)

    @property
    def base_hash(self) -> str:
        """The bases' hashes, joined: that of the denoising network first."""
        return "+".join(self.base_hashes.values())

    def parameters(self) -> dict[str, list[Parameter]]:
        """See `Method`; biases are 1-D as norms are."""
        return by_rate(self.weights.parameters)

    def state(self) -> dict[str, Tensor]:
        """A copy of everything trainable, by name."""
        return copy_state(self.weights.parameters)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises SvdiffError where names or shapes differ."""
        load_state(self.weights.parameters, state)

    def save(self, path: Path, metadata: dict[str, str], tokens: Mapping[str, Tensor] | None = None) -> None:
        """Write the changes W − W₀ as safetensors."""
        save_weights_delta(path, self.weights.deltas() | dict(tokens or {}), metadata | self.base_hashes)

    def detach(self) -> None:
        """Give the pipeline its base weights back, bit for bit."""
        self.weights.close()


def by_rate(parameters: Mapping[str, Parameter]) -> dict[str, list[Parameter]]:
    """Parameters by learning rate, by their names 'network.weight'."""
    rates: dict[str, list[Parameter]] = {"lr": [], "lr_1d": [], "lr_text_encoder": []}
    for name, parameter in parameters.items():
        encoder = name.startswith("text_encoder")
        rates["lr_1d" if parameter.ndim == 1 else "lr_text_encoder" if encoder else "lr"].append(parameter)
    return rates


def _refuse_unused(config: TrainConfig) -> None:
    """Raise SvdiffError for settings that would say something of this training and change nothing in it."""
    custom = config.method == "custom-diffusion"
    if custom and config.text_encoder:
        raise SvdiffError(
            "train.text_encoder is true with method custom-diffusion, which trains W^K, W^V and the tokens' "
            "embeddings and nothing else; set text_encoder: false, or choose method full"
        )
    if custom and config.subset != "UNet":
        raise SvdiffError(
            f"train.subset is '{config.subset}' with method custom-diffusion, which trains W^K and W^V of "
            "cross-attention whatever the subset; set subset: UNet, or choose method svdiff, full or lora"
        )
    if config.rank is not None:
        raise SvdiffError(
            f"train.rank is {config.rank} with method {config.method}, which trains weights as they are; "
            "set rank: null, or choose method svdiff or lora"
        )


def layers_of(module: nn.Module, subset: str) -> set[str]:
    """Paths of the layers whose weights are in `subset`, for the methods that train biases or pairs beside them."""
    return {name.rpartition(".")[0] for name in select(module, subset)}


def copy_state(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """A copy of parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def load_state(parameters: Mapping[str, Parameter], state: Mapping[str, Tensor]) -> None:
    """Set parameters, in place and in their own float32. Raises SvdiffError where names or shapes differ."""
    different = sorted(parameters.keys() ^ state.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != state[name].shape
    ]
    if different:
        raise SvdiffError(
            f"the resume state does not fit the method: {len(different)} tensors differ, such as '{different[0]}'; "
            "it was written by another training: remove it"
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])

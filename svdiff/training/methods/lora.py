"""The LoRA baseline as the paper runs it (supplement A): rank 1 on 2-D and 4-D weights, 1-D weights trained too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.models import family_of
from svdiff.sampling.weights_delta import base_hashes, save_weights_delta
from svdiff.training.methods.weights import OpenWeights, by_rate, copy_state, layers_of, load_state

ADAPTER = "svdiff"


class LoraMethod:
    """LoRA (PEFT) on every linear and convolution layer of the subset, and the weights of its norms.

    Of text encoders, when asked, it is on all layers, whatever the subset. The rank is `rank` of the configuration, 1 where it is not set. B starts at zero, so step 0 is the base; A is drawn
    from the configuration's seed. Norms in the file are changes W − W₀; the pairs are named as PEFT and diffusers do.
    """

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        self.rank = config.rank or 1
        subsets = family_of(pipe).trained(config.subset, text_encoder=config.text_encoder)
        self.base_hashes = base_hashes(pipe, list(subsets))
        self._modules: dict[str, nn.Module] = {network: getattr(pipe, network) for network in subsets}
        # Found before the injection, which renames what it wraps.
        layers = {network: layers_of(module, subsets[network]) for network, module in self._modules.items()}
        norms = {
            f"{network}.{name}": parameter
            for network, module in self._modules.items()
            for name, parameter in module.named_parameters()
            if name.endswith(".weight") and parameter.ndim == 1 and name.removesuffix(".weight") in layers[network]
        }
        with torch.random.fork_rng(devices=[]):  # PEFT draws on the CPU, whatever the device
            torch.manual_seed(config.seed)
            for network, module in self._modules.items():
                _inject(module, layers[network], self.rank)
        self.norms = OpenWeights(norms)
        self.pairs = {
            f"{network}.{name.replace(f'.{ADAPTER}.', '.')}": parameter
            for network, module in self._modules.items()
            for name, parameter in module.named_parameters()
            if f".{ADAPTER}." in name
        }
        for parameter in self.pairs.values():
            parameter.data = parameter.data.float()

    @property
    def base_hash(self) -> str:
        """The bases' hashes, joined: that of the denoising network first."""
        return "+".join(self.base_hashes.values())

    def parameters(self) -> dict[str, list[Parameter]]:
        """See `Method`."""
        return by_rate(self.pairs | self.norms.parameters)

    def state(self) -> dict[str, Tensor]:
        """A copy of everything trainable, by name."""
        return copy_state(self.pairs | self.norms.parameters)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises SvdiffError where names or shapes differ."""
        load_state(self.pairs | self.norms.parameters, state)

    def save(self, path: Path, metadata: dict[str, str], tokens: Mapping[str, Tensor] | None = None) -> None:
        """Write the pairs and the norms' changes as one safetensors file, for `load_weights_delta`."""
        pairs = {name: tensor.cpu() for name, tensor in copy_state(self.pairs).items()}
        known = {"lora_rank": str(self.rank), "lora_alpha": str(self.rank)}
        save_weights_delta(path, pairs | self.norms.deltas() | dict(tokens or {}), metadata | known | self.base_hashes)

    def detach(self) -> None:
        """Give the pipeline its own layers and norms back, bit for bit."""
        self.norms.close()
        for module in self._modules.values():
            _eject(module)


def _inject(module: nn.Module, chosen: set[str], rank: int) -> None:
    """Wrap the linear and convolution layers among `chosen` by PEFT; α = rank, so that the change is BA itself."""
    from peft import LoraConfig, inject_adapter_in_model

    layers = [n for n, layer in module.named_modules() if n in chosen and isinstance(layer, nn.Linear | nn.Conv2d)]
    if not layers:
        return  # a subset of norms alone
    # A pattern, because PEFT takes a plain name for the end of longer ones as well.
    pattern = "|".join(re.escape(name) for name in layers)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)


def _eject(module: nn.Module) -> None:
    """Put the layers that PEFT wrapped back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, layer.get_base_layer())
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        if leftover in module.__dict__:
            delattr(module, leftover)

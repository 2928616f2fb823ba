"""What is trained in `train_step`: nothing, spectral shifts, LoRA, all weights, and the layers of svdiff-pytorch."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

# Its package imports a copy of diffusers of 2023; only its layers file is used, unchanged, from PyPI:
#     pip install --no-deps --target build/bench svdiff-pytorch==0.2.0 einops
EXISTING = Path("build/bench")


def floor(unet: nn.Module, cache: Path) -> list[Tensor]:
    """Nothing: a frozen network, with the gradient to its input alone."""
    unet.requires_grad_(False)
    return []


def spectral(unet: nn.Module, cache: Path) -> list[Tensor]:
    """Spectral shifts on every weight."""
    from svdiff.spectral import attach, load_basis

    shifts = attach(unet, load_basis(unet, cache), subset="UNet")
    return list(shifts.parameters())


def lora(unet: nn.Module, cache: Path) -> list[Tensor]:
    """LoRA of rank 1 on every linear layer and convolution, by PEFT."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    names = [name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    unet.add_adapter(LoraConfig(r=1, target_modules=names))  # type: ignore[operator]
    return [p for p in unet.parameters() if p.requires_grad]


def full(unet: nn.Module, cache: Path) -> list[Tensor]:
    """Every weight."""
    return list(unet.requires_grad_(True).parameters())


def existing(unet: nn.Module, cache: Path) -> list[Tensor]:
    """The layers of svdiff-pytorch 0.2 in place of ours; their SVD is left out, its result made up."""
    layers = _existing_layers()
    unet.requires_grad_(False)
    deltas = []
    with _made_up_svd():
        for path, layer in list(unet.named_modules()):
            twin = _twin(layers, layer)
            if twin is None:
                continue
            twin.weight, twin.bias, twin.done_svd = layer.weight, layer.bias, True
            deltas.append(twin.delta)
            parent, _, name = path.rpartition(".")
            setattr(unet.get_submodule(parent), name, twin)
    return deltas


METHODS: dict[str, Callable[[nn.Module, Path], list[Tensor]]] = {
    "floor": floor,
    "lora": lora,
    "spectral": spectral,
    "full": full,
    "existing": existing,
}


def _existing_layers() -> ModuleType:
    sys.path.append(str(EXISTING))
    found = importlib.util.find_spec("svdiff_pytorch")
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps --target {EXISTING} svdiff-pytorch==0.2.0 einops")
    file = Path(found.submodule_search_locations[0]) / "layers.py"
    spec = importlib.util.spec_from_file_location("existing_layers", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _twin(layers: ModuleType, layer: nn.Module) -> Any:
    if isinstance(layer, nn.Linear):
        return layers.SVDLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    if isinstance(layer, nn.Conv2d):
        return layers.SVDConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size[0], stride=layer.stride, padding=layer.padding
        )
    if isinstance(layer, nn.LayerNorm):
        return layers.SVDLayerNorm(layer.normalized_shape, eps=layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return layers.SVDGroupNorm(layer.num_groups, layer.num_channels, eps=layer.eps)
    return None


@contextmanager
def _made_up_svd() -> Iterator[None]:
    """Factors of the right shapes: the arithmetic of a step does not ask which."""
    real = torch.linalg.svd

    def made_up(a: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        m, n = a.shape
        k = min(m, n)
        scale = 0.5 / (m * n) ** 0.25
        return torch.randn(m, k) * scale, torch.ones(k), torch.randn(k, n) * scale

    torch.linalg.svd = made_up
    try:
        yield
    finally:
        torch.linalg.svd = real

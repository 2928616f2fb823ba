"""Weights of a narrower network in a wider one that does the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from svdiff.errors import SvdiffError


def load_widened(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], source: object) -> None:
    """Load `weights` into `module`; where a tensor of the module is larger, the rest of it becomes zero.

    With zeros for new channels at input and output the wider network starts as the narrower one. Raises SvdiffError
    naming `source` and the tensor if something is missing, unknown or larger than in the module.
    """
    wider: dict[str, torch.Tensor] = {}
    for name, target in module.state_dict().items():
        value = weights.get(name)
        if value is None:
            raise SvdiffError(f"{source} has no {name}: it is of another architecture than the one configured")
        if value.ndim != target.ndim or any(a > b for a, b in zip(value.shape, target.shape, strict=True)):
            raise SvdiffError(
                f"{source}: {name} is {tuple(value.shape)}, more than the configured {tuple(target.shape)}"
            )
        wider[name] = torch.zeros_like(target)
        wider[name][tuple(slice(length) for length in value.shape)] = value.to(target.dtype)
    if unknown := sorted(set(weights) - set(wider)):
        raise SvdiffError(f"{source} has {unknown[0]}, which the configured architecture has not")
    module.load_state_dict(wider)


def load_start(module: torch.nn.Module, folder: Path) -> None:
    """Start `module` from the weights in `folder`, as `load_widened`. Raises SvdiffError if it does not hold one such file."""
    from safetensors.torch import load_file

    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise SvdiffError(f"start_from: {folder} should hold one .safetensors file, and holds {len(found)}")
    load_widened(module, load_file(found[0]), found[0])

"""Optimisers by name: AdamW of torch, and those of other packages where these are installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch.optim import AdamW, Optimizer

from svdiff.errors import SvdiffError

PACKAGES = {"adamw-8bit": "bitsandbytes", "prodigy": "prodigyopt"}


def check_optimizer(name: str) -> None:
    """Raise SvdiffError for an optimiser whose package is not installed."""
    package = PACKAGES.get(name)
    if package and find_spec(package) is None:
        raise SvdiffError(
            f"train.optimizer is {name}, which is in the package {package}: `pip install {package}`, or choose adamw"
        )


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimiser on groups of parameters with their rates, without weight decay. Raises as `check_optimizer`."""
    check_optimizer(name)
    if name == "adamw-8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, weight_decay=0.0)
    if name == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, weight_decay=0.0)
    return AdamW(
        groups, weight_decay=0.0, fused=True
    )  # the same arithmetic, in one call for hundreds of small parameters

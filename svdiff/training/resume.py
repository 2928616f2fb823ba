"""Writes and reads resume states: files of tensors and numbers that an interrupted training goes on from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from svdiff.files import atomic_file


def save_state(path: Path, state: dict[str, Any]) -> bool:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) in place of the previous one.

    Returns False, and leaves the previous one, where a number of it is not finite.
    """
    if not is_finite(state):
        return False
    with atomic_file(path) as temporary:
        torch.save(state, temporary)
    return True


def load_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if there is none."""
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def is_finite(state: Any) -> bool:
    """Whether all tensors in nested dicts and lists are finite, and no number is NaN (settings of optimisers may be ∞)."""
    if isinstance(state, torch.Tensor):
        return bool(state.isfinite().all())
    if isinstance(state, dict):
        return all(is_finite(value) for value in state.values())
    if isinstance(state, list | tuple):
        return all(is_finite(value) for value in state)
    return not isinstance(state, float) or not math.isnan(state)

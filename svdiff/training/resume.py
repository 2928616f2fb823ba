"""Writes and reads resume states: files of tensors and numbers that an interrupted training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from svdiff.files import atomic_file


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) in place of the previous one."""
    with atomic_file(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None if there is none."""
    if not path.is_file():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)

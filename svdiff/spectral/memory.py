"""Giving freed memory back to the system where the allocator would keep it.

glibc cannot use the hole that an aligned block leaves between two others for a block of the same size. A forward
pass leaves hundreds of them: what is kept for the backward pass lies between what was temporary. At the size of
Stable Diffusion 1.5 they add up to 0.2 GB beside 1.8 GB in use, and the weights dropped at attaching leave 0.2 GB more.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Kept bytes between two trims: ten in a step at 64 x 64 latents, two or three at 32 x 32.
TRIM_EVERY = 32 << 20

_kept = 0


@cache
def _malloc_trim() -> Any:
    """glibc's function, or None on other systems, whose allocators we leave alone."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None


def trim() -> None:
    """Give the pages of all holes back. Costs some milliseconds, and a page fault for each page that is used again."""
    if function := _malloc_trim():
        function(0)


def note_kept(tensor: Tensor) -> None:
    """Count a tensor that is kept for the backward pass, and trim now and then."""
    global _kept
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _kept += tensor.numel() * tensor.element_size()
    if _kept >= TRIM_EVERY:
        _kept = 0
        trim()

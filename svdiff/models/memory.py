"""What a training holds in memory beside activations, by arithmetic: which base fits which card, at which rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdiff.spectral.basis import TRANSPOSED, is_matrix
from svdiff.spectral.decompose import as_matrix
from svdiff.spectral.subsets import select

if TYPE_CHECKING:
    from torch import nn

CARDS = (12, 24, 48, 80)
"""Memory of graphics cards in GiB."""
SHARE = 0.8
"""Of a card, for what is held; the rest is for activations with gradient checkpointing, and for what the driver takes."""
FLOAT32 = 4
TRAINED = 4 * FLOAT32
"""Bytes of a shift in training: itself, its gradient and Adam's two moments, all float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a network in training holds."""

    weights: int
    factors: int  # U, Vᵀ, and σ
    shifts: int  # with gradients and the optimiser's state

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.factors + self.shifts


def training_memory(network: nn.Module, subset: str = "all", rank: int | None = None, itemsize: int = 4) -> Memory:
    """What spectral shifts of `subset` hold, the base's weights taking `itemsize` bytes a number.

    A whole decomposition takes the place of W: K (M + N) numbers for M N. Where the rank is limited to k, W stays, and the
    leading directions come beside it: k (M + N).
    """
    weights = itemsize * sum(p.numel() for p in network.parameters())
    factors = shifts = 0
    for name in select(network, subset):
        owner = network.get_submodule(name.rpartition(".")[0])
        weight = owner.get_parameter("weight")
        if not is_matrix(owner):
            shifts += TRAINED * weight.numel()
            continue
        m, n = as_matrix(weight, transposed=isinstance(owner, TRANSPOSED)).shape
        whole = min(m, n)
        kept = whole if rank is None else min(rank, whole)
        factors += itemsize * kept * (m + n) + FLOAT32 * kept
        shifts += TRAINED * kept
        if kept == whole:
            weights -= itemsize * m * n
    return Memory(weights, factors, shifts)


def largest_rank(network: nn.Module, card: float, subset: str = "all", itemsize: int = 2) -> int | None:
    """The largest rank that fits a card of so many GiB; 0 where none does, None where the full rank does."""
    room = SHARE * card * 2**30
    if training_memory(network, subset, None, itemsize).total <= room:
        return None
    low, high = 0, 1 << 16
    while low < high:
        middle = (low + high + 1) // 2
        if training_memory(network, subset, middle, itemsize).total <= room:
            low = middle
        else:
            high = middle - 1
    return low


def verdict(network: nn.Module, card: float, subset: str, rank: int | None, itemsize: int) -> str:
    """Whether a training at `rank` fits a card of so many GiB, and if not, which does."""
    if training_memory(network, subset, rank, itemsize).total <= SHARE * card * 2**30:
        return "fits"
    largest = largest_rank(network, card, subset, itemsize)
    if largest == 0:
        return "does not fit at any rank"
    return f"does not fit; set train.rank: {'null' if largest is None else largest}"


def said(rank: int | None) -> str:
    """A result of `largest_rank` in words."""
    return "full rank" if rank is None else f"rank {rank}" if rank else "does not fit"

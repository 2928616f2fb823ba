"""Which concept each picture of a batch has."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdiff.errors import SvdiffError


class Given(NamedTuple):
    """What a layer was called with last, and what it answered if it was called with the same before."""

    x: weakref.ref[Tensor]
    versions: tuple[int, int]  # of x and of the shifts
    answer: Tensor | None
    answered: int  # its version

    def repeats(self, x: Tensor, delta: Tensor) -> bool:
        """Whether it is called with the same tensor again, which nobody wrote to since."""
        return self.x() is x and self.versions == (x._version, delta._version)


class Batch:
    """The row of the shifts that each picture takes; all layers of a model share one.

    `index` has an entry for each picture that is drawn or trained. `rows` is that of the present call of the model,
    whose batch may repeat the pictures as a whole, as for guidance (`copies` says how often), or be shorter: one of prompts
    of which each has several pictures. `seen`, `made` and `given` are the layers' own, until the next batch is assigned: the
    tokens that a layer was given, what it made for all steps of the batch, and its last input.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.rows: Tensor | None = None
        self.copies = 1
        self.seen: dict[object, int] = {}
        self.made: dict[object, tuple[object, Any]] = {}
        self.given: dict[object, Given] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which cannot have weak references."""
        return {**self.__dict__, "given": {}}

    def assign(self, index: Sequence[int] | Tensor | None, concepts: int) -> None:
        """Set the row of each picture, of so many concepts; None forgets it."""
        rows = None if index is None else torch.as_tensor(index, dtype=torch.long).cpu()
        if rows is not None and (rows.ndim != 1 or not len(rows) or rows.min() < 0 or rows.max() >= concepts):
            raise SvdiffError(
                f"the index of the pictures is {index}; expected a list of numbers from 0 to {concepts - 1}"
            )
        self.index = self.rows = rows
        self.copies = 1
        self.seen.clear()
        self.made.clear()
        self.given.clear()

    def follow(self, module: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Before a call of the model: find the row of each member of its batch, by its first batched argument."""
        if self.index is not None:
            x = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)
            self.rows = rows_of(self.index, x)
            self.copies = max(1, len(self.rows) // len(self.index))


def rows_of(index: Tensor, x: Tensor) -> Tensor:
    """The row of each member of the batch `x`, from that of each picture. Raises SvdiffError where they do not fit."""
    pictures, found = len(index), len(x)
    if found % pictures == 0:
        _check_copies(x, pictures)
        return index.repeat(found // pictures).to(x.device)
    by_prompt = index.view(found, -1) if pictures % found == 0 else None
    if by_prompt is None or (by_prompt != by_prompt[:, :1]).any():
        raise SvdiffError(
            f"a batch of {found} is not one of {pictures} pictures with a concept each: give one concept a picture, in the "
            "order of the batch"
        )
    return by_prompt[:, 0].to(x.device)


def _check_copies(x: Tensor, pictures: int) -> None:
    """Refuse a batch of more pictures than have a concept, which only looks like one that repeats them."""
    if len(x) == pictures or not x.is_floating_point() or x.is_meta or torch.compiler.is_compiling():
        return
    first, *others = x.split(pictures)
    if not all(torch.equal(first, other) for other in others):
        raise SvdiffError(
            f"a batch of {len(x)} different pictures is drawn with {pictures} concepts: give one concept a picture, in the "
            "order of the batch (a prompt's as often as it has pictures)"
        )

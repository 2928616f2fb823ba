"""Attention losses in training (supplement B): records cross-attention maps and adds unmix and Eq. 8 to the loss of Eq. 3.

An attention loss whose weight is 0 costs nothing: nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from svdiff.config import TrainConfig
from svdiff.models import family_of
from svdiff.training.attention import AttentionRecorder, token_map, token_positions
from svdiff.training.batches import Batch
from svdiff.training.losses import Loss, single_subject_loss, subject_mask, unmix_loss

SUBJECTS = {"unmix": 2, "single_subject": 1}  # in the pictures that a loss looks at
Words = list[tuple[int, str]]  # rows of a batch, each with the word whose map is wanted


class AttentionLosses:
    """The attention losses that `config` gives a weight, on one recorder of chosen layers and resolutions.

    Raises SvdiffError if a weight is set and no layer matches `attention_layers`.
    """

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        known: dict[str, tuple[float, Callable[[Batch], Tensor | None]]] = {
            "unmix": (config.unmix_weight, self._unmix),
            "single_subject": (config.single_subject_weight, self._single_subject),
        }
        self.terms = {name: term for name, term in known.items() if term[0] > 0}
        family = family_of(pipe)
        self.tokenizer, self.threshold = family.tokenizer, config.subject_threshold
        self.recorder: AttentionRecorder | None = None
        if self.terms:
            self.recorder = AttentionRecorder(
                family.network, layers=config.attention_layers, sides=config.attention_sides
            )

    def recording(self) -> AbstractContextManager[object]:
        """What the pass of the network is made in: a recorder, or nothing without attention losses."""
        return nullcontext() if self.recorder is None else self.recorder

    def add_to(self, loss: Loss, batch: Batch, whole: Batch | None = None) -> Loss:
        """`loss` with each attention loss times its weight added; the very same object without any.

        `whole` is the batch of all processes, of which `batch` is one's share: their mean is the loss of the whole.
        """
        for name, (weight, term) in self.terms.items():
            value = term(batch)
            if value is None:  # no picture of this kind in the batch
                value = torch.zeros_like(loss.total)
            elif whole is not None and whole is not batch:
                value = value * _share(batch, whole, SUBJECTS[name])
            loss = loss._replace(total=loss.total + weight * value, extra=loss.extra | {name: value})
        return loss

    def _unmix(self, batch: Batch) -> Tensor | None:
        """The unmix loss on the mixes of a batch: no special token shall attend to the other subject's region."""
        mixes = [row for row, shown in enumerate(batch.shown) if len(shown) == 2]
        if not mixes:
            return None
        maps = [self._maps(batch, [(row, batch.shown[row][i].token) for row in mixes]) for i in (0, 1)]
        side = maps[0].shape[1]
        regions = [
            torch.stack([torch.from_numpy(batch.shown[row][i].region.mask(side, side)) for row in mixes])
            for i in (0, 1)
        ]
        return unmix_loss(maps, [region.to(maps[0].device) for region in regions])

    def _single_subject(self, batch: Batch) -> Tensor | None:
        """Eq. 8 on the samples that show one subject: its token shall attend to no more than its class word does."""
        singles = [row for row, shown in enumerate(batch.shown) if len(shown) == 1]
        if not singles:
            return None
        special, coarse = (
            self._maps(batch, [(row, getattr(batch.shown[row][0], word)) for row in singles])
            for word in ("token", "class_word")
        )
        return single_subject_loss(special, subject_mask(coarse, self.threshold))

    def _maps(self, batch: Batch, words: Words) -> Tensor:
        """Maps (len(words), side, side) of a word in each of some rows."""
        assert self.recorder is not None
        rows = [row for row, _ in words]
        places = [token_positions(self.tokenizer, batch.prompts[row], word) for row, word in words]
        return token_map({layer: maps[rows] for layer, maps in self.recorder.maps.items()}, places)


def _share(batch: Batch, whole: Batch, subjects: int) -> float:
    """How many times its even share of the pictures with so many subjects a process has."""
    own, every = (sum(len(shown) == subjects for shown in part.shown) for part in (batch, whole))
    return own / every * len(whole.prompts) / len(batch.prompts)

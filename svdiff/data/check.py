"""The gate before a training: whether the pictures of a concept are worth it, in words.

*stop*: they cannot be trained on; *fix first*: they can, and something about them will show in the result; *go*: neither.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from svdiff.data.concepts import (
    ConceptImage,
    concept_folder,
    crop_loss,
    left_alone,
    load_concept_images,
    looks_like_a_mask,
    mask_to_square,
    to_square,
)
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config

log = logging.getLogger(__name__)

FEWEST = 3  # pictures (Sec. 4.1)
MOST_CROPPED = 0.25  # share of a picture that may be lost unseen
MOST_BLURRED = 0.6  # of the measure in `blur`
NEAR = 3.0  # mean difference of 8-bit thumbnails beneath which two pictures are one
THUMBNAIL = 16  # side of those thumbnails


@dataclass(frozen=True)
class Verdict:
    """The gate's word, why it is not *go*, and what is worth knowing all the same."""

    word: Literal["go", "fix first", "stop"]
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self, name: str) -> list[str]:
        """For people, about the concept `name`."""
        return [
            f"{name}: {self.word}",
            *(f"  {reason}" for reason in self.reasons),
            *(f"  note: {note}" for note in self.notes),
        ]


def gated_pictures(config: Config, name: str, fit: str, *, masks: bool = False) -> list[ConceptImage]:
    """The pictures of a concept for a training or a mix, after the gate, which says what it thinks of them.

    `masks`: with those that the loss is weighted by. Raises SvdiffError where it says *stop*.
    """
    from svdiff.models import native_size

    folder = concept_folder(name)
    pictures = load_concept_images(folder, masks=masks)
    verdict = judge(pictures, native_size(config.base), fit, left_alone(folder, masks=masks), masks=masks)
    if verdict.word == "stop":
        raise SvdiffError("\n".join(verdict.lines(str(folder))))
    for line in [*verdict.reasons, *verdict.notes]:
        log.warning("%s: %s", folder, line)
    return pictures


def check_folder(folder: Path, size: int | None, fit: str = "crop", *, masks: bool = False) -> Verdict:
    """Judge a concept folder.

    Args:
        folder: its pictures.
        size: side of the pictures that the base is trained on; None: not known, and size and blur are not judged.
        fit: how pictures are made square, as `train.fit`.
        masks: whether the loss is weighted by masks, as `train.masks: loss` does.
    """
    try:
        pictures = load_concept_images(folder, masks=masks)
    except SvdiffError as error:
        return Verdict("stop", str(error).splitlines())
    verdict = judge(pictures, size, fit, left_alone(folder, masks=masks), masks=masks)
    return replace(verdict, notes=[f"{p.path.name} {note}" for p in pictures for note in p.notes] + verdict.notes)


def judge(
    pictures: list[ConceptImage], size: int | None, fit: str, beside: list[str], *, masks: bool = False
) -> Verdict:
    """The verdict on pictures that could be read; `beside` is what was left alone."""
    reasons = []
    if len(pictures) < FEWEST:
        reasons.append(
            f"{len(pictures)} of at least {FEWEST} pictures: the background will be learned with the subject"
        )
    for picture in pictures:
        reasons += [f"{picture.path.name}: {problem}" for problem in _problems(picture.image, size, fit)]
    thumbnails = [np.asarray(to_square(p.image, THUMBNAIL, "pad"), np.float32) for p in pictures]
    reasons += [
        f"{one.path.name} and {other.path.name} are nearly the same picture: one of them is enough"
        for (one, a), (other, b) in combinations(zip(pictures, thumbnails, strict=True), 2)
        if one.image.size == other.image.size and np.abs(a - b).mean() < NEAR
    ]
    notes = [*beside]
    without = [picture.path.name for picture in pictures if picture.caption is None]
    if 0 < len(without) < len(pictures):
        notes.append(f"{', '.join(without)}: no caption, so `train.prompt` describes them")
    reasons += [
        f"{picture.path.name}: named as a mask, and no picture has the rest of its name, so it is trained on as a picture"
        for picture in pictures
        if looks_like_a_mask(picture)
    ]
    unseen = [p.path.name for p in pictures if masks and p.mask and is_black(mask_to_square(p.mask, THUMBNAIL, fit))]
    if unseen:
        stop = f"{', '.join(unseen)}: what the mask marks lies outside the square crop. Crop round it, or set `train.fit: pad`"
        return Verdict("stop", [stop, *reasons], notes)
    return Verdict("fix first" if reasons else "go", reasons, notes + _notes_on_masks(pictures, masks))


def _notes_on_masks(pictures: list[ConceptImage], masks: bool) -> list[str]:
    """What is worth knowing about masks that are used, or about alpha channels that are not."""
    having = ", ".join(picture.path.name for picture in pictures if picture.mask)
    without = ", ".join(picture.path.name for picture in pictures if not picture.mask)
    if not masks:
        return [f"{having}: transparent in part, which is trained on as white; see `train.masks`"] if having else []
    return [f"{without}: no mask, so that all of it counts"] if without else []


def is_black(image: Image.Image) -> bool:
    """Whether every pixel of a grey picture is black."""
    return image.getextrema() == (0, 0)


def _problems(image: Image.Image, size: int | None, fit: str) -> list[str]:
    """What is wrong with one picture."""
    found = []
    width, height = image.size
    if fit == "crop" and (lost := crop_loss(image)) > MOST_CROPPED:
        found.append(
            f"{width} × {height}: the square crop loses {lost:.0%} of it. Crop it round the subject, or set `train.fit: pad`"
        )
    if size is not None:
        side = max(image.size) if fit == "pad" else min(image.size)
        if side < size:
            found.append(f"{width} × {height}: enlarged to the base's {size}, so it stays soft. Use the original")
        elif (measure := blur(to_square(image, size, fit))) > MOST_BLURRED:
            found.append(f"blurred (measure {measure:.2f}, at most {MOST_BLURRED}). Use a sharp one")
    return found


def blur(image: Image.Image) -> float:
    """How blurred a picture is, from 0 to 1: how little a further blur takes from its differences (Crete et al. 2007)."""
    grey = np.asarray(image.convert("L"), np.float64)
    return max(_blur_along(grey), _blur_along(grey.T))


def _blur_along(grey: NDArray[np.float64]) -> float:
    kernel = np.ones(9) / 9
    smooth = np.apply_along_axis(np.convolve, 1, np.pad(grey, ((0, 0), (4, 4)), mode="edge"), kernel, "valid")
    before, after = (np.abs(np.diff(values, axis=1)) for values in (grey, smooth))
    total = before.sum()
    return float(1 - np.maximum(before - after, 0).sum() / total) if total else 0.0

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
    concept_folder,
    crop_loss,
    left_alone,
    load_concept_images,
    looks_like_a_mask,
    mask_to_shape,
    to_shape,
    to_square,
    training_shape,
)
from svdiff.data.reading import ConceptImage
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
    from svdiff.models import native_size, picture_grid

    folder = concept_folder(name)
    pictures = load_concept_images(folder, masks=masks)
    size, grid = native_size(config.base), picture_grid(config.base)
    verdict = judge(pictures, size, fit, left_alone(folder, masks=masks), masks=masks, grid=grid)
    if verdict.word == "stop":
        raise SvdiffError("\n".join(verdict.lines(str(folder))))
    for line in [*verdict.reasons, *verdict.notes]:
        log.warning("%s: %s", folder, line)
    return pictures


def check_folder(folder: Path, size: int | None, fit: str = "crop", *, masks: bool = False, grid: int = 1) -> Verdict:
    """Judge a concept folder.

    Args:
        folder: its pictures.
        size: side of the pictures that the base is trained on; None: not known, and size and blur are not judged.
        fit: how pictures are made square, as `train.fit`.
        masks: whether the loss is weighted by masks, as `train.masks: loss` does.
        grid: pixels that sides of the base's pictures are multiples of.
    """
    try:
        pictures = load_concept_images(folder, masks=masks)
    except SvdiffError as error:
        return Verdict("stop", str(error).splitlines())
    verdict = judge(pictures, size, fit, left_alone(folder, masks=masks), masks=masks, grid=grid)
    return replace(verdict, notes=[f"{p.path.name} {note}" for p in pictures for note in p.notes] + verdict.notes)


def judge(
    pictures: list[ConceptImage],
    size: int | None,
    fit: str,
    beside: list[str],
    *,
    masks: bool = False,
    grid: int = 1,
) -> Verdict:
    """The verdict on pictures that could be read; `beside` is what was left alone."""
    reasons = []
    if len(pictures) < FEWEST:
        reasons.append(
            f"{len(pictures)} of at least {FEWEST} pictures: the background will be learned with the subject"
        )
    for picture in pictures:
        reasons += [f"{picture.path.name}: {problem}" for problem in _problems(picture.image, size, fit, grid)]
    thumbnails = [np.asarray(to_square(p.image, THUMBNAIL, "pad"), np.float32) for p in pictures]
    reasons += [
        f"{one.path.name} and {other.path.name} are nearly the same picture: one of them is enough"
        for (one, a), (other, b) in combinations(zip(pictures, thumbnails, strict=True), 2)
        if one.image.size == other.image.size and np.abs(a - b).mean() < NEAR
    ]
    notes = [*beside, *_notes_on_shapes(pictures, size, fit, grid)]
    without = [picture.path.name for picture in pictures if picture.caption is None]
    if 0 < len(without) < len(pictures):
        notes.append(f"{', '.join(without)}: no caption, so `train.prompt` describes them")
    reasons += [
        f"{picture.path.name}: named as a mask, and no picture has the rest of its name, so it is trained on as a picture"
        for picture in pictures
        if looks_like_a_mask(picture)
    ]
    unseen = [p.path.name for p in pictures if masks and p.mask and _is_unseen(p.mask, fit)]
    if unseen:
        stop = f"{', '.join(unseen)}: what the mask marks lies outside the {'square ' * (fit == 'crop')}crop. Crop round it, or set `train.fit: pad`"
        return Verdict("stop", [stop, *reasons], notes)
    return Verdict("fix first" if reasons else "go", reasons, notes + _notes_on_masks(pictures, masks))


def _notes_on_masks(pictures: list[ConceptImage], masks: bool) -> list[str]:
    """What is worth knowing about masks that are used, or about alpha channels that are not."""
    having = ", ".join(picture.path.name for picture in pictures if picture.mask)
    without = ", ".join(picture.path.name for picture in pictures if not picture.mask)
    if not masks:
        return [f"{having}: transparent in part, which is trained on as white; see `train.masks`"] if having else []
    return [f"{without}: no mask, so that all of it counts"] if without else []


def _notes_on_shapes(pictures: list[ConceptImage], size: int | None, fit: str, grid: int) -> list[str]:
    """Which pictures are trained in which shapes other than the square, and what of them is cropped."""
    if fit != "bucket" or size is None:
        return []
    shapes = [(picture, training_shape(picture.image, size, fit, grid)) for picture in pictures]
    return [
        f"{picture.path.name} is trained as {width} × {height}, {crop_loss(picture.image, (width, height)):.0%} of it cropped"
        for picture, (width, height) in shapes
    ]


def _is_unseen(mask: Image.Image, fit: str) -> bool:
    """Whether what a mask marks is cropped away."""
    return is_black(mask_to_shape(mask, training_shape(mask, THUMBNAIL, fit), fit))


def is_black(image: Image.Image) -> bool:
    """Whether every pixel of a grey picture is black."""
    return image.getextrema() == (0, 0)


def _problems(image: Image.Image, size: int | None, fit: str, grid: int) -> list[str]:
    """What is wrong with one picture."""
    found = []
    width, height = image.size
    shape = training_shape(image, size or THUMBNAIL, fit, grid if size else 1)
    if fit != "pad" and (lost := crop_loss(image, shape)) > MOST_CROPPED:
        crop, others = ("square crop", "bucket` or `pad") if fit == "crop" else ("crop to 2 : 1", "pad")
        found.append(
            f"{width} × {height}: the {crop} loses {lost:.0%} of it. Crop it round the subject, or set `train.fit: {others}`"
        )
    if size is not None:
        enlarged = max(image.size) < size if fit == "pad" else width < shape[0] or height < shape[1]
        if enlarged:
            found.append(f"{width} × {height}: enlarged to the base's {size}, so it stays soft. Use the original")
        elif (measure := blur(to_shape(image, shape, fit))) > MOST_BLURRED:
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

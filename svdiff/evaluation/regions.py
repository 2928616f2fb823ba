"""Finding the two subjects in a picture with a plain background, and cutting them out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from svdiff.data.foreground import Mask, foreground

SHARE = 0.15  # of the foreground that a subject has at least
SPECK = 0.01  # of the picture: foreground smaller than this is noise
TOUCHING = 0.12  # of the picture's side: subjects that are joined by a part twice as thick as this are one


class Regions(NamedTuple):
    """The subjects of a picture, cut out on white as squares; `found` is 2, or 1 where no second one was found."""

    first: Image.Image
    second: Image.Image
    found: int


def find_two(picture: Image.Image, side: int = 64) -> Regions:
    """The two subjects of a picture, left or upper first; where there is only one, it stands for both."""
    mask = foreground(picture)
    parts = _two_parts(mask)
    if parts is None:
        whole = cut_out(picture, mask, side)
        return Regions(whole, whole, 1)
    first, second = (cut_out(picture, part, side) for part in parts)
    return Regions(first, second, 2)


def _two_parts(mask: Mask) -> tuple[Mask, Mask] | None:
    """`mask` in two, None if it is one.

    Two are its parts that are not connected; those that touch come apart when the mask is eroded. Every pixel belongs to
    the nearer of the two.
    """
    if mask.mean() < SPECK:
        return None
    eroded = mask
    for _ in range(round(TOUCHING * min(mask.shape)) + 1):
        labels, count = ndimage.label(eroded)
        sizes = np.bincount(labels.ravel(), minlength=3)[1:]
        largest = np.argsort(-sizes, kind="stable")[:2] + 1
        if count > 1 and sizes[largest[1] - 1] >= SHARE * eroded.sum():
            nearest = ndimage.distance_transform_edt(
                ~np.isin(labels, largest), return_distances=False, return_indices=True
            )
            owner = labels[tuple(nearest)]
            centres = [ndimage.center_of_mass(labels == number) for number in largest]
            apart = np.abs(np.subtract(*centres))
            order = sorted((0, 1), key=lambda place: centres[place][1 if apart[1] >= apart[0] else 0])
            first, second = (mask & (owner == largest[place]) for place in order)
            return first, second
        eroded = ndimage.binary_erosion(eroded)
    return None


def cut_out(picture: Image.Image, mask: Mask | None = None, side: int = 64, detail: int | None = None) -> Image.Image:
    """What `mask` covers (default: the foreground), on white, as a `side` × `side` picture that it fills but for a margin.

    `detail` first reduces it to so many pixels, as sharp as a subject in a small picture is.
    """
    if mask is None:
        mask = foreground(picture)
    if not mask.any():
        return Image.new("RGB", (side, side), "white")
    rows, columns = ndimage.find_objects(mask.astype(np.uint8))[0]
    box = (columns.start, rows.start, columns.stop, rows.stop)
    white = Image.new("RGB", picture.size, "white")
    subject = Image.composite(picture.convert("RGB"), white, Image.fromarray(mask)).crop(box)
    length = round(1.15 * max(subject.size))
    square = Image.new("RGB", (length, length), "white")
    square.paste(subject, ((length - subject.width) // 2, (length - subject.height) // 2))
    if detail is not None and detail < length:
        square = square.resize((detail, detail), Image.Resampling.LANCZOS)
    return square.resize((side, side), Image.Resampling.LANCZOS)

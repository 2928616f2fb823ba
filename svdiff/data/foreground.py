"""Subjects before plain backgrounds: where they are, and how they are cut out and laid over another background."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

DISTINCT = 40  # of 255: how far a pixel's strongest channel is from the background's
# To cut out, where a background is really plain.
CLOSE = 20
SAME = 10


def foreground(picture: Image.Image, distinct: int = DISTINCT) -> Mask:
    """(height, width): where a subject is. Background is what is reached from the border through the border's own colours.

    Pixels are of the background's colour that differ from it by less than `distinct`, of 255, in every channel. Each side of the border has its colour, so that a picture stitched of two backgrounds has both.
    """
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    colours = [np.median(side.reshape(-1, 3), axis=0) for side in sides]
    plain: Mask = np.any([np.abs(pixels - colour).max(axis=2) < distinct for colour in colours], axis=0)
    background = ndimage.binary_propagation(np.zeros_like(plain), mask=plain, border_value=1)
    found: Mask = ndimage.median_filter(~background, 3)
    return found


class CutOut(NamedTuple):
    """A subject with nothing but a pixel around it, and where that is in its picture: left, top, right, bottom."""

    image: Image.Image
    box: tuple[int, int, int, int]


def ground(picture: Image.Image) -> Colour:
    """The colour of a plain background: the median of the picture's border."""
    pixels = np.asarray(picture.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(border, axis=0).astype(int).tolist()
    return red, green, blue


def cut_out_onto(picture: Image.Image, colour: Colour) -> CutOut | None:
    """The subject of a picture, as if its background had another colour; None if the picture shows none.

    A pixel that the subject covers to the share α is α f + (1 − α) b, so that (1 − α)(b′ − b) is added to it; f is the
    colour of the subject next to the pixel.
    """
    pixels, behind = np.asarray(picture.convert("RGB"), np.float32), np.array(ground(picture), np.float32)
    same = np.abs(pixels - behind).max(axis=2) < SAME
    mask = foreground(picture, CLOSE) & ~ndimage.binary_opening(same)  # seen through a loop of the subject
    inner = ndimage.binary_erosion(mask)
    if not inner.any() or mask.all():
        return None
    nearest = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    own = pixels[tuple(nearest)] - behind
    covered = ((pixels - behind) * own).sum(axis=2) / np.maximum((own * own).sum(axis=2), 1)
    covered = np.where(inner, 1, np.where(ndimage.binary_dilation(mask), covered.clip(0, 1), 0))[..., None]
    laid = np.where(covered > 0, pixels + (1 - covered) * (colour - behind), colour)
    rows, columns = ndimage.find_objects(ndimage.binary_dilation(mask).astype(np.uint8))[0]
    box = columns.start, rows.start, columns.stop, rows.stop
    return CutOut(Image.fromarray(laid.round().clip(0, 255).astype(np.uint8)).crop(box), box)

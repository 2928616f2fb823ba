"""Finding the things in a picture with a plain background, and cutting them out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Mask = NDArray[np.bool_]

DISTINCT = 40  # of 255: how far a pixel's strongest channel is from the background's
VALLEY = 0.5  # two things: between them the foreground is this much thinner than in the thinner one
SHARE = 0.15  # of the foreground that a thing has at least
SPECK = 0.01  # of the picture: foreground smaller than this is noise


class Things(NamedTuple):
    """The things of a picture, cut out on white as squares; `found` is 2, or 1 where no second one was found."""

    first: Image.Image
    second: Image.Image
    found: int


def foreground(picture: Image.Image) -> Mask:
    """(height, width): where a thing is. Background is what is reached from the border through the border's own colours.

    Each side of the border has its colour, so that a picture stitched of two backgrounds has both.
    """
    pixels = np.asarray(picture.convert("RGB"), np.int16)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    colours = [np.median(side.reshape(-1, 3), axis=0) for side in sides]
    plain: Mask = np.any([np.abs(pixels - colour).max(axis=2) < DISTINCT for colour in colours], axis=0)
    mask = Image.fromarray(~_from_border(plain)).convert("L").filter(ImageFilter.MedianFilter(3))
    return np.asarray(mask) > 0


def _from_border(plain: Mask) -> Mask:
    """The part of `plain` that is connected with the border."""
    reached = np.zeros_like(plain)
    reached[[0, -1]], reached[:, [0, -1]] = plain[[0, -1]], plain[:, [0, -1]]
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= plain
        if (grown == reached).all():
            return reached
        reached = grown


def find_two(picture: Image.Image, side: int = 64) -> Things:
    """The two things of a picture, left or upper first; where there is only one, it stands for both.

    They are told apart by the thinnest place of the foreground, looked for across, downwards and along both diagonals, so
    that things which touch are still two.
    """
    mask = foreground(picture)
    first = _first_of_two(mask)
    if first is None:
        whole = cut_out(picture, mask, side)
        return Things(whole, whole, 1)
    return Things(cut_out(picture, mask & first, side), cut_out(picture, mask & ~first, side), 2)


def _first_of_two(mask: Mask) -> Mask | None:
    """The half of the picture that holds the first thing, None if no place between two things is thin enough."""
    if mask.mean() < SPECK:
        return None
    y, x = np.indices(mask.shape)
    places = [direction - direction.min() for direction in (x, y, x + y, x - y)]
    seams: list[tuple[float, float, int, int]] = []
    for number, place in enumerate(places):
        profile = np.bincount(place[mask], minlength=int(place.max()) + 1).astype(float)
        share = np.cumsum(profile) / profile.sum()
        # What lies before `at` is the first thing's.
        for at in (np.flatnonzero((share >= SHARE) & (share <= 1 - SHARE)) + 1).tolist():
            thinner = min(profile[:at].max(), profile[at:].max())
            seams.append((float(profile[at] / thinner), float(abs(share[at - 1] - 0.5)), number, at))
    valley, _, number, at = min(seams, default=(1.0, 0.0, 0, 0))
    return places[number] < at if valley <= VALLEY else None


def cut_out(picture: Image.Image, mask: Mask | None = None, side: int = 64, detail: int | None = None) -> Image.Image:
    """What `mask` covers (default: the foreground), on white, as a `side` × `side` picture that it fills but for a margin.

    `detail` first reduces it to so many pixels, as sharp as a thing in a small picture is.
    """
    if mask is None:
        mask = foreground(picture)
    if not mask.any():
        return Image.new("RGB", (side, side), "white")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    white = Image.new("RGB", picture.size, "white")
    thing = Image.composite(picture.convert("RGB"), white, Image.fromarray(mask)).crop(box)
    length = round(1.15 * max(thing.size))
    square = Image.new("RGB", (length, length), "white")
    square.paste(thing, ((length - thing.width) // 2, (length - thing.height) // 2))
    if detail is not None and detail < length:
        square = square.resize((detail, detail), Image.Resampling.LANCZOS)
    return square.resize((side, side), Image.Resampling.LANCZOS)

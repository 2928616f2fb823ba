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
    plain = np.stack([np.abs(pixels - colour).max(axis=2) < DISTINCT for colour in colours]).any(axis=0)
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

    They are told apart by the thinnest place of the foreground, looked for along the width and along the height, so that
    things which touch are still two.
    """
    mask = foreground(picture)
    seam = _seam(mask)
    if seam is None:
        whole = cut_out(picture, mask, side)
        return Things(whole, whole, 1)
    axis, at = seam
    masks = [mask.copy(), mask.copy()]
    for part, gone in zip(masks, (slice(at, None), slice(None, at)), strict=True):
        part[(slice(None), gone) if axis == 1 else gone] = False
    return Things(cut_out(picture, masks[0], side), cut_out(picture, masks[1], side), 2)


def _seam(mask: Mask) -> tuple[int, int] | None:
    """Axis and position of the cut between two things, None if there is no place thin enough."""
    if mask.mean() < SPECK:
        return None
    best: tuple[float, float, int, int] | None = None
    for axis in (1, 0):
        profile = mask.sum(axis=1 - axis).astype(float)
        share = np.cumsum(profile) / profile.sum()
        for at in range(1, len(profile)):
            if not SHARE <= share[at - 1] <= 1 - SHARE:
                continue
            thinner = min(profile[:at].max(), profile[at:].max())
            candidate = (profile[at] / thinner, abs(share[at - 1] - 0.5), axis, at)
            best = candidate if best is None else min(best, candidate)
    return None if best is None or best[0] > VALLEY else best[2:]


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

"""Subjects before plain backgrounds: where they are, and how they are cut out and laid over another background."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

# How far a pixel's strongest channel is from the background's, of 255:
DISTINCT = 40  # to find a subject, also in a drawn picture
CLOSE = 20  # to cut one out, where the background is really plain
SAME = 10  # background that is seen through a loop of the subject, and not reached from the border


def foreground(picture: Image.Image, distinct: int = DISTINCT) -> Mask:
    """(height, width): where a subject is. Background is what is reached from the border through the border's own colours.

    A pixel has the background's colour if no channel differs from it by `distinct` or more. Each side of the border has its
    own colour, so that a picture stitched of two backgrounds has both.
    """
    from scipy import ndimage

    pixels = np.asarray(picture.convert("RGB"), np.int16)
    sides = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    colours = [np.median(side.reshape(-1, 3), axis=0) for side in sides]
    plain: Mask = np.any([np.abs(pixels - colour).max(axis=2) < distinct for colour in colours], axis=0)
    background = ndimage.binary_propagation(np.zeros_like(plain), mask=plain, border_value=1)
    found: Mask = ndimage.median_filter(~background, 3)
    return found


def ground(picture: Image.Image) -> Colour:
    """The colour of a plain background: the median of the picture's border."""
    pixels = np.asarray(picture.convert("RGB"))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = np.median(border, axis=0).astype(int).tolist()
    return red, green, blue


def cut_out(picture: Image.Image) -> Image.Image | None:
    """The subject of a picture before a really plain background, the rest transparent (RGBA); None if it shows none.

    A pixel is p = α f + (1 − α) b: α is how far it lies from the background's colour b on the way to f, the colour of the
    subject next to it, and f = (p − (1 − α) b) / α is what is seen of the subject.
    """
    from scipy import ndimage

    pixels, behind = np.asarray(picture.convert("RGB"), np.float32), np.array(ground(picture), np.float32)
    same = np.abs(pixels - behind).max(axis=2) < SAME
    mask = foreground(picture, CLOSE) & ~ndimage.binary_opening(same)  # seen through a loop of the subject
    inner = ndimage.binary_erosion(mask)
    if not inner.any() or mask.all():
        return None
    nearest = ndimage.distance_transform_edt(~inner, return_distances=False, return_indices=True)
    own = pixels[tuple(nearest)] - behind
    alpha = ((pixels - behind) * own).sum(axis=2) / np.maximum((own * own).sum(axis=2), 1)
    alpha = np.where(inner, 1, np.where(ndimage.binary_dilation(mask), alpha.clip(0, 1), 0))[..., None]
    subject = (pixels - (1 - alpha) * behind) / np.maximum(alpha, 1e-3)
    layers = np.concatenate([subject.clip(0, 255), 255 * alpha], axis=2)
    return Image.fromarray(layers.round().astype(np.uint8))

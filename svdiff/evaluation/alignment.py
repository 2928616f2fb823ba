"""Text and image alignment of pictures (Fig. 9b), and the paired gain of one model over another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import pandas as pd

from svdiff.data.concepts import to_square
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image
    from torch import Tensor

MEASURES = ("image_alignment", "text_alignment", "clip_i")


class Clip(Protocol):
    """A CLIP model: unit-length embeddings, one row an input."""

    def encode_images(self, images: list[Image]) -> Tensor:
        """N pictures to N × d."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """N texts to N × d."""


class Lpips(Protocol):
    """LPIPS distance of every picture of one list to every one of another, inputs scaled to [-1, 1]."""

    def __call__(self, images: list[Image], others: list[Image]) -> Tensor:
        """N and M pictures of one size to N × M distances."""


def without_token(prompt: str, token: str) -> str:
    """The prompt without its special token: 'a sks dog' becomes 'a dog'.

    The evaluator has never seen the token; to CLIP it is noise, or worse, a word of its own (SKS is a rifle).
    """
    words, removed = prompt.split(), token.split()
    kept: list[str] = []
    while words:
        if words[: len(removed)] == removed:
            words = words[len(removed) :]
        else:
            kept.append(words.pop(0))
    return " ".join(kept)


def align(
    pictures: Sequence[Image], texts: Sequence[str], training: Sequence[Image], *, clip: Clip, lpips: Lpips
) -> pd.DataFrame:
    """Alignment of each picture with its text and with the training pictures.

    Args:
        pictures: square pictures of one size.
        texts: the prompt of each picture, without the special token (see `without_token`).
        training: the concept's pictures; brought to the size of `pictures` by `to_square`, as in training.
        clip: embeds pictures and texts.
        lpips: the perceptual distance.

    Returns:
        One row a picture: `text_alignment`, the cosine of the CLIP embeddings of picture and text (no factor
        of 2.5); `image_alignment`, 1 − LPIPS, the mean over the training pictures; `clip_i`, the cosine of
        the CLIP embeddings of the pictures, the mean over the training pictures.
    """
    if not pictures or len(pictures) != len(texts):
        raise SvdiffError(f"{len(pictures)} pictures and {len(texts)} texts to score; expected as many, at least one")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        raise SvdiffError(f"pictures to score are of sizes {sorted(sizes)}; expected one square size")
    pictures = [picture.convert("RGB") for picture in pictures]
    squares = [to_square(picture, pictures[0].width) for picture in training]
    embedded = _matrix(clip.encode_images(pictures))
    return pd.DataFrame(
        {
            "image_alignment": 1 - _matrix(lpips(pictures, squares)).mean(axis=1),
            "text_alignment": (embedded * _matrix(clip.encode_texts(list(texts)))).sum(axis=1),
            "clip_i": (embedded @ _matrix(clip.encode_images(squares)).T).mean(axis=1),
        }
    )


def _matrix(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()


class Gain(NamedTuple):
    """Mean difference over pairs and its bootstrap 95 % interval."""

    mean: float
    low: float
    high: float


def paired_gain(trained: ArrayLike, base: ArrayLike, *, resamples: int, seed: int) -> Gain:
    """Mean of `trained − base` over pairs, with its 95 % percentile bootstrap interval (pairs are resampled).

    A pair is one prompt at one seed, sampled from both models: everything but the training is equal, so the
    interval tells what the training did from the luck of the draw. It says how far other prompts and seeds of
    this kind would move the mean for *this* delta; it does not cover training anew. The same arguments give
    the same interval.
    """
    difference = np.asarray(trained, np.float64) - np.asarray(base, np.float64)
    drawn = np.random.default_rng(seed).integers(0, difference.size, (resamples, difference.size))
    low, high = np.percentile(difference[drawn].mean(axis=1), [2.5, 97.5])
    return Gain(float(difference.mean()), float(low), float(high))

"""Text and image alignment of pictures (Fig. 9b), and the paired gain of one model over another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from svdiff.data.concepts import to_square
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from PIL.Image import Image
    from torch import Tensor

    from svdiff.config import EvaluatorsConfig

MEASURES = ("image_alignment", "text_alignment", "clip_i")


class Evaluators(NamedTuple):
    """What scores pictures: CLIP's two encoders (N inputs to N × d unit vectors) and LPIPS (N and M pictures to N × M)."""

    encode_images: Callable[[list[Image]], Tensor]
    encode_texts: Callable[[list[str]], Tensor]
    distance: Callable[[list[Image], list[Image]], Tensor]


def load_evaluators(config: EvaluatorsConfig) -> Evaluators:
    """The evaluators that params.yaml names. Raises SvdiffError if their weights are not there."""
    from svdiff.evaluation import evaluators

    encode_images, encode_texts = evaluators.load_clip(config)
    return Evaluators(encode_images, encode_texts, evaluators.load_lpips(config))


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
    pictures: Sequence[Image], texts: Sequence[str], training: Sequence[Image], evaluators: Evaluators
) -> pd.DataFrame:
    """Alignment of each picture with its text and with the training pictures.

    Args:
        pictures: square pictures of one size.
        texts: the prompt of each picture, without the special token (see `without_token`).
        training: the concept's pictures; brought to the size of `pictures` by `to_square`, as in training.
        evaluators: CLIP and LPIPS, see `load_evaluators`.

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
    embedded = _matrix(evaluators.encode_images(pictures))
    return pd.DataFrame(
        {
            "image_alignment": 1 - _matrix(evaluators.distance(pictures, squares)).mean(axis=1),
            "text_alignment": (embedded * _matrix(evaluators.encode_texts(list(texts)))).sum(axis=1),
            "clip_i": (embedded @ _matrix(evaluators.encode_images(squares)).T).mean(axis=1),
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

"""Alignment of pictures with their prompts and with a concept (Fig. 9b), and the identity score beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from svdiff.data.concepts import to_square
from svdiff.errors import SvdiffError
from svdiff.evaluation.identity import identity
from svdiff.words import word_pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

    from svdiff.evaluation.evaluators import Evaluators

MEASURES = ("identity", "image_alignment", "text_alignment", "clip_i")


def without_token(prompt: str, token: str) -> str:
    """The prompt without its special token: 'a sks dog' becomes 'a dog'.

    The evaluator has never seen the token; to CLIP it is noise, or worse, a word of its own (SKS is a rifle).
    """
    return " ".join(word_pattern(token).sub("", prompt).split())


def align(
    pictures: Sequence[Image], texts: Sequence[str], training: Sequence[Image], evaluators: Evaluators
) -> pd.DataFrame:
    """Alignment of each picture with its text and with the training pictures.

    Args:
        pictures: square pictures of one size.
        texts: the prompt of each picture, without the special token (see `without_token`).
        training: the concept's pictures; brought to the size of `pictures` by `to_square`, as in training.
        evaluators: CLIP, LPIPS and the instance embedding, see `load_evaluators`.

    Returns:
        One row a picture: `identity`, the cosine of the instance embeddings, the mean over the training pictures;
        `image_alignment`, 1 − LPIPS, the mean over the training pictures; `text_alignment`, the cosine of the CLIP
        embeddings of picture and text (no factor of 2.5); `clip_i`, the cosine of the CLIP embeddings of the pictures,
        the mean over the training pictures.
    """
    if not pictures or len(pictures) != len(texts):
        raise SvdiffError(f"{len(pictures)} pictures and {len(texts)} texts to score; expected as many, at least one")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1 or len(set(next(iter(sizes)))) > 1:
        raise SvdiffError(f"pictures to score are of sizes {sorted(sizes)}; expected one square size")
    pictures = [picture.convert("RGB") for picture in pictures]
    squares = [to_square(picture, pictures[0].width) for picture in training]
    embedded = as_array(evaluators.encode_images(pictures))
    return pd.DataFrame(
        {
            "identity": identity(
                as_array(evaluators.encode_identity(pictures)), as_array(evaluators.encode_identity(squares))
            ),
            "image_alignment": 1 - as_array(evaluators.distance(pictures, squares)).mean(axis=1),
            "text_alignment": (embedded * as_array(evaluators.encode_texts(list(texts)))).sum(axis=1),
            "clip_i": identity(embedded, as_array(evaluators.encode_images(squares))),
        }
    )


def as_array(tensor: Tensor) -> NDArray[np.float64]:
    """A tensor of any device as numbers to reckon with."""
    return np.asarray(tensor.detach().cpu().double().numpy())

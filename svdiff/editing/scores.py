"""Scores of an edit: what was kept of the picture, and whether the target is what one sees."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import align
from svdiff.evaluation.evaluators import Evaluators

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdiff.editing.edits import EditedPicture


def psnr(picture: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio 10·log₁₀(255² / mean squared error) of 8-bit RGB pictures, in dB; ∞ for equal ones.

    Raises SvdiffError for pictures of different sizes.
    """
    if picture.size != reference.size:
        raise SvdiffError(f"PSNR between pictures of {picture.size} and {reference.size} pixels; expected one size")
    a, b = (np.asarray(image.convert("RGB"), np.float64) for image in (picture, reference))
    error = float(np.square(a - b).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def score_edits(edited: EditedPicture, evaluators: Evaluators) -> tuple[pd.DataFrame, dict[str, float]]:
    """Score every picture, and the whole.

    Returns:
        The table of `edited` with, for each picture, `faithfulness`, 1 − LPIPS to the input, and `edit`, the CLIP cosine
        with its prompt; and flat numbers: PSNR (dB) and faithfulness of the autoencoder alone and of the
        reconstruction; `input_edit`, what the untouched input scores with the targets; for each start
        `<start>_faithfulness` and `<start>_edit`, means over targets and seeds, and `<start>_reconstruction`, the
        faithfulness of the pictures of the training prompt.
    """
    original, table = edited.original, edited.table
    scored = align(edited.pictures, table["prompt"].tolist(), [original], evaluators)
    table = table.assign(faithfulness=scored["image_alignment"], edit=scored["text_alignment"])
    targets = table.loc[table["prompt_index"] > 0, "prompt"].unique().tolist()
    untouched = align([original] * len(targets), targets, [original], evaluators)
    training = table["prompt"].iloc[0]
    numbers = {"input_edit": float(untouched["text_alignment"].mean())}
    for name, picture in (("autoencoder", edited.autoencoded), ("reconstruction", edited.reconstruction)):
        numbers[f"{name}_psnr"] = psnr(picture, original)
        kept = align([picture], [training], [original], evaluators)
        numbers[f"{name}_faithfulness"] = float(kept["image_alignment"].iloc[0])
    for start, rows in table.groupby("start", sort=False):
        edits = rows[rows["prompt_index"] > 0]
        numbers[f"{start}_faithfulness"] = float(edits["faithfulness"].mean())
        numbers[f"{start}_edit"] = float(edits["edit"].mean())
        numbers[f"{start}_reconstruction"] = float(rows.loc[rows["prompt_index"] == 0, "faithfulness"].mean())
    return table, {name: round(number, 6) for name, number in numbers.items()}

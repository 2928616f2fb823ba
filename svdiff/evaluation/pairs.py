"""How well two identities are kept apart in one picture (Sec. 4.2).

The paper asks people whether a picture contains both subjects. Here the background is plain, so the two regions that show
something can be found; each is compared with both subjects by the instance embedding. On the scale of *likeness* the real
pictures of the first subject lie at 1 on average and those of the second at −1, whatever the embedding; a picture's
*separation* is how far its less distinct region is on its own subject's side, the regions being given to the subjects as fits
them best. So it is about 1 where both are themselves, about 0 where they are blended, and negative where both regions are
rather the same subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from svdiff.data.concepts import to_square
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES, as_array
from svdiff.evaluation.identity import both_identified, identity
from svdiff.evaluation.regions import cut_out, find_two

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from svdiff.evaluation.evaluators import Evaluators

    Array = NDArray[np.float64]

PAIR_MEASURES = (*MEASURES, "both_identified", "separation")
PER_SUBJECT = tuple(
    f"{measure}_{place}" for measure in ("identity", "image_alignment") for place in ("first", "second")
)


class Reference(NamedTuple):
    """A subject's real pictures, cut out, and their embeddings (n, d)."""

    pictures: list[Image.Image]
    identity: Array
    clip: Array


def reference(pictures: Sequence[Image.Image], evaluators: Evaluators, side: int) -> Reference:
    """Cut-outs of a subject's pictures, as sharp as a subject is that takes half of a picture of `side` pixels."""
    cut = [cut_out(to_square(picture, 4 * side), side=side, detail=side // 2) for picture in pictures]
    return Reference(cut, as_array(evaluators.encode_identity(cut)), as_array(evaluators.encode_images(cut)))


class Nearness(NamedTuple):
    """Similarities, the larger the more alike: of regions and of two subjects' real pictures."""

    first: Array  # (n, n₁) regions with pictures of the first subject
    second: Array  # (n, n₂)
    within_first: Array  # (n₁, n₁) its pictures with each other
    within_second: Array  # (n₂, n₂)
    across: Array  # (n₁, n₂) pictures of both


def likeness(near: Nearness) -> Array:
    """Which of two subjects a region is like: 1 as real pictures of the first are on average, −1 as those of the second.

    Returns:
        (n,): d(x) = s̄(x, first) − s̄(x, second), with s̄ the mean similarity, moved and scaled so that the mean of d over the
        real pictures is ±1; a real picture is not compared with itself, and a single one counts as like itself.

    Raises:
        SvdiffError: the real pictures of the two subjects cannot be told apart.
    """
    own = _mean_of_others(near.within_first), _mean_of_others(near.within_second)
    middle, half = (own[0] - own[1]) / 2, (own[0] + own[1]) / 2 - float(near.across.mean())
    if half <= 1e-6:
        raise SvdiffError(
            "the real pictures of the two subjects are as like each other as themselves to the evaluator; "
            "whether they are kept apart cannot be measured by it"
        )
    return (near.first.mean(axis=1) - near.second.mean(axis=1) - middle) / half


def _mean_of_others(similarities: Array) -> float:
    """Mean similarity of different pictures."""
    count = len(similarities)
    return float((similarities.sum() - np.trace(similarities)) / (count * (count - 1))) if count > 1 else 1.0


def separation(likenesses: tuple[float, float]) -> float:
    """How far the less distinct of two regions is on its own subject's side, in the assignment that fits best."""
    a, b = likenesses
    return max(min(a, -b), min(-a, b))


def score_regions(
    pictures: Sequence[Image.Image], subjects: tuple[Reference, Reference], evaluators: Evaluators
) -> pd.DataFrame:
    """Scores of pictures that should show two subjects.

    Returns:
        One row a picture: `regions` found (1 or 2); `likeness_first`, `likeness_second`: of the left (upper) and the other
        region; `separation`; `both_identified`, 1 where each region is more like another one of the subjects; `identity`,
        `image_alignment` (1 − LPIPS) and `clip_i`: mean over the subjects of each one's region with the subject's real
        pictures, cut-outs both; `identity_first`, `identity_second`, `image_alignment_first`, …: those of each subject.
    """
    found = [find_two(picture, side=subjects[0].pictures[0].width) for picture in pictures]
    regions = [one.first for one in found], [one.second for one in found]
    embedded = tuple(as_array(evaluators.encode_identity(region)) for region in regions)
    clip = tuple(as_array(evaluators.encode_images(region)) for region in regions)
    first, second = (subject.identity for subject in subjects)
    within = first @ first.T, second @ second.T, first @ second.T
    likenesses = [likeness(Nearness(region @ first.T, region @ second.T, *within)) for region in embedded]
    straight = likenesses[0] >= likenesses[1]  # whether the first region is the first subject
    table = pd.DataFrame({"regions": [one.found for one in found]})
    table["likeness_first"], table["likeness_second"] = likenesses
    table["separation"] = [separation(pair) for pair in zip(*likenesses, strict=True)]
    table["both_identified"] = both_identified((embedded[0], embedded[1]), (first, second)).astype(float)
    for place, (name, subject) in enumerate(zip(("first", "second"), subjects, strict=True)):
        mine = straight if place == 0 else ~straight
        near = {
            "identity": [identity(region, subject.identity) for region in embedded],
            "image_alignment": [
                1 - as_array(evaluators.distance(region, subject.pictures)).mean(axis=1) for region in regions
            ],
            "clip_i": [identity(region, subject.clip) for region in clip],
        }
        for measure, (one, other) in near.items():
            table[f"{measure}_{name}"] = np.where(mine, one, other)
    for measure in ("identity", "image_alignment", "clip_i"):
        table[measure] = table[[f"{measure}_first", f"{measure}_second"]].mean(axis=1)
    return table

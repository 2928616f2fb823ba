"""The identity score: whether a picture shows this very individual, by the cosines of an instance embedding such as DINOv2.

All functions take embeddings as arrays of unit vectors, (pictures, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from svdiff.evaluation.intervals import Interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]


TOLD_APART = 0.9


def identity(pictures: Array, concept: Array) -> Array:
    """(n,): cosine of each picture with the concept's pictures, their mean. It does not grow with the number of pictures."""
    return np.asarray((pictures @ np.atleast_2d(concept).T).mean(axis=1))


def identity_rank(pictures: Array, concept: Array, rivals: Sequence[Array]) -> NDArray[np.int_]:
    """(n,): how many of the rivals each picture is at least as like as the concept; 0: the concept is identified.

    Likeness is the cosine with the mean direction of an individual's pictures. The mean of the cosines, as `identity` has it,
    would favour whoever has the more uniform pictures.

    Args:
        pictures: (n, d).
        concept: (m, d), the concept's pictures. A picture of its own must not be among them.
        rivals: other individuals, each (k, d) or (d,); 99 of the concept's own style make a hard test.
    """
    own, *others = (pictures @ _direction(one) for one in (concept, *rivals))
    return np.asarray(sum((other >= own).astype(int) for other in others) + np.zeros(len(own), int))


def _direction(pictures: Array) -> Array:
    """(d,): the unit vector along the mean of some pictures' vectors."""
    mean = np.atleast_2d(pictures).mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def identity_top1(pictures: Array, concept: Array, rivals: Sequence[Array]) -> Flags:
    """(n,): whether each picture is more like the concept than like any of the rivals; arguments as of `identity_rank`."""
    return identity_rank(pictures, concept, rivals) == 0


def told_apart(pictures: Array, concept: Array, rivals: Sequence[Array]) -> list[Array]:
    """The rivals that can be told from the concept: beside each alone, at least 9 in 10 of `pictures` are identified.

    Individuals that differ in what hardly shows are one to anybody who looks, and no measure of likeness.

    Args:
        pictures: (n, d), real pictures of the concept, none of them among `concept`.
        concept, rivals: as of `identity_rank`.
    """
    return [rival for rival in rivals if identity_top1(pictures, concept, [rival]).mean() >= TOLD_APART]


def both_identified(regions: tuple[Array, Array], concepts: tuple[Array, Array], rivals: Sequence[Array] = ()) -> Flags:
    """(n,): whether the two regions of each picture show the two concepts, one each, whichever is where.

    Args:
        regions: (n, d) each, the two regions of n pictures.
        concepts: (m, d) each, the pictures of the two concepts.
        rivals: further individuals that a region must not be more like, see `identity_rank`.
    """
    one, other = regions
    first, second = concepts

    def shown(a: Array, b: Array) -> Flags:
        """Whether `a` is the first concept and `b` the second."""
        return identity_top1(a, first, [second, *rivals]) & identity_top1(b, second, [first, *rivals])

    return shown(one, other) | shown(other, one)


def variety(pictures: Array) -> float:
    """Spread of embeddings: 1 − the mean cosine of two different pictures. 0: all alike."""
    count = len(pictures)
    return float(1 - ((pictures @ pictures.T).sum() - np.square(pictures).sum()) / (count * (count - 1)))


def variety_kept(
    trained: Sequence[Array], base: Sequence[Array], *, resamples: int, seed: int
) -> tuple[float, float, Interval]:
    """Variety of the trained model's pictures and of the base's, and the share of the base's that is kept with its interval.

    Args:
        trained: for each prompt the embeddings of its pictures, (n, d), n at least 2.
        base: the same of the untrained base, from the same seeds.
        resamples, seed: of the bootstrap; seeds are resampled, for both models the same.
    """
    random = np.random.default_rng(seed)
    means, draws = [], []
    for pair in zip(trained, base, strict=True):
        chosen = random.integers(0, len(pair[0]), (resamples, len(pair[0])))
        means.append([variety(pictures) for pictures in pair])
        draws.append([_resampled_variety(pictures, chosen) for pictures in pair])
    spread, base_spread = np.mean(means, axis=0)
    many, base_many = np.mean(draws, axis=0)
    varied = base_many > 0
    if not varied.any():  # a base that always draws the same has nothing to lose
        return float(spread), float(base_spread), Interval(1.0, 1.0, 1.0)
    low, high = np.percentile(many[varied] / base_many[varied], [2.5, 97.5])
    return float(spread), float(base_spread), Interval(float(spread / base_spread), float(low), float(high))


def _resampled_variety(pictures: Array, chosen: NDArray[np.int_]) -> Array:
    """(resamples,): variety of each row of `chosen` pictures; a picture drawn twice makes no pair with itself."""
    cosines = pictures @ pictures.T
    np.fill_diagonal(cosines, 0)
    times = np.apply_along_axis(np.bincount, 1, chosen, minlength=len(pictures))  # how often each was drawn
    pairs = len(pictures) ** 2 - (times**2).sum(axis=1)
    return np.asarray(1 - ((times @ cosines) * times).sum(axis=1) / np.maximum(pairs, 1))

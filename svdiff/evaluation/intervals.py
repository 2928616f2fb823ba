"""Means and their bootstrap 95 % intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: NDArray[np.float64], *, resamples: int, seed: int) -> Interval:
    """Mean of `values`, (trainings, pictures), and its 95 % percentile bootstrap interval.

    Trainings are resampled, and the pictures of each: the interval covers training anew as well as drawing anew. With few
    trainings it is rough. The same arguments give the same interval.
    """
    random = np.random.default_rng(seed)
    trainings, pictures = values.shape
    rows = random.integers(0, trainings, (resamples, trainings, 1))
    means = values[rows, random.integers(0, pictures, (resamples, trainings, pictures))].mean(axis=(1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def paired_gain(trained: ArrayLike, base: ArrayLike, *, resamples: int, seed: int) -> Interval:
    """Mean of `trained − base` over pairs, with its interval (pairs are resampled).

    A pair is one prompt at one seed, sampled from both models: everything but the training is equal, so the
    interval tells what the training did from the luck of the draw. It says how far other prompts and seeds of
    this kind would move the mean for *this* delta; it does not cover training anew.
    """
    difference = np.asarray(trained, np.float64) - np.asarray(base, np.float64)
    return mean_interval(difference[None], resamples=resamples, seed=seed)

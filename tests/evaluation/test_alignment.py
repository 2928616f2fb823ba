"""Alignment against the definitions, the interval against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from evaluation_parts import drawing

from svdiff.data.concepts import to_square
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import align, without_token
from svdiff.evaluation.evaluators import Evaluators
from svdiff.evaluation.intervals import paired_gain

PICTURES = [drawing("crimson", seed=1), drawing("seagreen", "navy", seed=2), drawing("orange", seed=3)]
TEXTS = ["a dog", "a cat on a navy background", "a fox"]
TRAINING = [drawing("crimson", seed=8, side=128), drawing("maroon", seed=9, side=100)]


@pytest.mark.parametrize(
    ("prompt", "token", "expected"),
    [
        ("a sks dog on a red background", "sks", "a dog on a red background"),
        ('a poster of (sks dog), "sks dog"', "sks", 'a poster of ( dog), " dog"'),
        ("sks", "sks", ""),
        ("a sksy dog and a sks", "sks", "a sksy dog and a"),
        ("a new token cat and a new car", "new token", "a cat and a new car"),
        ("a dog", "sks", "a dog"),
    ],
)
def test_the_token_is_removed_as_a_word(prompt: str, token: str, expected: str) -> None:
    assert without_token(prompt, token) == expected


def test_scores_are_their_definitions(tiny: Evaluators) -> None:
    scores = align(PICTURES, TEXTS, TRAINING, tiny)
    squares = [to_square(picture, 64) for picture in TRAINING]
    images, texts, own = (
        e.double().numpy()
        for e in (tiny.encode_images(PICTURES), tiny.encode_texts(TEXTS), tiny.encode_images(squares))
    )

    individual, own_individual = (tiny.encode_identity(some).double().numpy() for some in (PICTURES, squares))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.sqrt((a @ a) * (b @ b)))

    for index, row in scores.iterrows():
        i = int(str(index))
        assert row["text_alignment"] == pytest.approx(cosine(images[i], texts[i]), abs=1e-6)
        assert row["clip_i"] == pytest.approx(np.mean([cosine(images[i], other) for other in own]), abs=1e-6)
        assert row["identity"] == pytest.approx(
            np.mean([cosine(individual[i], other) for other in own_individual]), abs=1e-6
        )
        distances = [float(tiny.distance([PICTURES[i]], [square])) for square in squares]
        assert row["image_alignment"] == pytest.approx(1 - np.mean(distances), abs=1e-6)


def test_a_training_picture_is_perfectly_aligned_with_itself(tiny: Evaluators) -> None:
    scores = align([PICTURES[0]], ["a dog"], [PICTURES[0]], tiny)
    assert scores["image_alignment"][0] == pytest.approx(1, abs=1e-6)
    assert scores["clip_i"][0] == pytest.approx(1, abs=1e-6)
    further = align([PICTURES[1]], ["a dog"], [PICTURES[0]], tiny)
    assert further["image_alignment"][0] < 0.999


def test_scores_do_not_depend_on_the_company(tiny: Evaluators) -> None:
    together = align(PICTURES, TEXTS, TRAINING, tiny)
    alone = align(PICTURES[1:2], TEXTS[1:2], TRAINING, tiny)
    np.testing.assert_allclose(together.iloc[1], alone.iloc[0], atol=1e-5)


def test_odd_input_is_refused(tiny: Evaluators) -> None:
    with pytest.raises(SvdiffError, match="3 pictures and 2 texts"):
        align(PICTURES, TEXTS[:2], TRAINING, tiny)
    with pytest.raises(SvdiffError, match="one square size"):
        align([PICTURES[0], drawing("red", side=32)], TEXTS[:2], TRAINING, tiny)


def test_interval_is_scipys_percentile_bootstrap() -> None:
    random = np.random.default_rng(5)
    base = random.normal(0.4, 0.1, 32)
    trained = base + random.normal(0.05, 0.08, 32)
    gain = paired_gain(trained, base, resamples=4000, seed=0)
    expected = scipy.stats.bootstrap(
        (trained - base,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert gain.mean == pytest.approx((trained - base).mean())
    assert gain.low == pytest.approx(expected.low, abs=1e-3)
    assert gain.high == pytest.approx(expected.high, abs=1e-3)
    assert gain == paired_gain(trained, base, resamples=4000, seed=0)
    assert gain != paired_gain(trained, base, resamples=4000, seed=1)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        base = random.normal(0.4, 0.2, 32)
        gain = paired_gain(base + random.normal(0.03, 0.05, 32), base, resamples=400, seed=trial)
        covered += gain.low <= 0.03 <= gain.high
    assert 0.89 <= covered / 300 <= 0.98


def test_pairing_removes_what_both_models_share() -> None:
    base = np.linspace(0, 1, 32)
    gain = paired_gain(base + 0.01, base, resamples=200, seed=0)
    np.testing.assert_allclose(gain, 0.01, atol=1e-12)

"""Stage `score` on real pictures with small evaluators."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from evaluation_parts import PROMPTS, SEEDS, TinyClip, drawing

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES
from svdiff.evaluation.score import score

pytestmark = pytest.mark.usefixtures("evaluators")


def test_files_and_numbers(checkout: Path, config: Config) -> None:
    folder = score(config, "red-dog")
    metrics = json.loads((folder / "metrics.json").read_text())
    images = pd.read_csv(folder / "images.csv")
    assert len(images) == 2 * len(PROMPTS) * len(SEEDS)
    assert metrics["pairs"] == len(PROMPTS) * len(SEEDS)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.values())
    for measure in MEASURES:
        means = images.groupby("model")[measure].mean()
        assert metrics[measure] == pytest.approx(means["trained"], abs=2e-6)
        assert metrics[f"base_{measure}"] == pytest.approx(means["base"], abs=2e-6)
    for short, measure in zip(("image", "text", "clip_i"), MEASURES, strict=True):
        assert metrics[f"{short}_gain"] == pytest.approx(metrics[measure] - metrics[f"base_{measure}"], abs=3e-6)
        assert metrics[f"{short}_gain_low"] <= metrics[f"{short}_gain"] <= metrics[f"{short}_gain_high"]
    assert json.loads((folder / "evaluators.json").read_text()) == {
        "clip": {"model": "tiny", "sha256": "0" * 64},
        "lpips": {"net": "alex", "heads": "none"},
    }
    # The trained pictures have the concept's colour, the base's do not.
    assert metrics["image_gain_low"] > 0


def test_the_same_pictures_make_the_same_files(checkout: Path, config: Config) -> None:
    folder = score(config, "red-dog")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    score(config, "red-dog")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_the_evaluator_reads_prompts_without_the_token(
    checkout: Path, config: Config, clip: TinyClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    encode = clip.encode_texts

    def remember(texts: list[str]):
        read.extend(texts)
        return encode(texts)

    monkeypatch.setattr(clip, "encode_texts", remember)
    score(config, "green-cat")
    assert set(read) == {"a cat on a blue background", "a big cat"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "images.csv").unlink(), "dvc repro sample@red-dog"),
        (lambda folder: (folder / "base/p00-s0003.png").unlink(), "base/p00-s0003.png"),
        (
            lambda folder: (folder / "images.csv").write_text(
                "\n".join((folder / "images.csv").read_text().splitlines()[:-1]) + "\n"
            ),
            "for each prompt and seed",
        ),
        (lambda folder: drawing("red", side=32).save(folder / "base/p00-s0003.png"), "one square size"),
    ],
)
def test_damaged_samples_are_refused(checkout: Path, config: Config, damage, message: str) -> None:
    damage(checkout / "out/sample/red-dog")
    with pytest.raises(SvdiffError, match=message):
        score(config, "red-dog")
    assert not (checkout / "out/score").exists() or not any((checkout / "out/score").iterdir())

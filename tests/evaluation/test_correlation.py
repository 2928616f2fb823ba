"""The correlation matrix against numpy in float64, and its stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_parts import random_delta
from PIL import Image

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.correlation import (
    correlate,
    correlation_matrix,
    mean_cosine,
    second_run_path,
    summarise,
    train_second_run,
)
from svdiff.spectral import SpectralDelta


def reference(a: SpectralDelta, b: SpectralDelta) -> float:
    cosines = []
    for name in a.tensors:
        x, y = a.tensors[name].numpy().astype(np.float64), b.tensors[name].numpy().astype(np.float64)
        cosines.append(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
    return float(np.mean(cosines))


def test_matrix_is_the_mean_of_layer_cosines() -> None:
    deltas = {name: random_delta(seed) for seed, name in enumerate(["dog", "cat", "house"])}
    matrix = correlation_matrix(deltas, {"cat": random_delta(9)})
    for row in deltas:
        for column in deltas:
            if row != column:
                assert matrix.loc[row, column] == pytest.approx(reference(deltas[row], deltas[column]), abs=1e-12)
    assert matrix.loc["cat", "cat"] == pytest.approx(reference(deltas["cat"], random_delta(9)), abs=1e-12)
    assert np.isnan(matrix.loc["dog", "dog"])
    pd.testing.assert_frame_equal(matrix, matrix.T)


def test_scale_does_not_matter_and_sign_does() -> None:
    delta = random_delta(0)
    assert mean_cosine(delta, delta * 3.0) == pytest.approx(1)
    assert mean_cosine(delta, delta * -0.1) == pytest.approx(-1)


def test_other_bases_and_disjoint_subsets_are_refused() -> None:
    with pytest.raises(SvdiffError, match="different bases"):
        mean_cosine(random_delta(0), random_delta(1, base_hash="c" * 64))
    part = SpectralDelta({"unet.z.weight": random_delta(0).tensors["unet.a.weight"]}, {"base_hash": "b" * 64})
    with pytest.raises(SvdiffError, match="no layer in common"):
        mean_cosine(random_delta(0), part)


def test_a_transformers_base_counts_as_a_unets_does() -> None:
    def named(seed: int, base: str) -> SpectralDelta:
        tensors = {f"transformer.{key.partition('.')[2]}": value for key, value in random_delta(seed).tensors.items()}
        return SpectralDelta(tensors, {"base_hash": base})

    assert -1 <= mean_cosine(named(0, "a"), named(1, "a")) <= 1
    with pytest.raises(SvdiffError, match="different bases"):
        mean_cosine(named(0, "a"), named(1, "b"))


def test_concepts_without_a_layer_in_common_have_no_cosine() -> None:
    whole = random_delta(0)
    first, *others = whole.tensors
    halves = {
        "one": SpectralDelta({first: whole.tensors[first]}, whole.metadata),
        "two": SpectralDelta({name: whole.tensors[name] for name in others}, whole.metadata),
    }
    matrix = correlation_matrix(halves)
    assert matrix.isna().all(axis=None)
    assert summarise(matrix) == {"concepts": 2}


def test_summary_names_the_extremes() -> None:
    names = ["a", "b", "c"]
    matrix = pd.DataFrame([[np.nan, 0.5, -0.2], [0.5, 0.9, 0.1], [-0.2, 0.1, np.nan]], names, names)
    assert summarise(matrix) == {
        "concepts": 3,
        "mean": pytest.approx(0.4 / 3, abs=1e-6),
        "most_similar": "a and b",
        "most_similar_cosine": 0.5,
        "least_similar": "a and c",
        "least_similar_cosine": -0.2,
        "two_runs_mean": 0.9,
    }


def test_stage(checkout: Path, config: Config) -> None:
    folder = correlate(config)
    matrix = pd.read_csv(folder / "matrix.csv", index_col="concept")
    assert list(matrix.columns) == list(matrix.index) == list(config.concepts)
    assert matrix.isna().to_numpy().diagonal().all()
    assert json.loads((folder / "summary.json").read_text())["concepts"] == 2
    assert min(Image.open(folder / "heatmap.png").size) > 300
    first = (folder / "heatmap.png").read_bytes()

    second_run = second_run_path("red-dog")
    second_run.parent.mkdir()
    random_delta(5).save(second_run)
    matrix = pd.read_csv(correlate(config) / "matrix.csv", index_col="concept")
    assert matrix.loc["red-dog", "red-dog"] == pytest.approx(reference(random_delta(0), random_delta(5)), abs=1e-6)

    second_run.unlink()
    correlate(config)
    assert (folder / "heatmap.png").read_bytes() == first, "the same matrix makes the same file"


@pytest.mark.parametrize("trained", [[], ["green-cat"]])
def test_one_concept_and_none_have_a_correlation_as_well(checkout: Path, config: Config, trained: list[str]) -> None:
    for name in {"red-dog", "green-cat"} - set(trained):
        (checkout / f"out/train/{name}/delta.safetensors").unlink()
    folder = correlate(config)
    assert json.loads((folder / "summary.json").read_text()) == {"concepts": len(trained)}
    assert list(pd.read_csv(folder / "matrix.csv", index_col="concept").index) == trained
    assert min(Image.open(folder / "heatmap.png").size) > 100


def test_the_heat_map_of_hundreds_stays_a_figure() -> None:
    names = [f"concept-{number}" for number in range(300)]
    figure = plots.heat_map(pd.DataFrame(np.eye(300), names, names), "cosine")
    assert max(figure.get_size_inches()) < 20
    assert not figure.axes[0].get_xticklabels()


def test_the_second_run_differs_by_its_rate_of_1d_weights_alone(
    checkout: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    import svdiff.training

    asked = {}
    monkeypatch.setattr(svdiff.training, "train", lambda _, name, **named: asked.update(name=name, **named))
    train_second_run(config, "red-dog")
    assert asked == {
        "name": "red-dog",
        "out_dir": second_run_path("red-dog").parent,
        "overrides": {"method": "svdiff", "lr_1d": 1e-6},
    }
    with pytest.raises(SvdiffError, match=r"'dog' in params\.yaml"):
        train_second_run(config, "dog")

"""Stage `rank` on the tiny random base: every rank is trained, kept through a kill, and shown."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from svdiff.config import BaseModelConfig, Config
from svdiff.evaluation.alignment import MEASURES
from svdiff.experiments.rank import rank
from svdiff.spectral import SpectralDelta

pytestmark = [pytest.mark.usefixtures("evaluators"), pytest.mark.slow]


@pytest.fixture
def tiny(checkout: Path, config: Config, tiny_base: Path) -> Config:
    sections = {
        "base": BaseModelConfig(model=str(tiny_base)),
        "train": config.train.model_copy(update={"prior_weight": 0.0, "lr": 0.05}),
        "sample": config.sample.model_copy(update={"steps": 2}),
    }
    return config.model_copy(update=sections)


def test_ranks_are_trained_scored_and_kept(tiny: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import svdiff.training

    trained: list[int | None] = []
    train = svdiff.training.train

    def killed_before_full(*args, **kwargs) -> Path:
        trained.append(kwargs["overrides"]["rank"])
        if kwargs["overrides"]["rank"] is None and trained.count(None) == 1:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(svdiff.training, "train", killed_before_full)
    with pytest.raises(KeyboardInterrupt):
        rank(tiny, "red-dog")
    assert not (tmp_path / "out/rank/red-dog").exists()
    folder = rank(tiny, "red-dog")
    assert trained == [1, 4, None, None], "finished ranks are not trained again"

    table = pd.read_csv(folder / "ranks.csv", dtype={"rank": str})
    assert list(table.columns) == ["rank", "prompt_kind", *MEASURES]
    assert list(table["rank"]) == ["1", "1", "4", "4", "full", "full"]
    assert set(table["prompt_kind"]) == {"reconstruction", "edit"}
    assert np.isfinite(table[list(MEASURES)]).all(axis=None)
    for name in ("strip.png", "curve.png"):
        assert min(Image.open(folder / name).size) > 200

    deltas = {}
    for path in (tmp_path / "scratch/experiments").rglob("delta.safetensors"):
        limit = json.loads(path.with_name("train.json").read_text())["config"]["rank"]
        deltas[limit] = SpectralDelta.load(path)
    assert set(deltas) == {1, 4, None}
    norms = deltas[1].norms
    for name, shifts in deltas[1].tensors.items():
        if name not in norms:
            assert not shifts[1:].any(), f"{name} is not limited to rank 1"
    assert any(shifts[4:].any() for name, shifts in deltas[None].tensors.items() if name not in norms)
    assert not list((tmp_path / "scratch").rglob("state.pt")), "no resume state of what is finished"


def test_what_is_kept_is_not_taken_for_something_else(tiny: Config, tmp_path: Path) -> None:
    tiny = tiny.model_copy(update={"rank": tiny.rank.model_copy(update={"ranks": [1]})})
    first = pd.read_csv(rank(tiny, "red-dog") / "ranks.csv")
    changed = tiny.model_copy(update={"train": tiny.train.model_copy(update={"lr": 0.2})})
    second = pd.read_csv(rank(changed, "red-dog") / "ranks.csv")
    assert not np.allclose(first["image_alignment"], second["image_alignment"], atol=1e-6)
    assert len(list((tmp_path / "scratch/experiments/trained").iterdir())) == 4


def test_a_concept_that_the_pipeline_does_not_analyse_leaves_the_pipeline_alone(tiny: Config, tmp_path: Path) -> None:
    tiny = tiny.model_copy(update={"rank": tiny.rank.model_copy(update={"ranks": []})})
    assert rank(tiny, "green-cat") == Path("pictures/rank-green-cat")
    assert not (tmp_path / "out/rank").exists()

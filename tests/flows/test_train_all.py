"""`train-all` with the real trainer on the embedded base: what is due trains as one batch, and each stage finds it finished."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from miniature import DVC_YAML, make_dvc_project, registered, write_params

from flows.orchestration import tasks
from flows.orchestration.train import train_all
from flows.pipeline.stages import train_together

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
BASE = Path(__file__).parents[2] / "models/base"
NAMES = ["dog", "dog2", "dog3"]


class Group:
    """What was trained as a batch, and how far each was when that ended."""

    def __init__(self, root: Path) -> None:
        self.root, self.names = root, list[str]()
        self.rows, self.times = dict[Path, list[dict[str, float]]](), dict[Path, int]()

    def states(self) -> list[Path]:
        return sorted((self.root / ".svdiff").rglob("state.pt"))

    def train(self, names: Sequence[str], **arguments: Any) -> None:
        self.names += names
        try:
            train_together(names, **arguments)
        finally:
            self.rows = {path: torch.load(path, weights_only=True)["rows"] for path in self.states()}
            self.times = {path: path.stat().st_mtime_ns for path in self.rows}


@pytest.fixture
def group(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Group:
    """Three concepts of the embedded base; `train` is the real stage, what comes after it a miniature."""
    root = make_dvc_project(tmp_path / "project", *NAMES)
    write_settings(root)
    (root / "dvc.yaml").write_text(
        DVC_YAML.replace("python stage.py train ${key}", "python -m svdiff.cli train ${key}")
    )
    (root / "mlruns").mkdir()
    (root / "mlruns/mlflow.db").write_bytes(empty_store)
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    made = Group(root)
    monkeypatch.setattr(tasks, "train_together", made.train)
    return made


def write_settings(root: Path, **own: dict[str, Any]) -> None:
    settings = {"steps": 4, "batch_size": 1, "prior_weight": 0.0, "save_every": 1, "validate_every": 4}
    concepts = {name: {"class_word": "dog", "token": "sks", **own.get(name, {})} for name in NAMES}
    train = settings | {"validation_prompts": ["a {subject}"], "validation_seeds": [0]}
    sample = {"prompts": ["a {subject}"], "steps": 2}
    tracking = {"live": "none"}
    write_params(
        root, *NAMES, base={"model": str(BASE)}, concepts=concepts, train=train, sample=sample, tracking=tracking
    )


def curve(root: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(root / f"out/train/{name}/curve.csv")


def test_each_stage_finds_its_training_finished(group: Group) -> None:
    train_all(analyses=False)
    assert group.names == NAMES
    assert [len(rows) for rows in group.rows.values()] == [4] * 3
    assert all(path.stat().st_mtime_ns == group.times[path] for path in group.rows)  # nothing was trained again
    trained = [pd.DataFrame(rows) for rows in group.rows.values()]
    for name in NAMES:
        now = curve(group.root, name)
        assert any(rows.equals(now[list(rows)]) for rows in trained)
        assert registered(group.root, name) == [1]

    group.names.clear()
    train_all(analyses=False)
    assert group.names == []


def test_one_that_cannot_be_trained_leaves_the_others(group: Group) -> None:
    write_settings(group.root, dog3={"train": {"prior_weight": 1.0}})  # and there are no prior images
    with pytest.raises(RuntimeError) as caught:
        train_all(analyses=False)
    assert "dog3 failed" in str(caught.value)
    assert "prior images" in str(caught.value)
    assert "dog failed" not in str(caught.value)
    assert "dog2 failed" not in str(caught.value)
    assert [registered(group.root, name) for name in NAMES] == [[1], [1], []]

"""The experiment on the tiny base: every cell once, kept through a kill, and the tables and figures at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from editing_parts import Checkout
from PIL import Image

import svdiff.training
from svdiff.base.scenes import scene_edits
from svdiff.base.world import World
from svdiff.config import load_config
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.experiments import cells as experiments
from svdiff.experiments.edits import MEASURES, edit_curves, summarise


@pytest.mark.slow
def test_cells_are_made_once_and_summed_up(checkout: Checkout, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []
    train = svdiff.training.train

    def killed_once(*args, **kwargs) -> Path:
        overrides = kwargs["overrides"]
        trained.append((overrides["method"], overrides["steps"]))
        if trained[-1] == ("full", 1) and trained.count(("full", 1)) == 1:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(svdiff.training, "train", killed_once)
    monkeypatch.setattr(experiments, "SMALL", 0)
    config = load_config()
    # In words that the tiny base knows.
    words = {"prompt": "a cat on a blue background", "target": "a cat on a red background"}
    edits = [edit.known(world)._replace(**words) for edit in scene_edits(world)]
    asked: dict[str, Any] = {"names": ["cat-background"], "methods": ["svdiff", "full"], "lengths": [1, 2]}
    with pytest.raises(KeyboardInterrupt):
        edit_curves(config, edits, **asked, output=Path("curves"))
    assert not Path("curves").exists()
    folder = edit_curves(config, edits, **asked, output=Path("curves"))
    assert trained == [("svdiff", 1), ("svdiff", 2), ("full", 1), ("full", 1), ("full", 2)]

    assert not list(Path("scratch").rglob("delta.safetensors")), "of large deltas only pictures and scores stay"
    assert not list(Path("scratch").rglob("state.pt"))

    cells = pd.read_csv(folder / "cells.csv")
    assert len(cells) == 3 * (1 + 2 * 2)  # starts, of the base and of each method and length
    assert np.isfinite(cells[MEASURES]).all(axis=None)
    noise = cells[cells["start"] == "noise"].set_index(["method", "steps"])
    assert noise.loc[("svdiff", 2), "edit"] != noise.loc[("base", 0), "edit"]
    curves = pd.read_csv(folder / "curves.csv")
    assert (curves["edits"] == 1).all()
    for name in ("curves.png", "pictures.png"):
        assert min(Image.open(folder / name).size) > 200

    with pytest.raises(SvdiffError, match=r"no edit 'fly'.*plant-to-the-left"):
        edit_curves(config, edits, names=["fly"], output=Path("curves"))
    with pytest.raises(SvdiffError, match="no method 'svd'"):
        edit_curves(config, edits, methods=["svd"], output=Path("curves"))
    with pytest.raises(SvdiffError, match="steps"):
        edit_curves(config, edits, lengths=[0], output=Path("curves"))


def test_means_keep_small_and_structural_edits_apart() -> None:
    rows = [
        {"structural": structural, "start": "noise", "method": "svdiff", "steps": 50} | dict.fromkeys(MEASURES, value)
        for structural, value in ((False, 0.25), (False, 0.75), (True, 1.0))
    ]
    base = [row | {"method": "base", "steps": 0} for row in rows]
    curves = summarise(pd.DataFrame([*base, *rows])).set_index(["structural", "method"])
    assert curves.loc[(False, "svdiff"), ["edit", "edits"]].tolist() == [0.5, 2]
    assert curves.loc[(True, "svdiff"), ["edit", "edits"]].tolist() == [1.0, 1]
    figure = plots.edit_curves(curves.reset_index())
    assert len(figure.axes) == 2
    assert {"base", "svdiff"} <= {text.get_text() for text in figure.axes[0].get_legend().get_texts()}

"""An ablation on the tiny base, its statistics, and trainings that experiments share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_parts import PLAIN
from PIL import Image

from svdiff.config import BaseModelConfig, Config
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES
from svdiff.experiments import cells
from svdiff.experiments.ablation import ablation, gains
from svdiff.experiments.rank import rank
from svdiff.sampling.images import Job


@pytest.fixture
def tiny(checkout: Path, config: Config, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(cells, "load_evaluators", lambda _: PLAIN)
    sections = {
        "base": BaseModelConfig(model=str(tiny_base)),
        "train": config.train.model_copy(update={"prior_weight": 0.0, "lr": 0.05, "steps": 2}),
        "sample": config.sample.model_copy(update={"steps": 2, "prompts": ["a {subject}", "a big {subject}"]}),
        "rank": config.rank.model_copy(update={"ranks": [1], "steps": 2}),
    }
    return config.model_copy(update=sections)


@pytest.mark.slow
def test_experiments_share_what_they_train(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    import svdiff.training

    trained: list[int | None] = []
    train = svdiff.training.train

    def watched(*args, **named) -> Path:
        trained.append(named["overrides"].get("rank"))
        return train(*args, **named)

    monkeypatch.setattr(svdiff.training, "train", watched)
    folder = ablation(tiny, "red-dog", "rank", [1, None], output=Path("ablated"))
    assert trained == [1, None]
    rank(tiny, "red-dog")
    assert trained == [1, None], "the rank analysis has the same two trainings"
    table = pd.read_csv(folder / "gains.csv", dtype={"value": str}, keep_default_na=False)
    assert list(table["value"].unique()) == ["1", "None"]
    assert list(table["measure"].unique()) == list(MEASURES)
    assert np.isfinite(table[["mean", "gain", "low", "high"]]).all(axis=None)
    assert len(pd.read_csv(folder / "pictures.csv")) == 3 * 2 * len(tiny.sample.seeds)
    assert min(Image.open(folder / "strip.png").size) > 200


@pytest.mark.slow
def test_every_cell_draws_with_its_own_training(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [Job("a sks dog", 0)]
    made = [cells.Cell({"seed": seed}, tiny, "red-dog", {"seed": seed}, jobs) for seed in (1, 2)]
    made += [cells.Cell({"seed": None}, tiny, "red-dog", None, jobs)]

    def pictures(*of: cells.Cell) -> list[bytes]:
        return [Path(path).read_bytes() for path in cells.Runner(tiny).run(of, scored=False)["path"]]

    together = pictures(*made)
    monkeypatch.setenv("SVDIFF_HOME", "another-scratch")
    assert together == [picture for cell in made for picture in pictures(cell)]
    assert len(set(together)) == 3


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [("lrr", [1.0], "lrr"), ("steps", [5, -1], "steps"), ("method", ["dreambooth"], "method")],
)
def test_what_is_impossible_is_refused_before_the_first_training(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, key: str, values: list, words: str
) -> None:
    import svdiff.training

    monkeypatch.setattr(svdiff.training, "train", lambda *_, **__: pytest.fail("work has begun"))
    monkeypatch.setattr(cells, "load_pipeline", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SvdiffError, match=words):
        ablation(tiny, "red-dog", key, values, output=Path("ablated"))
    assert not Path("ablated").exists()


def test_gains_are_paired_by_prompt_and_seed(config: Config) -> None:
    random = np.random.default_rng(0)
    rows = [
        {"value": value, "prompt": prompt, "seed": seed, "identity": noise + gain}
        for prompt in ("a", "b")
        for seed in range(4)
        for noise in [random.standard_normal()]
        for value, gain in (("base", 0.0), ("1", 0.25))
    ]
    shuffled = pd.DataFrame(rows).sample(frac=1, random_state=0)
    [found] = gains(config, shuffled, ["identity"]).to_dict("records")
    assert (found["gain"], found["low"], found["high"]) == pytest.approx((0.25, 0.25, 0.25))

"""The comparison of ways to train a pair: on the tiny base in full, and its statistics against known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from evaluation_parts import PLAIN, drawing

from svdiff.config import load_config
from svdiff.errors import SvdiffError
from svdiff.evaluation.intervals import mean_interval
from svdiff.evaluation.pairs import PAIR_MEASURES
from svdiff.experiments import cells
from svdiff.experiments.pairs import WAYS, compare_pairs, summarise


@pytest.fixture
def pair_checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two concepts, prior images and the tiny base, in which trainings take two steps."""
    for name, word, colour in (("red", "dog", "crimson"), ("green", "cat", "seagreen")):
        for folder, count in ((f"data/concepts/{name}", 3), (f"out/prior/{word}", 3)):
            (tmp_path / folder).mkdir(parents=True)
            for seed in range(count):
                drawing(colour, seed=seed).save(tmp_path / folder / f"{seed:03d}.png")
    params = {
        "base": {"model": str(tiny_base)},
        "classes": ["dog", "cat"],
        "concepts": {"red": {"class_word": "dog"}, "green": {"class_word": "cat", "token": "zwx"}},
        "pairs": {"both": {"concepts": ["red", "green"]}},
        "mix": {"mixes": 4, "methods": {"full": {"lr": 0.001}}},
        "evaluators": {
            "clip_model": "tiny",
            "clip_pretrained": "random",
            "identity_model": None,
            "lpips_weights": None,
        },
        "train": {"steps": 2, "lr": 0.1, "validation_seeds": [0]},
        "sample": {"prompts": ["a {subject}"], "steps": 2},
        "score": {"bootstrap": 200},
        "rank": {"concepts": ["red"]},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    monkeypatch.setattr(cells, "load_evaluators", lambda _: PLAIN)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("evaluators")
def test_every_cell_is_made_once_and_kept(pair_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import svdiff.training

    config, trained = load_config(), []
    train = svdiff.training.train

    def watched(*arguments, **named):
        if len(trained) == 3:
            trained.append("killed")
            raise KeyboardInterrupt
        trained.append(named["overrides"])
        return train(*arguments, **named)

    monkeypatch.setattr(svdiff.training, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        compare_pairs(config, seeds=1, pictures=3, output=Path("result"))
    assert not Path("result").exists()
    compare_pairs(config, seeds=1, pictures=3, output=Path("result"))
    assert len(trained) == 1 + 6  # the six cells, none of them twice, and the one that was killed
    table, pictures = pd.read_csv("result/table.csv", keep_default_na=False), pd.read_csv("result/pictures.csv")
    assert len(pictures) == 3 * (1 + 6)
    assert set(pictures["way"]) == {"base", *WAYS}
    means = table[table["against"] == ""]
    assert len(means) == 7 * len(PAIR_MEASURES)
    assert set(table["against"]) == {"", "full without", *(f"svdiff {way}" for way in WAYS)}
    assert (table["low"] <= table["high"]).all()
    own = pictures[(pictures["method"] == "full") & (pictures["way"] == "unmix")]["separation"].mean()
    said = means[(means["method"] == "full") & (means["way"] == "unmix") & (means["measure"] == "separation")]["mean"]
    assert said.item() == pytest.approx(own, abs=1e-5)
    assert Path("result/sheet.png").is_file()
    assert "cut-mix-unmix" in Path("result/table.md").read_text()

    # More pictures of the same trainings train nothing; another seed trains that seed alone.
    compare_pairs(config, seeds=1, pictures=4, output=Path("more"))
    assert len(trained) == 7
    compare_pairs(config, methods=["svdiff"], ways=["without"], seeds=2, pictures=3, output=Path("seeds"))
    assert len(trained) == 8
    assert trained[-1]["seed"] == 1


def test_what_is_impossible_is_refused_before_any_work(pair_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "load_pipeline", lambda *_: pytest.fail("work has begun"))
    config = load_config()
    with pytest.raises(SvdiffError, match="no way of training 'cutmix'"):
        compare_pairs(config, ways=["cutmix"], output=Path("result"))
    with pytest.raises(SvdiffError, match="expected a pair"):
        compare_pairs(config, ["red"], output=Path("result"))
    with pytest.raises(SvdiffError, match="unmix_weight"):
        compare_pairs(config, unmix_weight=-1, output=Path("result"))
    with pytest.raises(SvdiffError, match=r"train\.method"):
        compare_pairs(config, methods=["dreambooth"], output=Path("result"))


def test_intervals_cover_the_truth_when_trainings_differ() -> None:
    """95 % intervals of 12 trainings × 20 pictures hold the true mean about so often; pictures alone would not do."""
    random, covered, naive = np.random.default_rng(3), 0, 0
    for trial in range(200):
        values = 0.5 * random.standard_normal((12, 1)) + 0.2 * random.standard_normal((12, 20)) + 1.0
        found = mean_interval(values, resamples=300, seed=trial)
        covered += found.low <= 1.0 <= found.high
        pooled = mean_interval(values.reshape(1, -1), resamples=300, seed=trial)
        naive += pooled.low <= 1.0 <= pooled.high
    assert covered / 200 > 0.85
    assert naive / 200 < 0.6


def test_differences_are_taken_picture_by_picture() -> None:
    """A constant gain over noisy pictures has an interval of no width."""
    random = np.random.default_rng(0)
    noise = {(seed, picture): random.standard_normal() for seed in range(2) for picture in range(5)}
    gains = {("svdiff", "without"): 0.0, ("svdiff", "cut-mix-unmix"): 0.25, ("full", "without"): -0.5}
    table = pd.DataFrame(
        [
            {"pair": "both", "method": method, "way": way, "training": seed, "picture": picture}
            | dict.fromkeys(PAIR_MEASURES, value + gain)
            for (method, way), gain in gains.items()
            for (seed, picture), value in noise.items()
        ]
    )
    results = summarise(table, ["without", "cut-mix-unmix"], resamples=200, seed=0)
    rows = results.set_index(["method", "way", "against", "measure"])
    gain = rows.loc[("svdiff", "cut-mix-unmix", "svdiff without", "separation")]
    assert (gain["mean"], gain["low"], gain["high"]) == pytest.approx((0.25, 0.25, 0.25))
    assert rows.loc[("full", "without", "svdiff without", "both_identified")]["mean"] == pytest.approx(-0.5)
    assert ("svdiff", "without", "full without", "apart") not in rows.index  # the same the other way round
    mean = rows.loc[("svdiff", "without", "", "separation")]
    assert mean["low"] < mean["mean"] < mean["high"]
    assert (mean["trainings"], mean["pictures"]) == (2, 5)

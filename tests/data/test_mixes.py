"""The dataset of a pair: what is written is what is read, the same every time, with regions that fit the pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from svdiff.config import load_config
from svdiff.data.mixes import load_mixes, make_mixes, mix_folder
from svdiff.errors import SvdiffError
from svdiff.files import sha256_tree

COLOURS = {"red-dog": (200, 30, 30), "blue-cat": (30, 30, 200), "green-panda": (30, 160, 30)}
CLASSES = {"red-dog": "dog", "blue-cat": "cat", "green-panda": "panda"}
TOKENS = {"red-dog": "sks", "blue-cat": "zwx", "green-panda": "house"}


def plain(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 40), colour).save(path)


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Concepts of one colour each, prior images of a paler one, and the tiny base (pictures of 16 pixels)."""
    for name, colour in COLOURS.items():
        for i in range(3):
            plain(tmp_path / "data/concepts" / name / f"{i}.png", colour)
        for i in range(4):
            pale = tuple(min(255, channel + 50) for channel in colour)
            plain(tmp_path / "out/prior" / CLASSES[name] / f"{i:03d}.png", pale)  # type: ignore[arg-type]
    params = {
        "base": {"model": str(tiny_base)},
        "classes": list(CLASSES.values()),
        "concepts": {name: {"class_word": CLASSES[name], "token": TOKENS[name]} for name in COLOURS},
        "pairs": {"two": {"concepts": ["red-dog", "blue-cat"]}, "three": {"concepts": list(COLOURS)}},
        "mix": {"mixes": 30, "layouts": ["left-right", "up-down"], "split": "random"},
        "sample": {"prompts": ["a {subject}"]},
        "rank": {"concepts": ["red-dog"]},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mixes_need_no_counterparts_of_prior_images(checkout: Path) -> None:
    params = yaml.safe_load((checkout / "params.yaml").read_text())
    (checkout / "params.yaml").write_text(yaml.safe_dump(params | {"mix": {"mixes": 6, "mix_priors": False}}))
    config = load_config()
    folder = make_mixes(config, "two")
    assert "prior_file" not in pd.read_csv(folder / "mixes.csv").columns
    assert not list(folder.glob("mixes/*-prior.png"))
    assert [mix.prior_image for mix in load_mixes(config.entry("two")).mixes] == [None] * 6


@pytest.mark.parametrize("pair", ["two", "three"])
def test_regions_show_the_subjects_that_the_prompt_names(checkout: Path, pair: str) -> None:
    config = load_config()
    folder = make_mixes(config, pair)
    assert folder == mix_folder(pair)
    dataset = load_mixes(config.entry(pair))
    assert len(dataset.mixes) == 30
    seen = set()
    for mix in dataset.mixes:
        assert mix.image.size == mix.prior_image.size == (16, 16)
        assert len(mix.regions) == 2
        for name, region in mix.regions.items():
            left, top, right, bottom = region.pixels(16, 16)
            inside = np.asarray(mix.image)[top:bottom, left:right].reshape(-1, 3)
            assert (inside == COLOURS[name]).all()
            prior = np.asarray(mix.prior_image)[top:bottom, left:right].reshape(-1, 3)
            assert (prior == [min(255, channel + 50) for channel in COLOURS[name]]).all()
            assert f"{TOKENS[name]} {CLASSES[name]}" in mix.prompt
            assert TOKENS[name] not in mix.prior_prompt
            assert CLASSES[name] in mix.prior_prompt
        seen.add(tuple(mix.regions))
        first, second = mix.regions
        if "on the left" in mix.prompt:
            on_left, on_right = (CLASSES[first], CLASSES[second])
            assert mix.prompt.index(f"{on_left} on the left") >= 0
            assert mix.prompt.index(f"{on_right} on the right") >= 0
            assert mix.regions[first].left == 0
            assert mix.regions[second].right == 1
    subjects = len(config.pairs[pair].concepts)
    assert len(seen) == subjects * (subjects - 1)  # every two, in both orders


def test_the_folder_can_be_browsed_and_is_the_same_every_time(checkout: Path) -> None:
    config = load_config()
    first = sha256_tree(make_mixes(config, "two"))
    assert sha256_tree(make_mixes(config, "two")) == first
    folder = mix_folder("two")
    table = pd.read_csv(folder / "mixes.csv")
    assert {"file", "prior_file", "prompt", "prior_prompt", "first", "second", "layout", "split"} == set(table.columns)
    assert all((folder / file).is_file() for file in [*table["file"], *table["prior_file"]])
    assert len(list((folder / "singles/red-dog").glob("*.png"))) == 3
    assert len(list((folder / "priors/blue-cat").glob("*.png"))) == 4
    assert Image.open(folder / "sheet.png").width > 6 * 128


def test_what_does_not_fit_is_refused(checkout: Path) -> None:
    config = load_config()
    with pytest.raises(SvdiffError, match="svdiff mix two"):
        load_mixes(config.entry("two"))
    with pytest.raises(SvdiffError, match=r"'red-dog' is a concept; expected a pair.*three, two"):
        make_mixes(config, "red-dog")
    make_mixes(config, "three")
    mix_folder("three").rename(mix_folder("two"))
    with pytest.raises(SvdiffError, match=r"mixes of .*green-panda"):
        load_mixes(config.entry("two"))
    (checkout / "out/prior/cat").rename(checkout / "out/prior/elsewhere")
    with pytest.raises(SvdiffError, match="svdiff prior cat"):
        make_mixes(config, "two")

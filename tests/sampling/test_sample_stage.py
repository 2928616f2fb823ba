"""Stage `sample`: negative prompts by default and by hand, and pairs."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from svdiff.config import Config, SampleConfig
from svdiff.errors import SvdiffError
from svdiff.sampling import Job, sample_images
from svdiff.sampling.guidance import sample_guided
from svdiff.sampling.stage import Switch, default_negatives, delta_path, draw_pictures, personalise_with, sample_entry
from svdiff.spectral import SpectralDelta, attach, load_basis, weights_hash
from svdiff.training.methods import apply_method

JOBS = [Job("a sks dog beside a zwx cat", 0), Job("a cat", 1)]
CONFIG = {
    "classes": ["dog", "cat", "panda"],
    "concepts": {
        "one": {"class_word": "dog", "token": "sks"},
        "two": {"class_word": "cat", "token": "zwx"},
        "three": {"class_word": "panda", "token": "house"},
    },
    "pairs": {"both": {"concepts": ["one", "two"]}, "all": {"concepts": ["one", "two", "three"]}},
    "prior": {"prompt": "a photo of a {subject}"},
    "sample": {"prompts": ["a {subject}"], "seeds": [0, 1], "steps": 2, "drift_pictures": 3},
    "rank": {"concepts": ["one"]},
}


def test_the_prior_prompts_are_the_default_negatives() -> None:
    config = Config.model_validate(CONFIG)
    assert default_negatives(config, config.entry("one")) == ["a photo of a dog"]
    assert default_negatives(config, config.entry("both")) == [
        "a photo of a dog on the left and a cat on the right",
        "a photo of a cat on the right and a dog on the left",
        "a photo of a dog and a cat",
        "a photo of a cat and a dog",
    ]
    assert len(default_negatives(config, config.entry("all"))) == 12


def test_the_default_negatives_follow_the_layouts_that_a_pair_was_trained_on() -> None:
    config = Config.model_validate(CONFIG | {"mix": {"layouts": ["up-down", "left-right"]}})
    assert default_negatives(config, config.entry("both")) == [
        "a photo of a dog above a cat",
        "a photo of a cat below a dog",
        "a photo of a dog and a cat",
        "a photo of a cat and a dog",
        "a photo of a dog on the left and a cat on the right",
        "a photo of a cat on the right and a dog on the left",
    ]


def test_a_pair_of_one_class_has_each_prompt_once() -> None:
    twins = {"concepts": {"one": {"class_word": "dog"}, "two": {"class_word": "dog", "token": "zwx"}}}
    config = Config.model_validate(CONFIG | twins | {"pairs": {"both": {"concepts": ["one", "two"]}}})
    entry = config.entry("both")
    assert entry.class_prompts("a {subject}") == ["a dog"]
    assert len(default_negatives(config, entry)) == 3


def test_beta_1_is_plain_guidance_whatever_the_negatives(tiny_pipe) -> None:
    plain = sample_images(tiny_pipe, JOBS, steps=2, guidance=3.0)
    settings = SampleConfig(prompts=["a"], steps=2)
    drawn = draw_pictures(tiny_pipe, JOBS, settings, ["a dog", "a cat"])
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in plain]


def test_beta_below_1_takes_the_negatives_of_the_settings_else_the_default(tiny_pipe) -> None:
    for own, default, used in ((["a cat"], ["a dog"], ["a cat"]), ([], ["a dog", "a cat"], ["a dog", "a cat"])):
        settings = SampleConfig(prompts=["a"], steps=2, beta=0.4, negatives=own)
        drawn = draw_pictures(tiny_pipe, JOBS, settings, default)
        expected = sample_guided(tiny_pipe, JOBS, steps=2, guidance=3.0, beta=0.4, negatives=used)
        assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]
    with pytest.raises(SvdiffError, match="negative prompts"):
        draw_pictures(tiny_pipe, JOBS, SampleConfig(prompts=["a"], steps=2, beta=0.4))


def test_pictures_of_a_pair(tiny_pipe, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    config = Config.model_validate(CONFIG | {"base": {"model": str(tiny_base)}})
    shifts = attach(tiny_pipe.unet, load_basis(tiny_pipe.unet, tmp_path / "scratch/bases"))
    shifts.delta().map(lambda _, v: v + 0.5).save(delta_path("all"))
    shifts.detach()
    folder = sample_entry(config, "all")
    table = pd.read_csv(folder / "images.csv")
    prompts = 3 * len(config.mix.prompts)  # every two of three subjects
    assert len(table) == 2 * 2 * prompts
    assert "a sks dog beside a house panda" in set(table["prompt"])
    assert all((folder / file).is_file() for file in table["file"])
    base = sample_images(tiny_pipe, [Job(table["prompt"][0], 0)], steps=2, guidance=3.0)[0]
    of_base = table[(table["model"] == "base") & (table["prompt_index"] == 0) & (table["seed"] == 0)]["file"].item()
    drift = pd.read_csv(folder / "drift/images.csv")
    assert set(drift["prompt"]) == {f"a photo of a {word}" for word in ("dog", "cat", "panda")}
    assert len(drift) == 2 * 3 * 3
    assert all((folder / "drift" / file).is_file() for file in drift["file"])
    untouched = np.asarray(Image.open(folder / of_base), np.int16)
    assert np.abs(untouched - np.asarray(base)).max() <= 1  # drawn in another batch
    trained = (folder / of_base.replace("base/", "trained/")).read_bytes()
    assert trained != (folder / of_base).read_bytes()


def test_shifts_and_weights_do_not_add_up(tiny_pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svdiff.config import TrainConfig

    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    for name in ("svdiff", "full"):
        method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
        method.save(tmp_path / f"{name}.safetensors", {})
        method.detach()
    with pytest.raises(SvdiffError, match=r"full\.safetensors changes weights"):
        personalise_with(tiny_pipe, [(tmp_path / f"{name}.safetensors", 1.0) for name in ("svdiff", "full")])


def test_deltas_of_the_same_weights_are_switched_on_layers_attached_once(
    tiny_pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    plain, basis = weights_hash(tiny_pipe.unet), load_basis(tiny_pipe.unet, tmp_path / "scratch/bases", progress=False)

    def delta(subset: str, value: float) -> SpectralDelta:
        shifts = attach(tiny_pipe.unet, basis, subset=subset)
        zero = shifts.delta()
        shifts.detach()
        return zero.map(lambda _, v: v + value)

    columns = [
        [(delta("UNet", 0.5), 1.0)],
        [(delta("UNet", -0.3), 1.0)],
        [(delta("UNet", 0.5), 0.5), (delta("UNet", -0.3), 0.5)],
        [(delta("UNet-CA", 0.4), 1.0)],
        [(delta("UNet", 0.5), 1.0)],
    ]

    def draw() -> list[bytes]:
        return [image.tobytes() for image in sample_images(tiny_pipe, JOBS, steps=2, guidance=3.0)]

    expected = []
    for parts in columns:
        personal = personalise_with(tiny_pipe, parts)
        expected.append(draw())
        personal.unload()
    asked: list[str] = []
    for what, where in (
        ("hashed", "svdiff.spectral.cache.weights_hash"),
        ("attached", "svdiff.spectral.pipeline.SpectralShifts"),
    ):
        original = resolve_name(where.replace("cache.", "cache:").replace("pipeline.", "pipeline:"))
        monkeypatch.setattr(
            where, lambda *a, what=what, original=original, **k: asked.append(what) or original(*a, **k)
        )
    switch, seen = Switch(tiny_pipe), []
    for parts in columns:
        with switch.on(parts):
            seen.append(draw())
    assert seen == expected
    assert len({tuple(pictures) for pictures in expected}) == 4
    assert asked == ["hashed", "attached"] * 3  # for the first three at once, and for each of the others
    switch.off()
    assert weights_hash(tiny_pipe.unet) == plain


def test_a_delta_that_cannot_be_switched_to_leaves_the_base_as_it_was(
    tiny_pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    shifts = attach(tiny_pipe.unet, load_basis(tiny_pipe.unet, None, progress=False))
    good = shifts.delta()
    shifts.detach()
    stranger = SpectralDelta(good.tensors, dict(good.metadata) | {"base_hash": "0" * 64})
    before, switch = sample_images(tiny_pipe, JOBS, steps=2, guidance=3.0), Switch(tiny_pipe)
    with pytest.raises(SvdiffError, match="trained on a unet with weights 0000"), switch.on([(stranger, 1.0)]):
        pytest.fail("the block must not run")
    with pytest.raises(SvdiffError, match="not found"), switch.on([(tmp_path / "no.safetensors", 1.0)]):
        pytest.fail("the block must not run")
    switch.off()
    after = sample_images(tiny_pipe, JOBS, steps=2, guidance=3.0)
    assert [image.tobytes() for image in before] == [image.tobytes() for image in after]

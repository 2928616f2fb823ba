"""The whole `train` stage on a checkout with the tiny base: refusals before work, results, and death at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdiff.config import load_config
from svdiff.data.grid import image_grid
from svdiff.errors import SvdiffError
from svdiff.models import family_of, load_pipeline
from svdiff.sampling.images import Job
from svdiff.sampling.stage import draw_pictures as draw
from svdiff.sampling.stage import sample_entry
from svdiff.sampling.weights_delta import is_weights_delta
from svdiff.training import train
from svdiff.training.datasets import read_training_data
from svdiff.training.loop import Trainer
from svdiff.training.resume import is_finite, load_state

STAGE = import_module("svdiff.training.stage")  # the package's attribute of this name is the function
RUN = import_module("svdiff.training.run")
METHODS = ("svdiff", "full", "lora", "custom-diffusion")
METHODS_SLOWLY = [pytest.param(m, marks=() if m == "svdiff" else pytest.mark.slow) for m in METHODS]


def draw_pictures(folder: Path, count: int, colour: str) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        image = Image.new("RGB", (40, 40), "white")
        ImageDraw.Draw(image).ellipse((6 + i, 8, 30 + i, 34), fill=colour)
        image.save(folder / f"{i:03d}.png")


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one concept, its prior images and the tiny base; the current folder of the test."""
    draw_pictures(tmp_path / "data/concepts/pet", 3, "brown")
    draw_pictures(tmp_path / "out/prior/dog", 4, "grey")
    write_params(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    return tmp_path


def write_params(folder: Path, base: Path, token: str = "sks", **settings: object) -> None:
    defaults = {"steps": 4, "lr": 1e-2, "lr_1d": 1e-3, "save_every": 2, "validate_every": 2, "validation_seeds": [0]}
    params = {
        "base": {"model": str(base)},
        "classes": ["dog"],
        "concepts": {"pet": {"class_word": "dog", "token": token}},
        "train": defaults | settings,
        "sample": {"prompts": ["a {subject}"], "steps": 2, "eta": 1.0},
        "rank": {"concepts": ["pet"]},
        "tracking": {"live": "none"},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("method", METHODS_SLOWLY)
def test_result_of_the_stage(checkout: Path, method: str) -> None:
    path = train(load_config(), "pet", overrides={"method": method})
    assert path == Path("out/train/pet/delta.safetensors")
    assert is_weights_delta(path) == (method != "svdiff")
    curve = pd.read_csv(path.parent / "curve.csv")
    assert list(curve["step"]) == [1, 2, 3, 4]
    assert {"loss", "loss_instance", "loss_prior", "lr", "seconds", "fixed_noise_loss"} <= set(curve.columns)
    assert (curve["loss"] - curve["loss_instance"] - curve["loss_prior"]).abs().max() < 1e-5
    assert [p.name for p in sorted((path.parent / "validation").glob("*.png"))] == [
        f"step-{step:05d}.png" for step in (0, 2, 4)
    ]
    summary = json.loads((path.parent / "train.json").read_text())
    assert summary["steps"] == 4
    assert summary["config"]["method"] == method


@pytest.mark.usefixtures("few_levels")
def test_validation_before_the_first_step_is_what_the_base_draws(checkout: Path) -> None:
    """With the sampler of `sample`, its fresh noise included."""
    config = load_config()
    path = train(config, "pet").parent / "validation" / "step-00000.png"
    prompts = [prompt.replace("{subject}", "sks dog") for prompt in config.train.validation_prompts]
    pictures = draw(load_pipeline(config.base), [Job(prompt, 0) for prompt in prompts], config.sample)
    expected = np.asarray(image_grid(pictures, columns=1), dtype=int)
    assert np.abs(np.asarray(Image.open(path), dtype=int) - expected).max() <= 2


@pytest.mark.slow
def test_training_again_gives_the_same_delta(checkout: Path) -> None:
    first = load_file(train(load_config(), "pet"))
    for state in (checkout / "scratch/state").rglob("state.pt"):
        state.unlink()
    again = load_file(train(load_config(), "pet"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.usefixtures("few_levels")
def test_another_size_is_another_training(checkout: Path) -> None:
    config = load_config()
    base = config.base.model_copy(update={"resolution": 24})
    configs = [config, config.model_copy(update={"base": base})]
    keys = [
        json.loads(train(one, "pet", overrides={"steps": 1}).with_name("train.json").read_text())["train_key"]
        for one in configs
    ]
    assert keys[0] != keys[1]


def test_refusals_come_before_any_work(checkout: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STAGE, "apply_method", lambda *_: pytest.fail("work has begun"))
    write_params(checkout, tiny_base, token="xyzzy")
    with pytest.raises(SvdiffError, match=r"token 'xyzzy' is .* tokens"):
        train(load_config(), "pet")
    write_params(checkout, tiny_base)
    with pytest.raises(SvdiffError, match="no concept, pair or edit 'dgo'"):
        train(load_config(), "dgo")
    if not torch.cuda.is_available():
        with pytest.raises(SvdiffError, match="precision is fp16"):
            train(load_config(), "pet", overrides={"precision": "fp16"})
    monkeypatch.setattr(STAGE, "load_pipeline", lambda *_: pytest.fail("work has begun"))
    (checkout / "data/concepts/pet/notes.png").write_text("not a picture")
    with pytest.raises(SvdiffError, match=r"notes\.png"):
        train(load_config(), "pet")
    (checkout / "data/concepts/pet/notes.png").unlink()
    for picture in (checkout / "out/prior/dog").iterdir():
        picture.unlink()
    with pytest.raises(SvdiffError, match="svdiff prior dog"):
        train(load_config(), "pet")
    assert not (checkout / "out/train").exists()


def test_prompts_that_the_tokenizer_would_cut_are_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STAGE, "apply_method", lambda *_: pytest.fail("work has begun"))
    long = "a photo of " + "a red house and " * 4 + "a {subject}"
    for key, value in (("prompt", long), ("validation_prompts", [long])):
        with pytest.raises(SvdiffError, match=r"is \d+ tokens long; the text encoder reads 16"):
            train(load_config(), "pet", overrides={key: value})


# ---- numbers that are not finite ----


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("method", METHODS_SLOWLY)
def test_a_diverging_training_stops_keeps_its_last_state_and_is_mended(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The loss becomes NaN in step 3: nothing is written, the state after step 2 is there, and smaller rates train."""
    original = Trainer._loss

    def spoiled(self: Trainer, number: int) -> Any:
        loss = original(self, number)
        large = self.config.lr > 0.01
        return loss._replace(total=loss.total * float("nan")) if large and self.step == 2 else loss

    monkeypatch.setattr(Trainer, "_loss", spoiled)
    settings = {"method": method, "lr": 0.02, "save_every": 50}
    for _ in range(2):  # the second time from the state after step 2
        with pytest.raises(
            SvdiffError, match=rf"step 3 is nan: .* {method} .*train.lr 0.02.*Lower.*after step 2.*state"
        ):
            train(load_config(), "pet", overrides=settings)
        assert not Path("out/train/pet").exists()
        [path] = (checkout / "scratch/state").rglob("state.pt")
        state = load_state(path)
        assert state is not None
        assert state["trainer"]["step"] == 2
        assert is_finite(state)
    delta = load_file(train(load_config(), "pet", overrides=settings | {"lr": 0.001}))
    assert all(value.isfinite().all() for value in delta.values())


@pytest.mark.slow
def test_full_weights_at_an_absurd_rate_stop_by_themselves(checkout: Path) -> None:
    """No patch: the arithmetic itself overflows."""
    with pytest.raises(SvdiffError, match=r"(loss|gradient|pixels)"):
        train(load_config(), "pet", overrides={"method": "full", "lr": 10.0, "lr_1d": 10.0, "steps": 40})
    assert not Path("out/train/pet").exists()
    for path in (checkout / "scratch/state").rglob("state.pt"):
        assert is_finite(load_state(path))


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("method", ["svdiff", pytest.param("full", marks=pytest.mark.slow)])
def test_nothing_that_is_not_finite_is_loaded(checkout: Path, method: str) -> None:
    path = train(load_config(), "pet", overrides={"method": method})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(SvdiffError, match="not finite"):
        sample_entry(load_config(), "pet")


def start(checkout: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from svdiff.cli import main; sys.argv[1:] = ['train', 'pet']; main()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    log = (checkout / "log.txt").open("ab")
    return subprocess.Popen([sys.executable, "-c", code], cwd=checkout, env=environment, stdout=log, stderr=log)


def kill_when_state_is_saved(checkout: Path, newer_than: float) -> None:
    """Start the command and kill it -9 soon after it has written a resume state."""
    process = start(checkout)
    deadline = time.monotonic() + 300
    while not any(p.stat().st_mtime > newer_than for p in (checkout / "scratch/state").rglob("state.pt")):
        assert process.poll() is None, (checkout / "log.txt").read_text()
        assert time.monotonic() < deadline, "no resume state within five minutes"
        time.sleep(0.02)
    time.sleep(0.1)  # somewhere in the following steps
    assert process.poll() is None, "finished before it could be killed"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svdiff", "lora"])
def test_killed_twice_and_run_again_gives_the_very_same_delta(checkout: Path, tiny_base: Path, method: str) -> None:
    write_params(
        checkout,
        tiny_base,
        method=method,
        steps=40,
        save_every=7,
        validate_every=20,
        accumulation=2,
        schedule="cosine",
    )
    assert start(checkout).wait() == 0, (checkout / "log.txt").read_text()
    straight = load_file(checkout / "out/train/pet/delta.safetensors")
    curve = pd.read_csv(checkout / "out/train/pet/curve.csv").drop(columns="seconds")
    (checkout / "out/train").rename(checkout / "straight")
    (checkout / "scratch/state").rename(checkout / "straight-state")

    kill_when_state_is_saved(checkout, newer_than=0)
    [state] = (checkout / "scratch/state").rglob("state.pt")
    assert 0 < torch.load(state, weights_only=True)["trainer"]["step"] < 40
    assert not (checkout / "out/train").exists()
    kill_when_state_is_saved(checkout, newer_than=state.stat().st_mtime)
    assert not (checkout / "out/train").exists()
    assert start(checkout).wait() == 0, (checkout / "log.txt").read_text()

    resumed = load_file(checkout / "out/train/pet/delta.safetensors")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert any(value.abs().max() > 0 for value in straight.values())
    pd.testing.assert_frame_equal(pd.read_csv(checkout / "out/train/pet/curve.csv").drop(columns="seconds"), curve)
    for picture in (checkout / "straight/pet/validation").iterdir():
        assert picture.read_bytes() == (checkout / "out/train/pet/validation" / picture.name).read_bytes()


# ---- deltas along the way ----


def spoiled_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    monkeypatch.setattr(Trainer, "fixed_noise_loss", lambda self: losses[self.step])


@pytest.mark.slow
def test_the_best_validated_delta_is_the_result_and_the_last_ones_are_kept(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled_losses(monkeypatch, {0: 0.5, 2: 0.4, 4: 0.2, 6: 0.3, 8: 0.25, 10: 0.28})
    settings = {"steps": 10, "keep_deltas": 2}
    folder = train(load_config(), "pet", overrides=settings).parent
    [deltas] = (checkout / "scratch/state").glob("*/deltas")
    kept = {path.name: load_file(path) for path in deltas.iterdir()}
    assert kept.keys() == {f"step-{step:05d}.safetensors" for step in (4, 8, 10)}
    assert json.loads((folder / "train.json").read_text())["chosen_step"] == 4
    best, last = load_file(folder / "delta.safetensors"), kept["step-00010.safetensors"]
    assert all(torch.equal(best[name], value) for name, value in kept["step-00004.safetensors"].items())
    assert any(not torch.equal(best[name], value) for name, value in last.items())
    path = train(load_config(), "pet", Path("last"), settings | {"choose": "last"})
    assert all(torch.equal(load_file(path)[name], value) for name, value in last.items())


def test_a_training_that_gets_no_better_stops(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_losses(monkeypatch, {0: 0.5, 2: 0.4, 4: 0.2, 6: 0.3, 8: 0.25, 10: 0.1})
    for _ in range(2):  # the second time from the finished state
        folder = train(load_config(), "pet", overrides={"steps": 10, "patience": 2}).parent
        summary = json.loads((folder / "train.json").read_text())
        assert (summary["steps"], summary["chosen_step"]) == (8, 4)
        assert list(pd.read_csv(folder / "curve.csv")["step"]) == list(range(1, 9))


@pytest.mark.slow
def test_a_validation_after_the_saved_state_does_not_end_a_resumed_training(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the validation after step 4 and saving its state, the training goes on from step 2."""
    spoiled_losses(monkeypatch, {0: 0.5, 2: 0.2, 4: 0.3, 6: 0.1})
    original, died = RUN.save_state, []

    def dying(path: Path, state: dict[str, Any]) -> bool:
        if state["trainer"]["step"] == 4 and not died:
            died.append(4)
            raise KeyboardInterrupt
        return original(path, state)

    monkeypatch.setattr(RUN, "save_state", dying)
    settings = {"steps": 6, "patience": 1}
    with pytest.raises(KeyboardInterrupt):
        train(load_config(), "pet", overrides=settings)
    folder = train(load_config(), "pet", overrides=settings).parent
    assert list(pd.read_csv(folder / "curve.csv")["step"]) == [1, 2, 3, 4]


@pytest.mark.slow
def test_more_steps_continue_a_finished_training(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = load_file(train(load_config(), "pet", Path("straight"), {"steps": 8, "choose": "last"}))
    monkeypatch.setenv("SVDIFF_HOME", str(checkout / "again"))
    short = train(load_config(), "pet", Path("short"), {"steps": 4, "choose": "last"}).read_bytes()
    original, numbers = Trainer._loss, []
    monkeypatch.setattr(Trainer, "_loss", lambda self, number: numbers.append(number) or original(self, number))
    longer = load_file(train(load_config(), "pet", Path("longer"), {"steps": 8, "choose": "last"}))
    assert numbers == [4, 5, 6, 7]
    assert all(torch.equal(straight[name], value) for name, value in longer.items())
    # The shorter one is as finished as before, and at rates that follow the number of steps nothing is continued.
    assert train(load_config(), "pet", Path("short"), {"steps": 4, "choose": "last"}).read_bytes() == short
    assert len(numbers) == 4
    train(load_config(), "pet", Path("cosine"), {"steps": 2, "schedule": "cosine"})
    train(load_config(), "pet", Path("cosine"), {"steps": 3, "schedule": "cosine"})
    assert len(numbers) == 4 + 2 + 3


@pytest.mark.slow
def test_ctrl_c_stops_after_the_step_and_the_same_command_goes_on(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = load_file(train(load_config(), "pet", Path("straight")))
    monkeypatch.setenv("SVDIFF_HOME", str(checkout / "again"))
    original, pressed, before = Trainer._loss, [], signal.getsignal(signal.SIGINT)

    def pressing(self: Trainer, number: int) -> Any:
        if number == 2 and not pressed:
            pressed.append(number)
            signal.raise_signal(signal.SIGINT)
        return original(self, number)

    monkeypatch.setattr(Trainer, "_loss", pressing)
    with pytest.raises(SvdiffError, match=r"stopped after step 3 of 4\. .*--delta (\S+)") as stopped:
        train(load_config(), "pet", Path("resumed"))
    delta = Path(str(stopped.value).partition("--delta ")[2].split()[0])
    sample_entry(load_config(), "pet", Path("halfway"), delta)
    resumed = load_file(train(load_config(), "pet", Path("resumed")))
    assert all(torch.equal(straight[name], value) for name, value in resumed.items())
    assert signal.getsignal(signal.SIGINT) is before


def test_pictures_held_out_are_for_the_fixed_noise_loss_alone(checkout: Path) -> None:
    config = load_config()
    settings = config.train_config("pet", {"holdout": 1})
    dataset = read_training_data(config, config.entry("pet"), settings).encode(family_of(load_pipeline(config.base)))
    assert dataset.validation == [2]
    assert {dataset.order(sample)[0] for sample in range(40)} == {0, 1}
    with pytest.raises(SvdiffError, match=r"train.holdout is 3, and data/concepts/pet has 3 pictures"):
        train(config, "pet", overrides={"holdout": 3})


@pytest.mark.slow
@pytest.mark.parametrize("live", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_and_one_that_is_records(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, live: str
) -> None:
    config = load_config()
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"live": live})})
    if find_spec(live) is None:
        with pytest.raises(SvdiffError, match="is not installed"):
            train(config, "pet")
        return
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config, "pet")
    assert [path for path in (checkout / "scratch").rglob("*tfevents*") if path.stat().st_size > 500] or live == "wandb"

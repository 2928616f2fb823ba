"""Several trainings as one batch: each ends as if it were alone, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from svdiff.config import Config, load_config
from svdiff.errors import SvdiffError
from svdiff.sampling import Job
from svdiff.training import train, train_together
from svdiff.training.loop import Trainer

STAGE = import_module("svdiff.training.stage")  # the package's attribute of this name is the function
TOGETHER = import_module("svdiff.training.together")
LR = 1e-2
NAMES = ["pet", "puss", "bear"]


def draw_pictures(folder: Path, count: int, colour: str, mask: bool = False) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        image = Image.new("RGBA" if mask else "RGB", (40, 40), "white")
        ImageDraw.Draw(image).ellipse((6 + i, 8, 30 + i, 34), fill=colour)
        if mask:
            image.putalpha(Image.linear_gradient("L").resize((40, 40)))
        image.save(folder / f"{i:03d}.png")


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three concepts with different numbers of pictures, of which two share a token and one has masks."""
    draw_pictures(tmp_path / "data/concepts/pet", 3, "brown")
    draw_pictures(tmp_path / "data/concepts/puss", 5, "black")
    draw_pictures(tmp_path / "data/concepts/bear", 4, "green", mask=True)
    draw_pictures(tmp_path / "out/prior/dog", 4, "grey")
    draw_pictures(tmp_path / "out/prior/cat", 6, "blue")
    write_params(tmp_path, tiny_base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    return tmp_path


def write_params(folder: Path, base: Path, own: dict[str, dict[str, Any]] | None = None, **settings: Any) -> None:
    """`own` are the settings of each concept."""
    defaults = {
        "steps": 6, "batch_size": 2, "lr": LR, "lr_1d": 1e-3, "schedule": "cosine", "train_token": True, "lr_token": 1e-2,
        "token_init": "distribution", "save_every": 2, "validate_every": 3, "validation_seeds": [0], "choose": "last",
    }  # fmt: skip
    concepts: dict[str, dict[str, Any]] = {
        "pet": {"class_word": "dog", "token": "sks"},
        "puss": {"class_word": "cat", "token": "zwx"},
        "bear": {"class_word": "dog", "token": "sks"},
    }
    for name, values in (own or {"bear": {"masks": "loss"}}).items():
        concepts[name]["train"] = values
    params = {
        "base": {"model": str(base)},
        "classes": ["dog", "cat"],
        "concepts": concepts,
        "train": defaults | settings,
        "sample": {"prompts": ["a {subject}"], "steps": 2, "eta": 1.0},
        "rank": {"concepts": ["pet"]},
        "tracking": {"live": "none"},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def train_both_ways(monkeypatch: pytest.MonkeyPatch, names: list[str] = NAMES) -> Config:
    """Results of training together in out/train, of training each alone in alone/."""
    config = load_config()
    train_together(config, names)
    with monkeypatch.context() as patch:
        patch.setenv("SVDIFF_HOME", "scratch-alone")
        for name in names:
            train(config, name, Path("alone") / name)
    return config


def check_same(name: str, steps: int = 6) -> None:
    """The same files, key and facts; shifts, curve and pictures to the tolerance that the docs state."""
    together, alone = Path("out/train") / name, Path("alone") / name
    files = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) for folder in (together, alone)]
    assert files[0] == files[1]
    one, other = (json.loads((folder / "train.json").read_text()) for folder in (together, alone))
    assert one.keys() == other.keys()
    differing = {"delta_sha256", "seconds", "finished", "fixed_noise_loss", "peak_bytes"}
    assert all(one[key] == other[key] for key in one.keys() - differing)
    rows, expected = (pd.read_csv(folder / "curve.csv").drop(columns="seconds") for folder in (together, alone))
    assert len(rows) == steps
    pd.testing.assert_frame_equal(rows, expected, rtol=1e-4)
    shifts, right = (load_file(folder / "delta.safetensors") for folder in (together, alone))
    assert shifts.keys() == right.keys()
    a, b = (torch.cat([d[k].flatten() for k in sorted(d)]) for d in (shifts, right))
    assert b.norm() > 0
    assert (a - b).norm() < 1e-4 * b.norm()
    for picture in (together / "validation").iterdir():
        pixels = [np.asarray(Image.open(p), dtype=int) for p in (picture, alone / "validation" / picture.name)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 2


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize(
    ("own", "settings"),
    [
        pytest.param({"bear": {"masks": "loss"}}, {}, marks=pytest.mark.slow),
        (
            {
                "puss": {"accumulation": 2, "lr": 5e-3, "batch_size": 1},
                "bear": {"batch_size": 1, "prior_weight": 0.0, "seed": 3},
            },
            {},
        ),
        pytest.param(
            {},
            {"text_encoder": True, "lr_text_encoder": 2e-3, "ema_decay": 0.9, "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"pet": {"min_snr_gamma": 5.0}},
            {"train_token": False, "token_init": "keep", "rank": 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_each_ends_as_it_does_alone(
    checkout: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, Any], settings: dict[str, Any]
) -> None:
    write_params(checkout, tiny_base, own, **settings)
    train_both_ways(monkeypatch)
    for name in NAMES:
        check_same(name)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_one_that_diverges_leaves_the_others_as_they_are(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A loss that is no number, and a finite one whose gradient is infinite, in step 3 of 6."""
    original = Trainer.loss_of

    def spoiled(self: Trainer, passes: Any, answers: Any) -> Any:
        loss = original(self, passes, answers)
        if self.step == 2 and passes[0].batch.prompts[0] == "a zwx cat":
            number = loss.total * float("nan") if where == "loss" else loss.total + (loss.total * 0).sqrt()
            return loss._replace(total=number)
        return loss

    monkeypatch.setattr(Trainer, "loss_of", spoiled)
    with pytest.raises(
        SvdiffError, match=rf"(?s)1 of 3 trainings .* written:\npuss: the {where} of step 3 is nan.*after step 2"
    ):
        train_together(load_config(), NAMES)
    monkeypatch.setattr(Trainer, "loss_of", original)
    assert not (checkout / "out/train/puss").exists()
    train_both_ways(monkeypatch)  # mended, it goes on
    for name in NAMES:
        check_same(name)


@pytest.mark.slow
def test_one_that_stops_early_leaves_the_others_as_they_are(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.fixed_noise_loss_of

    def rising(self: Trainer, passes: Any, predicted: Any) -> float:
        return self.step + 1.0 if "zwx" in self.dataset.prompts[0] else original(self, passes, predicted)

    monkeypatch.setattr(Trainer, "fixed_noise_loss_of", rising)
    write_params(checkout, Path(load_config().base.model), {"puss": {"patience": 1, "validate_every": 2}})
    train_both_ways(monkeypatch)
    for name, steps in {"pet": 6, "puss": 4, "bear": 6}.items():
        check_same(name, steps)


@pytest.mark.slow
def test_validations_are_drawn_as_one_batch_and_one_that_fails_leaves_the_others(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, drawn = TOGETHER.sample_images, []

    def failing(pipe: Any, jobs: list[Job], **settings: Any) -> Any:
        drawn.append([job.prompt for job in jobs])
        if len(drawn) > 1 and "a zwx cat" in drawn[-1]:
            raise SvdiffError("the network drew pixels that are not finite numbers")
        return original(pipe, jobs, **settings)

    monkeypatch.setattr(TOGETHER, "sample_images", failing)
    with pytest.raises(SvdiffError, match=r"(?s)1 of 3 trainings .* written:\npuss: the network drew pixels"):
        train_together(load_config(), NAMES)
    together = ["a sks dog", "a zwx cat", "a sks dog"]
    alone = [[prompt] for prompt in together]
    others = ["a sks dog", "a sks dog"]
    assert [[p for p in prompts if p.startswith("a ")] for prompts in drawn] == [together, together, *alone, others]
    monkeypatch.setattr(TOGETHER, "sample_images", original)
    train_both_ways(monkeypatch)
    for name in NAMES:
        check_same(name)


@pytest.mark.usefixtures("few_levels")
def test_what_is_finished_is_only_published(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished training alone takes no part in the batch; and what was trained together is finished to `svdiff train`."""
    config = load_config()
    alone = train(config, "puss").read_bytes()
    numbers: dict[str, list[int]] = {}
    original = Trainer.draw

    def seen(self: Trainer, number: int) -> Any:
        numbers.setdefault(self.dataset.prompts[0], []).append(number)
        return original(self, number)

    monkeypatch.setattr(Trainer, "draw", seen)
    paths = train_together(config, ["pet", "puss", "pet"])
    assert paths == [Path("out/train/pet/delta.safetensors"), Path("out/train/puss/delta.safetensors")]
    assert numbers == {"a sks dog": list(range(6))}
    assert paths[1].read_bytes() == alone
    together = paths[0].read_bytes()
    assert train(config, "pet").read_bytes() == together
    assert numbers == {"a sks dog": list(range(6))}


def test_what_cannot_share_a_network_is_refused_before_any_work(
    checkout: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(STAGE, "load_pipeline", lambda *_: pytest.fail("work has begun"))
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"method": "lora"}, "puss is trained by method lora"),
        ({"single_subject_weight": 0.1}, r"train.single_subject_weight of puss is 0\.1"),
        ({"fit": "bucket"}, "train.fit of puss is bucket"),
        ({"compile": True}, "train.compile of puss is true"),
        ({"precision": "fp16"}, "train.precision of puss is fp16"),
        ({"rank": 3}, "train.rank is None for pet and 3 for puss"),
    ]
    for own, message in refusals:
        write_params(checkout, tiny_base, {"puss": own})
        with pytest.raises(SvdiffError, match=message):
            train_together(load_config(), NAMES)
    assert not (checkout / "out/train").exists()


def start(checkout: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from svdiff.cli import main; sys.argv[1:] = ['train', *sys.argv[1:]]; main()"
    log = (checkout / "log.txt").open("ab")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *NAMES], cwd=checkout, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_killed_and_run_again_each_goes_on(checkout: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From different steps: they save at different times."""
    own = {"pet": {"save_every": 3}, "puss": {"save_every": 5}, "bear": {"save_every": 40}}
    write_params(checkout, tiny_base, own, steps=40, validate_every=20)
    process = start(checkout)
    deadline = time.monotonic() + 300
    states = checkout / "scratch/state"
    while len(list(states.rglob("state.pt"))) < 2:
        assert process.poll() is None, (checkout / "log.txt").read_text()
        assert time.monotonic() < deadline, "no two resume states within five minutes"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [torch.load(path, weights_only=True)["trainer"]["step"] for path in states.rglob("state.pt")]
    assert len(steps) == 2
    assert all(0 < step < 40 for step in steps)
    assert start(checkout).wait() == 0, (checkout / "log.txt").read_text()
    train_both_ways(monkeypatch)  # of the first nothing is left to train
    for name in NAMES:
        check_same(name, 40)

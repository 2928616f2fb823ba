"""The stage `edit` and `svdiff edit IMAGE` on the tiny base: results, refusals before any work, death at any moment."""

from __future__ import annotations

import json
import os
import re
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
from editing_parts import Checkout
from PIL import Image
from safetensors.torch import load_file

from svdiff.config import EditingConfig, load_config
from svdiff.editing.edits import edit_picture
from svdiff.editing.stage import choose_starts, edit, edit_any
from svdiff.errors import SvdiffError
from svdiff.models import family_of, load_pipeline
from svdiff.sampling import Job, sample_images
from svdiff.sampling.inversion import edit_image, encode_images, invert
from svdiff.sampling.stage import personalise
from svdiff.training import train
from svdiff.training.datasets import read_training_data
from tests.models.tiny import make_tiny

STAGE = import_module("svdiff.training.stage")  # the package's attribute of this name is the function
PROMPT, TARGET = "a dog on a blue background", "a dog on a red background"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def test_an_edit_is_trained_on_one_picture_without_token_or_prior(checkout: Checkout) -> None:
    config = load_config()
    settings = config.train_config("on-red")
    assert (settings.prior_weight, settings.steps) == (0, 6)
    dataset = read_training_data(config, config.entry("on-red"), settings).encode(family_of(load_pipeline(config.base)))
    assert dataset.instance.prompts == [PROMPT]
    assert dataset.instance.shown == [()]
    assert dataset.prior is None
    delta = train(config, "on-red")
    curve = pd.read_csv(delta.with_name("curve.csv"))
    assert len(curve) == 6
    assert (curve["loss"] == curve["loss_instance"]).all()
    assert json.loads(delta.with_name("train.json").read_text())["kind"] == "edit"


def test_pictures_sheet_and_scores(checkout: Checkout) -> None:
    config = load_config()
    delta = train(config, "on-red")
    folder = edit(config, "on-red")
    assert folder == Path("out/edit/on-red")
    table = pd.read_csv(folder / "images.csv")
    assert len(table) == 3 * 3 * 2  # prompts, starts, seeds
    assert set(table["start"]) == {"noise", "inversion", "mixture"}
    assert table[["faithfulness", "edit"]].apply(np.isfinite).all(axis=None)
    pictures = folder / "pictures"
    assert {path.name for path in pictures.iterdir()} == {
        *table["file"],
        *(f"{name}.png" for name in ("input", "autoencoder", "reconstruction")),
    }
    numbers = json.loads((folder / "metrics.json").read_text())
    targets = table[(table["prompt_index"] > 0) & (table["start"] == "inversion")]
    assert numbers["inversion_faithfulness"] == pytest.approx(targets["faithfulness"].mean(), abs=1e-5)
    assert numbers["reconstruction_psnr"] <= numbers["autoencoder_psnr"] + 1
    assert {"clip", "lpips"} <= json.loads((folder / "evaluators.json").read_text()).keys()
    assert Image.open(folder / "sheet.png").width > 600

    # Without inversion an edit is what the trained model draws of the target.
    pipe = load_pipeline(config.base)
    personalise(pipe, delta)
    [drawn] = sample_images(pipe, [Job(TARGET, 1)], steps=3, guidance=config.edit.guidance)
    file = table.query("prompt_index == 1 and start == 'noise' and seed == 1")["file"].item()
    assert np.abs(pixels(drawn) - pixels(Image.open(pictures / file))).max() <= 1


def test_each_target_is_inverted_under_its_own_prompt(checkout: Checkout) -> None:
    """Sec. 3.4: DDIM inversion at guidance 1 on the target prompt."""
    config = load_config()
    settings = choose_starts(config.edit, inversion=True, eta=0.0)
    pipe = load_pipeline(config.base)
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if name.endswith("attn2.to_out.0.weight"):
                weight.mul_(50)  # so that prompts differ in pixels, which those of an untrained base hardly do
    picture = Image.open("photo.png")
    edited = edit_picture(pipe, picture, PROMPT, [TARGET], settings)
    latents = encode_images(pipe, [edited.original])

    def expected(prompt: str) -> np.ndarray:
        [drawn, *_] = edit_image(
            pipe,
            invert(pipe, latents, [prompt], steps=settings.steps),
            TARGET,
            [0],
            steps=settings.steps,
            guidance=settings.guidance,
            eta=0.0,
            alpha=0.0,
        )
        return pixels(drawn)

    one_by_one = edit_picture(pipe, picture, PROMPT, [TARGET], settings, batch_size=1)
    for one, other in zip(one_by_one.pictures, edited.pictures, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    made = pixels(edited.pictures[edited.table.query("prompt_index == 1 and seed == 0").index[0]])
    assert np.abs(made - expected(TARGET)).max() <= 1
    assert np.abs(made - expected(PROMPT)).max() > 5


@pytest.mark.slow
def test_other_targets_and_starts_need_no_other_training(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    first = edit_any(config, Path("photo.png"), PROMPT, [TARGET])
    assert first.parts[0] == "pictures"
    assert first.parts[1].startswith("photo-")
    before = {path: path.read_bytes() for path in first.iterdir() if path.is_file()}
    monkeypatch.setattr("svdiff.training.loop.Trainer._loss", lambda *_: pytest.fail("trained again"))
    editing = choose_starts(config.edit, inversion=True, eta=0.0)
    changed = config.model_copy(update={"edit": editing})
    second = edit_any(changed, Path("photo.png"), PROMPT, ["a cat"])
    table = pd.read_csv(second / "images.csv")
    assert set(table["prompt"]) == {PROMPT, "a cat"}
    assert set(table["start"]) == {"inversion"}
    assert {path: path.read_bytes() for path in before} == before, "those of the first targets stay"
    one, other = (Image.open(second / "pictures" / f"p01-inversion-s000{seed}.png") for seed in (0, 1))
    assert np.array_equal(pixels(one), pixels(other)), "η = 0 and α = 0 leave nothing random"


def test_starts_that_the_base_is_not_sampled_with_are_refused_before_training(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout.values["base"] = {"model": str(make_tiny("sd3", tmp_path / "sd3"))}
    checkout.write()
    monkeypatch.setattr("svdiff.training.train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(SvdiffError, match="η is"):
        edit_any(load_config(), Path("photo.png"), PROMPT, [TARGET])


@pytest.mark.slow
def test_edits_are_made_where_an_evaluator_cannot_be_loaded(
    checkout: Checkout, caplog: pytest.LogCaptureFixture
) -> None:
    checkout.values["evaluators"] = {"clip_model": "RN50", "clip_pretrained": "weights-that-nobody-has"}
    checkout.write()
    folder = edit_any(load_config(), Path("photo.png"), PROMPT, [TARGET])
    assert "not scored: evaluators.clip_model 'RN50' cannot be loaded" in caplog.text
    assert (folder / "sheet.png").is_file()
    assert not (folder / "metrics.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_baselines_edit_as_well(checkout: Checkout, method: str) -> None:
    checkout.values["edit"]["methods"] = {"full": {"lr": 1e-4}, "lora": {"lr": 3e-3, "steps": 2}}
    checkout.write()
    config = load_config()
    folder = edit_any(config, Path("photo.png"), PROMPT, [TARGET], overrides={"method": method})
    settings = json.loads((folder.parents[1] / "train/train.json").read_text())["config"]
    assert settings["method"] == method
    assert (settings["lr"], settings["steps"]) == {"full": (1e-4, 6), "lora": (3e-3, 2)}[method]
    assert (folder / "sheet.png").is_file()


def test_an_edits_own_values_come_before_its_methods(checkout: Checkout) -> None:
    checkout.values["edit"]["methods"] = {"svdiff": {"lr": 0.5, "lr_1d": 0.25}}
    checkout.values["edits"]["on-red"]["train"] = {"lr": 0.125}
    checkout.write()
    settings = load_config().train_config("on-red", {"lr_1d": 0.0625})
    assert (settings.lr, settings.lr_1d) == (0.125, 0.0625)


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": []}, ["edits.on-red.targets"]),
        ({"targets": [PROMPT]}, ["differ", PROMPT]),
        ({"targets": [TARGET, TARGET]}, ["differ", TARGET]),
        ({"targets": [" "]}, ["says nothing"]),
        ({"prompt": "a {subject}"}, ["braces", "{subject}"]),
        ({"prompt": ""}, ["edits.on-red.prompt"]),
        ({"train": {"prior_weight": 1.0}}, ["prior_weight", "no effect"]),
        ({"train": {"method": "custom-diffusion"}}, ["custom-diffusion", "token"]),
        ({"train": {"lrr": 1.0}}, ["edits.on-red.train.lrr", "lr_1d"]),
        ({"picture": "photo.png"}, ["edits.on-red.picture", "image"]),
    ],
)
def test_an_impossible_edit_is_refused_by_name(checkout: Checkout, change: dict[str, Any], words: list[str]) -> None:
    checkout.values["edits"]["on-red"] |= change
    checkout.write()
    with pytest.raises(SvdiffError) as error:
        load_config()
    for word in words:
        assert word in str(error.value)


def test_pictures_and_prompts_are_refused_before_any_work(checkout: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    monkeypatch.setattr(STAGE, "apply_method", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(SvdiffError, match="tokens long"):
        edit_any(config, Path("photo.png"), PROMPT, ["a dog " * 20])
    monkeypatch.setattr("svdiff.editing.stage.load_pipeline", lambda *_: pytest.fail("work has begun"))
    Path("notes.png").write_text("not a picture")
    with pytest.raises(SvdiffError, match=r"notes\.png"):
        edit_any(config, Path("notes.png"), PROMPT, [TARGET])
    with pytest.raises(SvdiffError, match="targets"):
        edit_any(config, Path("photo.png"), PROMPT, [PROMPT])
    with pytest.raises(SvdiffError, match=r"steps.*-1"):
        edit_any(config, Path("photo.png"), PROMPT, [TARGET], overrides={"steps": -1})
    with pytest.raises(SvdiffError, match="train-edit@on-red"):
        edit(config, "on-red")
    with pytest.raises(SvdiffError, match=r"no edit 'on-green'.*on-red"):
        edit(config, "on-green")
    assert not Path("pictures").exists()
    assert not Path("out").exists()


def test_starts_that_are_asked_for() -> None:
    editing = EditingConfig()

    def chosen(**asked: Any) -> dict[str, tuple[float, float]]:
        starts = choose_starts(editing, **asked).starts
        return {name: (start.eta, start.alpha) for name, start in starts.items()}

    paper = {"noise": (0.0, 1.0), "inversion": (0.5, 0.0), "mixture": (0.9, 0.9)}
    assert chosen() == paper
    assert chosen(inversion=False) == {"noise": paper["noise"]}
    assert chosen(inversion=True) == {name: paper[name] for name in ("inversion", "mixture")}
    assert chosen(eta=0.2) == {"noise": (0.0, 1.0), "inversion": (0.2, 0.0)}
    assert chosen(inversion=True, eta=0.9, alpha=0.7) == {"inversion": (0.9, 0.7)}
    assert chosen(inversion=False, eta=0.3) == {"noise": (0.3, 1.0)}
    with pytest.raises(SvdiffError, match="without inversion"):
        chosen(inversion=False, alpha=0.2)
    with pytest.raises(SvdiffError, match=r"eta.*1\.5"):
        chosen(eta=1.5)


# ---- the command ----


def start(checkout: Checkout, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "svdiff.cli", "edit", *arguments],
        cwd=checkout.root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_killed_in_training_and_run_again_gives_the_very_same_edit(checkout: Checkout) -> None:
    checkout.values["edit"]["train"] = {"steps": 60}
    checkout.values["train"] |= {"save_every": 5, "validate_every": 60}
    checkout.write()
    arguments = ["photo.png", "--prompt", PROMPT, "--target", TARGET]
    straight = start(checkout, *arguments)
    output, _ = straight.communicate()
    assert straight.returncode == 0, output
    assert re.search(r"wrote pictures/photo-\w+/edit/.*/sheet\.png", output)
    made, home = checkout.root / "pictures", checkout.root / "scratch"
    made.rename(checkout.root / "straight")
    (home / "state").rename(checkout.root / "straight-state")

    killed = start(checkout, *arguments)
    deadline = time.monotonic() + 300
    while not list(home.glob("state/*/state.pt")):
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not made.exists()
    again = start(checkout, *arguments)
    output, _ = again.communicate()
    assert again.returncode == 0, output

    one, other = (load_file(*root.glob("*/train/delta.safetensors")) for root in (checkout.root / "straight", made))
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)
    for path in sorted(made.glob("*/edit/**/*.*")):
        assert path.read_bytes() == (checkout.root / "straight" / path.relative_to(made)).read_bytes(), path


@pytest.mark.slow
def test_the_command_speaks_to_people(checkout: Checkout) -> None:
    for arguments, words in (
        (["photo.png", "--prompt", PROMPT], "--target is missing"),
        (["on-red", "--eta", "0.5"], "--prompt is missing"),
        (["nobody.png", "--prompt", PROMPT, "--target", TARGET], "nobody.png"),
        (["photo.png", "--prompt", PROMPT, "--target", TARGET, "--method", "svd"], "'svdiff'"),
    ):
        done = start(checkout, *arguments)
        output, _ = done.communicate()
        assert done.returncode == 2
        assert words in output
        assert "Traceback" not in output

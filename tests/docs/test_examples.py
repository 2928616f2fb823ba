"""The examples run as they stand, each in a checkout of its own on the tiny base."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

sys.path.append(str(Path(__file__).parents[1] / "flows"))  # for small evaluators

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path) -> Path:
    """params.yaml with two concepts and their pair, their pictures, and no results."""
    for name, colour in (("pet", "brown"), ("other", "orange")):
        folder = tmp_path / "data/concepts" / name
        folder.mkdir(parents=True)
        for number in range(3):
            image = Image.new("RGB", (40, 40), "white")
            ImageDraw.Draw(image).ellipse((6 + number, 8, 30 + number, 34), fill=colour)
            image.save(folder / f"{number}.png")
    params = {
        "base": {"model": str(tiny_base)},
        "classes": ["dog", "cat"],
        "concepts": {
            "pet": {"class_word": "dog", "token": "sks"},
            "other": {"class_word": "cat", "token": "zwx"},
        },
        "pairs": {"both": {"concepts": ["pet", "other"]}},
        "prior": {"images": 3, "steps": 2},
        "train": {"steps": 3, "lr": 1e-2, "lr_1d": 1e-3, "validate_every": 3},
        "mix": {"mixes": 4, "prompts": ["a {first} and a {second}"]},
        "edit": {"train": {"steps": 2}, "seeds": [0], "steps": 3},
        "sample": {"prompts": ["a {subject}"], "steps": 2},
        "tracking": {"live": "none"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def run(checkout: Path, name: str, *arguments: str) -> list[str]:
    """Run an example there; the lines that it prints."""
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "SVDIFF_HOME": str(checkout / "scratch")}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_every_example_is_run() -> None:
    texts = Path(__file__).read_text() + (EXAMPLES.parent / "tests/flows/test_concept_model.py").read_text()
    assert all(f'"{path.name}"' in texts for path in EXAMPLES.glob("*.py"))


def test_own_concept_and_live_pipeline(checkout: Path) -> None:
    (checkout / "data/concepts/pet").rename(checkout / "data/concepts/mine")
    options = ("--class-word", "dog", "--token", "sks", "--prompt", "a {subject} on a red background")
    printed = run(checkout, "own_concept.py", "mine", *options)
    assert len(printed) == 2
    assert (pixels(checkout / printed[0]) != pixels(checkout / printed[1])).any()

    delta = "pictures/mine/delta.safetensors"
    run(checkout, "live_pipeline.py", "a sks dog", delta, delta, "--output", "live")
    drawn = {name: pixels(checkout / "live" / f"{name}.png") for name in ("delta-0", "mean", "mean-fused", "base")}
    assert (drawn["mean"] == drawn["delta-0"]).all()  # of twice the same delta
    assert abs(drawn["mean"] - drawn["mean-fused"]).max() <= 2
    assert (drawn["delta-0"] != drawn["base"]).any()


def test_the_live_pipeline_of_the_docs(checkout: Path, tiny_base: Path) -> None:
    options = ("--class-word", "dog", "--token", "sks", "--prompt", "a {subject}")
    run(checkout, "own_concept.py", "pet", *options)
    for name in ("scarf-cat", "bow-cat"):
        (checkout / "out/train" / name).mkdir(parents=True)
        shutil.copy(checkout / "pictures/pet/delta.safetensors", checkout / "out/train" / name)
    (checkout / "models").mkdir()
    (checkout / "models/base").symlink_to(tiny_base)
    page = (EXAMPLES.parent / "docs/how-to/serving.md").read_text()
    [block] = [block for block in re.findall(r"(?m)(?:^    .*\n|^\n)+", page) if "import SpectralPipeline" in block]
    (checkout / "block.py").write_text(textwrap.dedent(block))
    run(checkout, str(checkout / "block.py"))


def test_pair(checkout: Path) -> None:
    sheet, *pictures = run(checkout, "pair.py", "both", "--prompt", "a {first} beside a {second}")
    assert (checkout / sheet).is_file()
    assert len(pictures) == 2
    assert all((checkout / path).is_file() for path in pictures)


def test_edit(checkout: Path) -> None:
    from champions import write_evaluators

    params = yaml.safe_load((checkout / "params.yaml").read_text())
    (checkout / "params.yaml").write_text(yaml.safe_dump(params | {"evaluators": write_evaluators(checkout, 0)}))
    [sheet] = run(checkout, "edit.py", "data/concepts/pet/0.png", "a dog", "a red dog")
    assert (checkout / sheet).is_file()


def test_real_base(checkout: Path, tiny_base: Path) -> None:
    lora, picture = run(checkout, "real_base.py", str(tiny_base), "pet", "--steps", "3")
    assert "LoRA at full rank" in lora
    assert (checkout / picture).is_file()

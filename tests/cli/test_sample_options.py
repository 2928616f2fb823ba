"""`svdiff sample --prompt`: every option reaches the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from svdiff.cli import app
from svdiff.spectral import attach, load_basis

OPTIONS: dict[str, list[str]] = {
    "prompt": ["--prompt", "a {subject} on a blue background"],
    "seed": ["--seed", "5"],
    "scale": ["--scale", "0.3"],
    "guidance": ["--guidance", "9"],
    "steps": ["--steps", "3"],
    "eta": ["--eta", "1"],
    "beta": ["--beta", "0.5"],
    "negative": ["--beta", "0.5", "--negative", "a red car"],
}


@pytest.fixture
def sampled(
    tiny_pipe: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, bytes]]:
    """Pictures, by file name, that the command draws of a concept in a checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "home"))
    values = {
        "base": {"model": str(tiny_base)},
        "classes": ["dog"],
        "concepts": {"pet": {"class_word": "dog", "token": "sks"}},
        "sample": {"prompts": ["a {subject}"], "steps": 2, "guidance": 3.0, "eta": 0.0},
        "rank": {"concepts": ["pet"]},
    }
    Path("params.yaml").write_text(yaml.safe_dump(values))
    shifts = attach(tiny_pipe.unet, load_basis(tiny_pipe.unet, None, progress=False))
    with torch.no_grad():
        for parameter in shifts.parameters_spectral():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    Path("out/train/pet").mkdir(parents=True)
    shifts.delta(class_word="dog", token="sks").save(Path("out/train/pet/delta.safetensors"))

    def draw(*options: str) -> dict[str, bytes]:
        folder = tmp_path / "-".join(["drawn", *options]).replace("/", "_")
        if "--prompt" not in options:
            options = (*options, "--prompt", "a {subject}")
        done = CliRunner().invoke(app, ["sample", "pet", *options, "-o", str(folder)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return {path.name: path.read_bytes() for path in folder.glob("*.png")}

    return draw


def test_every_option_changes_the_picture(sampled: Callable[..., dict[str, bytes]]) -> None:
    [plain] = sampled().values()
    assert [*sampled("--seed", "0").values()] == [plain]
    drawn = {name: sampled(*options) for name, options in OPTIONS.items()}
    assert {len(pictures) for pictures in drawn.values()} == {1}
    pictures = [plain, *(picture for of in drawn.values() for picture in of.values())]
    assert len(set(pictures)) == len(OPTIONS) + 1, "each is another picture"


def test_a_picture_for_each_prompt_and_seed(sampled: Callable[..., dict[str, bytes]]) -> None:
    pictures = sampled("--prompt", "a {subject}", "--prompt", "a dog", "--seed", "0", "--seed", "1")
    assert len(pictures) == len(set(pictures.values())) == 4

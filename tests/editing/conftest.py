"""A checkout with one edit on the tiny base, real small evaluators as files, and a picture world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_parts import CLIP, Checkout
from safetensors.torch import save_file
from world_parts import write_polygons

from svdiff.base.world import World


@pytest.fixture(scope="session")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Section `evaluators`: open_clip's and lpips' own networks, small or random, as the files that a checkout has."""
    import lpips
    import open_clip

    folder = tmp_path_factory.mktemp("evaluators")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**CLIP)
        backbone = lpips.LPIPS(net="squeeze", lpips=False, pretrained=False, pnet_rand=True, verbose=False).net
    (folder / "clip").mkdir()
    settings = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(settings))
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")
    save_file(backbone.state_dict(), folder / "backbone.safetensors")
    return {
        "clip_model": str(folder / "clip"),
        "lpips_net": "squeeze",
        "lpips_weights": str(folder / "backbone.safetensors"),
    }


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sheets of things in the format of `svdiff base world`."""
    return write_polygons(tmp_path_factory.mktemp("data") / "world")


@pytest.fixture(scope="session")
def world(world_folder: Path) -> World:
    """A world with enough held-out individuals for every edit whose answer is known."""
    return World(world_folder, world_folder / "sprites", 1, 1, 40)


@pytest.fixture
def checkout(
    tmp_path: Path,
    tiny_base: Path,
    evaluators: dict[str, Any],
    world_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    few_levels: None,
) -> Checkout:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    return Checkout(tmp_path, tiny_base, evaluators, world_folder)

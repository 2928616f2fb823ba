"""A checkout with one edit on the tiny base, real small evaluators as files, and a picture world of coloured shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_parts import CLIP, WORDS, Checkout
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from svdiff.base.artwork import SPRITE_SIZE, _sheet
from svdiff.base.things import BASE_ARTISTS


@pytest.fixture(scope="session")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Section `evaluators`: open_clip's and lpips' own networks, small or random, as the files that a checkout has."""
    import lpips
    import open_clip

    folder = tmp_path_factory.mktemp("evaluators")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**CLIP)
        backbone = lpips.LPIPS(net="alex", lpips=False, pretrained=False, pnet_rand=True, verbose=False).net
    (folder / "clip").mkdir()
    settings = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "clip/open_clip_config.json").write_text(json.dumps(settings))
    save_file(clip.state_dict(), folder / "clip/open_clip_model.safetensors")
    save_file(backbone.state_dict(), folder / "backbone.safetensors")
    return {
        "clip_model": f"local-dir:{folder / 'clip'}",
        "lpips_net": "alex",
        "lpips_weights": str(folder / "backbone.safetensors"),
    }


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world of ten shapes by the five base artists, in the format of `svdiff base world`."""
    folder = tmp_path_factory.mktemp("world")
    for number, artist in enumerate(BASE_ARTISTS):
        sprites: list[Image.Image | None] = []
        for index in range(len(WORDS)):
            sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE), (0, 0, 0, 0))
            fill = (25 * index, 50 * number, 250 - 25 * index, 255)
            ImageDraw.Draw(sprite).regular_polygon((64, 64, 60), index + 3, fill=fill)
            sprites.append(sprite)
        _sheet(sprites).save(folder / f"{artist.name}.webp", lossless=True)
    artists = {a.name: {"package": a.package, "spdx": a.spdx, "style": a.style, "words": WORDS} for a in BASE_ARTISTS}
    info = {"sprite_size": SPRITE_SIZE, "words": WORDS, "icons": {w: w for w in WORDS}, "artists": artists}
    (folder / "things.json").write_text(json.dumps(info))
    return folder


@pytest.fixture
def checkout(
    tmp_path: Path,
    tiny_base: Path,
    evaluators: dict[str, Any],
    world_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Checkout:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    return Checkout(tmp_path, tiny_base, evaluators, world_folder)

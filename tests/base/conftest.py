from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from svdiff.base.artwork import SPRITE_SIZE, _sheet
from svdiff.base.things import BASE_ARTISTS


@pytest.fixture
def world_folder(tmp_path: Path) -> Path:
    """A world of four shapes by the five base artists, in the format of `svdiff base world`."""
    folder = tmp_path / "world"
    folder.mkdir()
    words = ["dog", "cat", "car", "tree"]
    for number, artist in enumerate(BASE_ARTISTS):
        sprites: list[Image.Image | None] = []
        for index in range(len(words)):
            sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE), (0, 0, 0, 0))
            fill = (60 * index, 50 * number, 200 - 40 * index, 255)
            ImageDraw.Draw(sprite).regular_polygon((64, 64, 60), index + 3, fill=fill)
            sprites.append(sprite)
        _sheet(sprites).save(folder / f"{artist.name}.webp", lossless=True)
    artists = {a.name: {"package": a.package, "spdx": a.spdx, "style": a.style, "words": words} for a in BASE_ARTISTS}
    info = {"sprite_size": SPRITE_SIZE, "words": words, "icons": {w: w for w in words}, "artists": artists}
    (folder / "things.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Resume states of a test go nowhere else."""
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "home"))
    return tmp_path / "home"

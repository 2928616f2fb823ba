"""A tiny picture world: the real artists' individuals, a handful of each, and things that are coloured polygons."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from svdiff.base.config import BaseTrainingConfig
from svdiff.base.things import ARTISTS, SPRITE_SIZE, write_sheets
from svdiff.base.words import THINGS
from svdiff.base.world import World

INDIVIDUALS, NAMED, HELD_OUT = 8, 4, 8


def write_polygons(folder: Path) -> Path:
    """The sheets of a world whose things are polygons, a colour and a number of corners each."""
    folder.mkdir(parents=True)
    drawings: dict[str, list[Image.Image]] = {}
    for number, artist in enumerate(ARTISTS):
        drawings[artist.name] = []
        for index in range(len(THINGS)):
            sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
            fill = (20 * index, 80 * number, 240 - 20 * index, 255)
            ImageDraw.Draw(sprite).regular_polygon((64, 64, 60), index + 3, fill=fill)
            drawings[artist.name].append(sprite)
    write_sheets(folder, drawings)
    return folder


def tiny_world(folder: Path, cache: Path) -> World:
    """The world of the sheets in `folder`."""
    return World(folder, cache, INDIVIDUALS, NAMED, HELD_OUT)


def tiny_config(folder: Path, **parts: dict[str, object]) -> BaseTrainingConfig:
    """Trainings of a few steps on it. The held-out individuals are fewer than a person may ask for."""
    settings: dict[str, object] = {
        "seed": 3,
        "world": {"folder": str(folder), "individuals": INDIVIDUALS, "named": NAMED},
        "autoencoder": {"steps": 4, "batch_size": 4, "channels": (16, 48, 48, 48), "latent_channels": 8},
        "text": {"steps": 4, "batch_size": 4, "layers": 1, "width": 32},
        "unet": {"steps": 4, "batch_size": 4, "channels": (32, 64), "heads": 2},
        "identity": {
            "steps": 4,
            "batch_size": 4,
            "channels": (8, 8, 16, 16),
            "look_alikes": {"steps": 2, "batch_size": 8},
        },
        "clip": {"steps": 3, "batch_size": 6, "width": 8},
        "lpips": {"steps": 4, "batch_size": 4},
    }
    config = BaseTrainingConfig.model_validate({**settings, **parts})
    return config.model_copy(update={"world": config.world.model_copy(update={"held_out": HELD_OUT})})

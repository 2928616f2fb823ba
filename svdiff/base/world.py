"""The picture world: deterministic compositions of sprites, each with a scene from which captions are drawn."""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from svdiff.base.artwork import read_sheet
from svdiff.base.things import COLOURS, CORE_WORDS, HAND_WORDS
from svdiff.errors import SvdiffError

PICTURE_SIZE = 64
#: Things stand at multiples of this many pixels, one latent position, and have one of these sides: so a drawing has few
#: codes, wherever it stands, and a small base learns them sharply.
GRID = 8
BIG, MEDIUM, SMALL = 56 / PICTURE_SIZE, 48 / PICTURE_SIZE, 32 / PICTURE_SIZE
TILTS = (-10.0, 10.0)
Layout = Literal["one", "left-right", "above-below"]
Split = Literal["train", "held-out", "any"]
Change = Literal["thing", "artist", "colour", "order"]


@dataclass(frozen=True)
class Placed:
    """One thing in a picture: what it is, centre and side in fractions of the picture, tilt in degrees.

    A `hand` redraws the artist's drawing, always in the same way; None leaves it as it is.
    """

    word: str
    x: float
    y: float
    size: float
    tilt: float
    hand: str | None = None


@dataclass(frozen=True)
class Scene:
    """What is in a picture. In pairs the first thing is the left or the upper one; one artist drew all of them."""

    artist: str
    style: str
    colour: str
    layout: Layout
    things: tuple[Placed, ...]


def is_held_out(word: str, artist: str, colour: str) -> bool:
    """Whether this combination of thing, artist and background (one in twelve) is kept out of training."""
    return zlib.crc32(f"{word}/{artist}/{colour}".encode()) % 12 == 0


class World:
    """The sprites of `folder` (as `svdiff base world` writes it), and the pictures made of them.

    `things` limits the world to the first so many things. Every picture is a function of (seed, index) alone.
    """

    def __init__(self, folder: str | Path, things: int | None = None) -> None:
        folder = Path(folder)
        if not (folder / "things.json").is_file():
            raise SvdiffError(f"{folder} holds no picture world: run `dvc pull`, or `svdiff base world` to make it")
        self.info = json.loads((folder / "things.json").read_text())
        words: list[str] = self.info["words"]
        core = [word for word in CORE_WORDS if word in words]
        self.words = words if things is None else [*core, *(w for w in words if w not in core)][:things]
        self.artists: list[str] = list(self.info["artists"])
        self.styles = {name: artist["style"] for name, artist in self.info["artists"].items()}
        self.sprites: dict[tuple[str, str], Image.Image] = {}
        for name, artist in self.info["artists"].items():
            drawn = set(artist["words"])
            sheet = read_sheet(folder / f"{name}.webp", len(words))
            self.sprites.update(
                {(name, w): s for w, s in zip(words, sheet, strict=True) if w in drawn and w in self.words}
            )

    def hands(self, artist: str) -> list[str]:
        """The hands that redraw this artist's drawings; every hand belongs to one artist."""
        return list(HAND_WORDS[self.artists.index(artist) :: len(self.artists)])

    def scene(self, seed: int, index: int, split: Split = "train", pairs: float = 0.45, hands: float = 0.0) -> Scene:
        """The scene of (seed, index): in `train` without held-out combinations, in `held-out` only such.

        `pairs` is the share of scenes with two things, `hands` that of things redrawn by a hand.
        """
        draw = random.Random(f"{seed}/{index}")
        while True:
            artist = draw.choice(self.artists)
            colour = draw.choice(list(COLOURS))
            layout: Layout = "one"
            if draw.random() < pairs:
                layout = "left-right" if draw.random() < 0.6 else "above-below"
            words = draw.sample([w for w in self.words if (artist, w) in self.sprites], 1 if layout == "one" else 2)
            kept_out = any(is_held_out(w, artist, colour) for w in words)
            if split == "any" or kept_out == (split == "held-out"):
                break
        places = _places(draw, layout, words)
        # Drawn last, so that all else in a scene is the same whatever the share.
        redrawn = (
            place if draw.random() >= hands else replace(place, hand=draw.choice(self.hands(artist)))
            for place in places
        )
        return Scene(artist, self.styles[artist], colour, layout, tuple(redrawn))

    def altered(self, scene: Scene, draw: random.Random, what: Change | None = None) -> Scene:
        """The scene with one of its things, its artist, its colour or its order changed, and nothing else.

        What is asked for happens if it can: one thing alone has no order, and not every artist drew everything.
        """
        kinds: tuple[Change, ...] = ("thing", "artist", "colour", "order")
        kind = what or draw.choice(kinds[: 3 if scene.layout == "one" else 4])
        words = [thing.word for thing in scene.things]
        if kind == "colour":
            return replace(scene, colour=draw.choice([c for c in COLOURS if c != scene.colour]))
        if kind == "artist":
            others = [a for a in self.artists if a != scene.artist and all((a, word) in self.sprites for word in words)]
            artist = draw.choice(others)
            return replace(scene, artist=artist, style=self.styles[artist])
        if kind == "order":
            words.reverse()
        else:
            others = [w for w in self.words if w not in words and (scene.artist, w) in self.sprites]
            words[draw.randrange(len(words))] = draw.choice(others)
        things = tuple(replace(thing, word=word) for thing, word in zip(scene.things, words, strict=True))
        return replace(scene, things=things)

    def picture(self, scene: Scene, size: int = PICTURE_SIZE, restyle: random.Random | None = None) -> Image.Image:
        """Render the scene as an RGB picture of `size` pixels a side; with `restyle`, as any other hand might."""
        sprites = []
        for thing in scene.things:
            sprite = self.sprites[scene.artist, thing.word]
            if thing.hand is not None:
                sprite = restyled(sprite, random.Random(f"hand/{thing.hand}"))
            sprites.append(sprite if restyle is None else restyled(sprite, restyle))
        return compose(sprites, scene.things, COLOURS[scene.colour], size)


def compose(
    sprites: list[Image.Image], places: tuple[Placed, ...], colour: tuple[int, int, int], size: int
) -> Image.Image:
    """Paste RGBA `sprites` at their `places` on a flat background of `colour`."""
    picture = Image.new("RGB", (size, size), colour)
    for sprite, place in zip(sprites, places, strict=True):
        side = max(4, round(place.size * size))
        tilted = sprite.rotate(place.tilt, Image.Resampling.BILINEAR) if place.tilt else sprite
        small = tilted.resize(
            (side, side), Image.Resampling.BOX if side * 2 < sprite.width else Image.Resampling.LANCZOS
        )
        picture.paste(small, (round(place.x * size - side / 2), round(place.y * size - side / 2)), small)
    return picture


def on_grid(size: float, column: int, row: int) -> tuple[float, float]:
    """Centre of a thing of `size` whose left upper corner is at (column, row) of the grid, in fractions of the picture."""
    step = GRID / PICTURE_SIZE
    return column * step + size / 2, row * step + size / 2


def places_left(size: float) -> int:
    """How many columns, or rows, of the grid a thing of `size` can begin at."""
    return round((1 - size) * PICTURE_SIZE) // GRID + 1


def _places(draw: random.Random, layout: Layout, words: list[str]) -> tuple[Placed, ...]:
    # Pairs show small drawings twice already, and a large one has more parts to learn.
    size = SMALL if layout != "one" else draw.choice((BIG, BIG, MEDIUM, MEDIUM, SMALL))
    room = places_left(size)
    placed = []
    for side, word in enumerate(words):
        column, row = draw.randrange(room), draw.randrange(room)
        if layout == "left-right":
            column, row = side * (room - 1), draw.randrange(1, room - 1)
        elif layout == "above-below":
            column, row = draw.randrange(1, room - 1), side * (room - 1)
        tilt = draw.choice(TILTS) if draw.random() < 0.1 else 0.0
        placed.append(Placed(word, *on_grid(size, column, row), size, tilt))
    return tuple(placed)


def restyled(sprite: Image.Image, draw: random.Random) -> Image.Image:
    """The sprite as another hand might draw it: other hues, flatter or greyer colours, a black outline."""
    from PIL import ImageChops, ImageFilter, ImageOps

    alpha = sprite.getchannel("A")
    hue, saturation, value = sprite.convert("RGB").convert("HSV").split()
    turn = round(draw.gauss(0, 14)) if draw.random() < 0.8 else draw.randrange(256)
    hue = hue.point(lambda h: (h + turn) % 256)
    gain, light = draw.choice((0.3, 0.7, 1.0, 1.3)), draw.uniform(0.75, 1.2)
    saturation = saturation.point(lambda s: min(255, round(s * gain)))
    value = value.point(lambda v: min(255, round(v * light)))
    picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if draw.random() < 0.3:
        picture = ImageOps.posterize(picture, draw.choice((2, 3)))
    if draw.random() < 0.5:
        black = Image.new("RGB", picture.size, (0, 0, 0))
        if draw.random() < 0.6:  # lines inside, where the drawing's tones meet
            lines = sprite.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda e: 255 if e > 40 else 0)
            picture.paste(black, mask=lines.filter(ImageFilter.MaxFilter(3)))
        grown = alpha.filter(ImageFilter.MaxFilter(draw.choice((5, 7))))
        picture.paste(black, mask=ImageChops.invert(alpha))
        alpha = grown
    picture.putalpha(alpha)
    return ImageOps.mirror(picture) if draw.random() < 0.3 else picture

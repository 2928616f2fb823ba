"""The picture world: deterministic compositions of individuals and things, each a scene from which captions are drawn."""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from svdiff.base.compose import NOBODY, PICTURE_SIZE, compose
from svdiff.base.individuals import SIDES, Individual, Sprites, population, render
from svdiff.base.styles import BY_NAME, STYLES
from svdiff.base.words import COLOURS, made_up_words
from svdiff.errors import SvdiffError

#: What stands in a picture begins at multiples of this many pixels, one latent position.
GRID = 8
BIG, MEDIUM, SMALL = SIDES
Layout = Literal["one", "left-right", "above-below"]
Split = Literal["train", "held-out"]
Change = Literal["what", "trait", "expression", "colour", "order"]


@dataclass(frozen=True)
class Thing:
    """An object beside the individuals, as one artist drew it."""

    word: str
    artist: str

    @property
    def kind(self) -> str:
        """The class word."""
        return self.word


@dataclass(frozen=True)
class Placed:
    """Somebody or something in a picture: side and left upper corner in pixels of a 64×64 picture."""

    what: Individual | Thing
    side: int
    left: int
    top: int
    mirrored: bool = False
    expression: str = ""


@dataclass(frozen=True)
class Scene:
    """What is in a picture. In pairs the first is the left or the upper one."""

    colour: str
    layout: Layout
    placed: tuple[Placed, ...]


def is_held_out(kind: str, colour: str) -> bool:
    """Whether this combination of kind and background (one in twelve) is kept out of training."""
    return zlib.crc32(f"{kind}/{colour}".encode()) % 12 == 3


class World:
    """Individuals by style, things from `folder` (as `svdiff base world` writes it), and the pictures made of them.

    `known` are the individuals that the base is trained on, `others` the held-out ones of every style. `strangers` are
    of held-out styles: the base never sees them, evaluators may.
    """

    def __init__(
        self, folder: str | Path, cache: str | Path, individuals: int, named: int, held_out: int = 160
    ) -> None:
        folder = Path(folder)
        if not (folder / "things.json").is_file():
            raise SvdiffError(f"{folder} holds no picture world: run `dvc pull`, or `svdiff base world` to make it")
        self.known: dict[str, list[Individual]] = {}
        self.others: dict[str, list[Individual]] = {}
        self.strangers: dict[str, list[Individual]] = {}
        names = iter(made_up_words())
        for style in STYLES:
            known, others = population(style, 0 if style.held_out else individuals, held_out)
            self.known[style.name] = [replace(i, name=next(names)) for i in known[:named]] + known[named:]
            self.others[style.name] = others
            if style.held_out:
                self.strangers[style.name] = population(style, individuals // 2, held_out)[0]
        self.cache = Path(cache)
        self.drawings: dict[Thing, Image.Image] = {}
        info = json.loads((folder / "things.json").read_text())
        for artist in info["artists"]:
            sheet = Image.open(folder / f"{artist}.webp").convert("RGBA")
            size = info["sprite_size"]
            for n, word in enumerate(info["words"]):
                column, row = n % info["columns"], n // info["columns"]
                box = (column * size, row * size, (column + 1) * size, (row + 1) * size)
                self.drawings[Thing(word, artist)] = sheet.crop(box)
        self.things = {thing: number for number, thing in enumerate(self.drawings)}

    @functools.cached_property
    def sprites(self) -> Sprites:
        """Everybody's drawings; rendered when the first picture is asked for, which takes minutes."""
        groups = (*self.known.values(), *self.others.values(), *self.strangers.values())
        return Sprites([i for group in groups for i in group], list(self.drawings.values()), self.cache)

    def table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Everybody's pixels as `compose` takes them, P×4; a gigabyte or two."""
        return torch.from_numpy(self.sprites.table).view(-1, 4).to(device)

    @property
    def kinds(self) -> list[str]:
        """Class words of the individuals that training shows."""
        return list(dict.fromkeys(BY_NAME[style].kind for style, known in self.known.items() if known))

    def _somebody(
        self, draw: random.Random, split: Split, kind: str | None, named: float, strangers: float = 0.0
    ) -> Individual:
        groups = self.known if split == "train" else self.others
        kind = kind or draw.choice(self.kinds)
        if strangers and draw.random() < strangers:
            foreign = [style for style in self.strangers if BY_NAME[style].kind == kind]
            if foreign:
                return draw.choice(self.strangers[draw.choice(foreign)])
        styles = [s for s, known in self.known.items() if known and BY_NAME[s].kind == kind]
        group = groups[draw.choice(styles)]
        if split == "train" and draw.random() < named:
            return draw.choice([i for i in group if i.name is not None])
        return draw.choice(group)

    def scene(
        self,
        seed: int,
        index: int,
        split: Split = "train",
        pairs: float = 0.3,
        named: float = 0.3,
        strangers: float = 0.0,
    ) -> Scene:
        """The scene of (seed, index). `held-out`: held-out individuals, on any background.

        `pairs` is the share of scenes with two in them, `named` that of individuals with names of their own, `strangers`
        that of individuals in a held-out style where the kind has one.
        """
        draw = random.Random(f"{seed}/{index}")
        while True:
            colour = draw.choice(list(COLOURS))
            what: list[Individual | Thing] = [self._somebody(draw, split, None, named, strangers)]
            layout: Layout = "one"
            if draw.random() < pairs:
                layout = "left-right" if draw.random() < 0.7 else "above-below"
                second = draw.random()
                if second < 0.45:
                    what.append(draw.choice(list(self.things)))
                else:
                    kind = what[0].kind if second < 0.7 else None
                    what.append(self._somebody(draw, split, kind, named, strangers))
                draw.shuffle(what)
            elif draw.random() < 0.06:
                what = [draw.choice(list(self.things))]
            if split == "held-out" or not any(is_held_out(w.kind, colour) for w in what):
                break
        return Scene(colour, layout, _place(draw, layout, what))

    def altered(self, scene: Scene, draw: random.Random) -> tuple[Scene, Change]:
        """The scene with one thing changed and nothing else: who or what, expression, background or order."""
        kinds: list[Change] = ["what", "trait", "colour"]
        if len(scene.placed) == 2:
            kinds.append("order")
        number = draw.randrange(len(scene.placed))
        one = scene.placed[number]
        if isinstance(one.what, Individual):
            kinds.append("expression")
        kind = draw.choice(kinds)
        if kind == "colour":
            return replace(scene, colour=draw.choice([c for c in COLOURS if c != scene.colour])), kind
        if kind == "order":
            first, second = scene.placed
            return replace(scene, placed=(replace(first, what=second.what, expression=second.expression),
                                          replace(second, what=first.what, expression=first.expression))), kind  # fmt: skip
        if kind == "expression" and isinstance(one.what, Individual):
            every = [e for e in BY_NAME[one.what.style].expressions if e != one.expression]
            new = replace(one, expression=draw.choice(every))
        elif kind == "trait" and isinstance(one.what, Individual):
            new = replace(one, what=draw.choice(self.known[one.what.style] or self.others[one.what.style]))
        else:
            what = self._somebody(draw, "train", draw.choice([k for k in self.kinds if k != one.what.kind]), 0.3)
            new = replace(one, what=what, expression=draw.choice(list(BY_NAME[what.style].expressions)))
        placed = list(scene.placed)
        placed[number] = new
        return replace(scene, placed=tuple(placed)), kind

    def layout(self, scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scenes as `compose` takes them: places N×2×5 and backgrounds N×3."""
        places = [[self._place(one) for one in scene.placed] + [NOBODY] * (2 - len(scene.placed)) for scene in scenes]
        return torch.tensor(places), torch.tensor([COLOURS[scene.colour] for scene in scenes], dtype=torch.uint8)

    def _place(self, one: Placed) -> tuple[int, int, int, int, int]:
        what = one.what if isinstance(one.what, Individual) else self.things[one.what]
        return self.sprites.pixel(what, one.expression, one.side), one.side, one.left, one.top, int(one.mirrored)

    def arrays(self, scenes: list[Scene]) -> torch.Tensor:
        """The scenes as uint8 N×64×64×3."""
        return compose(self.table(), *self.layout(scenes))

    def array(self, scene: Scene) -> np.ndarray:
        """The scene as uint8 (64, 64, 3)."""
        return self.arrays([scene])[0].numpy()

    def picture(self, scene: Scene) -> Image.Image:
        """The scene as an RGB picture."""
        return Image.fromarray(self.array(scene))


def draw_large(scene: Scene, zoom: int, things: Mapping[Thing, Image.Image] | None = None) -> Image.Image:
    """The scene `zoom` times as large, with everybody drawn afresh and sharp; `things` as `World.drawings` has them."""
    picture = Image.new("RGB", (zoom * PICTURE_SIZE, zoom * PICTURE_SIZE), COLOURS[scene.colour])
    for one in scene.placed:
        side = zoom * one.side
        if isinstance(one.what, Individual):
            sprite = render(one.what, one.expression, side)
        else:
            sprite = (things or {})[one.what].resize((side, side), Image.Resampling.LANCZOS)
        if one.mirrored:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.paste(sprite, (zoom * one.left, zoom * one.top), sprite)
    return picture


def _place(draw: random.Random, layout: Layout, what: list[Individual | Thing]) -> tuple[Placed, ...]:
    side = SMALL if layout != "one" else draw.choice((BIG, BIG, MEDIUM, MEDIUM, SMALL))
    room = (PICTURE_SIZE - side) // GRID
    placed = []
    for number, one in enumerate(what):
        column, row = draw.randint(0, room), draw.randint(0, room)
        if layout == "left-right":
            column, row = number * room, draw.randint(1, room - 1)
        elif layout == "above-below":
            column, row = draw.randint(1, room - 1), number * room
        expression, mirrored = "", False
        if isinstance(one, Individual):
            expression = draw.choice(list(BY_NAME[one.style].expressions))
            mirrored = draw.random() < 0.3
        placed.append(Placed(one, side, column * GRID, row * GRID, mirrored, expression))
    return tuple(placed)

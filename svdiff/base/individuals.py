"""Individuals of the picture world: drawn from their traits by the artists' own packages, and stored as sprites.

Needs `pip install svdiff[world]`. Nothing here is needed to use the base that is there.
"""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svdiff.base.styles import BY_NAME, STYLES, Style
from svdiff.errors import SvdiffError
from svdiff.files import atomic_file

#: Sides in pixels at which individuals stand in 64×64 pictures.
SIDES = (56, 48, 32)
_RENDERED = 112
#: Bytes of one drawing at all sides.
ROW = sum(4 * side * side for side in SIDES)
#: Individuals with a number from here on are held out of every training.
HELD_OUT = 100_000


@dataclass(frozen=True)
class Individual:
    """Somebody: a style and a value for each of its traits. `name` is a word of the individual's own, if it has one."""

    style: str
    number: int
    traits: tuple[tuple[str, str], ...]
    name: str | None = None

    @property
    def kind(self) -> str:
        """The class word."""
        return BY_NAME[self.style].kind


def _missing(package: str) -> SvdiffError:
    return SvdiffError(f"{package} is not installed: it draws the picture world; `pip install svdiff[world]`")


@functools.cache
def _definition(name: str) -> dict[str, Any]:
    try:
        import dicebear_styles
    except ImportError:
        raise _missing("dicebear-styles") from None
    return json.loads((Path(next(iter(dicebear_styles.__path__))) / f"{name}.json").read_text())


@functools.cache
def _artist(name: str) -> Any:
    from dicebear import Style as Definition

    return Definition(_definition(name))


def variants(style: Style, trait: str) -> tuple[str, ...]:
    """The values that a trait can take."""
    chosen = style.traits[trait]
    if chosen is not None:
        return chosen
    definition = _definition(style.name)
    if trait.endswith("Variant"):
        return tuple(definition["components"][trait.removesuffix("Variant")]["variants"])
    colours = definition["colors"][trait.removesuffix("Color")]
    return tuple(colours["values"] if isinstance(colours, dict) else colours)


def _draw_traits(style: Style, draw: random.Random) -> tuple[tuple[str, str], ...]:
    traits = {}
    for trait in style.traits:
        part = trait.removesuffix("Variant")
        absent = trait.endswith("Variant") and draw.random() * 100 >= style.chances.get(part, 100)
        value = draw.choice(variants(style, trait))
        if not absent:
            traits[trait] = value
    return tuple(traits.items())


def population(style: Style, count: int, held_out: int) -> tuple[list[Individual], list[Individual]]:
    """`count` individuals for training and `held_out` others, no two of which have the same traits."""
    draw = random.Random(f"population/{style.name}")
    if style.package == "robohash":  # few enough to be listed
        every = [tuple(zip(style.traits, choice, strict=True)) for choice in itertools.product(
            *(variants(style, trait) for trait in style.traits))]  # fmt: skip
        draw.shuffle(every)
        count = min(count, len(every) - held_out)
    else:
        every = list(dict.fromkeys(_draw_traits(style, draw) for _ in range(2 * (count + held_out))))
    others = every[:held_out]  # first, so that more individuals for training change no held-out one
    known = every[held_out : held_out + count]
    return (
        [Individual(style.name, number, traits) for number, traits in enumerate(known)],
        [Individual(style.name, HELD_OUT + number, traits) for number, traits in enumerate(others)],
    )


@functools.cache
def _cat_layer(layer: str, number: int, size: int) -> Image.Image:
    try:
        import robohash
    except ImportError:
        raise _missing("robohash") from None
    folders = {"body": "000#00body", "fur": "001#01fur", "eyes": "002#02eyes", "mouth": "003#03mouth",
               "accessory": "004#04accessories"}  # fmt: skip
    folder = Path(next(iter(robohash.__path__))) / "sets" / "set4" / folders[layer]
    (path,) = (
        folder.glob(f"*#*{layer}{number}.png") if layer != "accessory" else folder.glob(f"*#accessory{number}.png")
    )
    return Image.open(path).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def render(individual: Individual, expression: str, size: int = _RENDERED) -> Image.Image:
    """The individual with this expression, as an RGBA picture of `size` pixels a side."""
    style, traits = BY_NAME[individual.style], dict(individual.traits)
    face = style.expressions[expression]
    if style.package == "robohash":
        picture = Image.new("RGBA", (size, size))
        for layer in ("body", "fur", "eyes", "mouth", "accessory"):
            picture = Image.alpha_composite(picture, _cat_layer(layer, int({**traits, **face}[layer]), size))
        return picture
    try:
        import resvg_py
        from dicebear import Avatar
    except ImportError:
        raise _missing("dicebear-core or resvg-py") from None
    left, top, side = _frame(style.name)
    whole = round(size / side)
    options: dict[str, Any] = {"seed": "", "size": whole, "backgroundColor": ["#00000000"]}
    for component in _definition(style.name)["components"]:
        key = f"{component}Variant"
        if key in traits or key in face:
            options[key] = [traits.get(key) or face[key]]
            options[f"{component}Probability"] = 100
        elif key in style.traits or component in ("animation", "pattern", "cheeks", "texture", "clothesGraphic"):
            options[f"{component}Probability"] = 0
    options |= {trait: [value] for trait, value in traits.items() if trait.endswith("Color")}
    svg = Avatar(_artist(style.name), options).to_json()["svg"]
    drawn = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    x, y = round(left * whole), round(top * whole)
    return drawn.crop((x, y, x + size, y + size))


#: Left, top and side of the square that is drawn of each artist's canvas, in fractions of it: margins are left out.
_FRAMES = {"voxel-bot": (0.09, 0.05, 0.88), "clay": (0.04, 0.06, 0.92), "toon-head": (0.07, 0.06, 0.9),
           "personas": (0.09, 0.06, 0.84), "bottts": (0.02, 0.0, 0.96)}  # fmt: skip


def _frame(name: str) -> tuple[float, float, float]:
    return _FRAMES.get(name, (0.0, 0.0, 1.0))


def _drawn(individual: Individual) -> list[np.ndarray]:
    """A row of the table for each expression: the sides one after the other."""
    every = (render(individual, expression) for expression in BY_NAME[individual.style].expressions)
    return [flat_sides(picture) for picture in every]


def flat_sides(picture: Image.Image) -> np.ndarray:
    """The RGBA picture at all SIDES, as one premultiplied uint8 array of ROW values."""
    whole = picture.convert("RGBa")
    sides = (np.asarray(whole.resize((side, side), Image.Resampling.LANCZOS)) for side in SIDES)
    return np.concatenate([one.ravel() for one in sides])


class Sprites:
    """The drawings of many individuals with all their expressions, and of things: rendered once, mapped from a file."""

    def __init__(self, individuals: list[Individual], things: list[Image.Image], folder: Path) -> None:
        self._first, rows = {}, 0
        for one in individuals:
            self._first[one.style, one.number] = rows
            rows += len(BY_NAME[one.style].expressions)
        self._things = rows
        drawings = [flat_sides(picture) for picture in things]
        identity = hashlib.sha256(repr((individuals, SIDES, STYLES)).encode())
        identity.update(b"".join(one.tobytes() for one in drawings))
        path = folder / f"sprites-{identity.hexdigest()[:16]}.npy"
        if not path.is_file():
            self._render(path, individuals, drawings)
        self.table: np.ndarray = np.load(path, mmap_mode="c")

    def _render(self, path: Path, individuals: list[Individual], drawings: list[np.ndarray]) -> None:
        import multiprocessing

        from tqdm import tqdm

        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (self._things + len(drawings), ROW)
        with atomic_file(path) as temporary, multiprocessing.get_context("fork").Pool() as pool:
            table = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            row = 0
            found = pool.imap(_drawn, individuals, chunksize=16)
            for rows in tqdm(found, desc="individuals", total=len(individuals), mininterval=5):
                table[row : row + len(rows)] = rows
                row += len(rows)
            table[self._things :] = drawings
            table.flush()
            del table

    def pixel(self, what: Individual | int, expression: str, side: int) -> int:
        """Where in the table, counted in pixels, the drawing of an individual or of the thing of a number starts."""
        if isinstance(what, int):
            row = self._things + what
        else:
            row = self._first[what.style, what.number] + list(BY_NAME[what.style].expressions).index(expression)
        before = SIDES[: SIDES.index(side)]
        return row * ROW // 4 + sum(one * one for one in before)

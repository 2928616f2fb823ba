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


def sprite_sides(picture: Image.Image) -> list[np.ndarray]:
    """The RGBA picture at each of SIDES as premultiplied uint8 arrays (side, side, 4)."""
    whole = picture.convert("RGBa")
    return [np.asarray(whole.resize((side, side), Image.Resampling.LANCZOS)) for side in SIDES]


class Sprites:
    """The drawings of many individuals with all their expressions, rendered once and mapped from a file."""

    def __init__(self, individuals: list[Individual], folder: Path) -> None:
        self.index = {(i.style, i.number): n for n, i in enumerate(individuals)}
        widest = max(len(style.expressions) for style in STYLES)
        identity = hashlib.sha256(repr((individuals, SIDES, STYLES)).encode()).hexdigest()[:16]
        path = folder / f"sprites-{identity}.npy"
        size = sum(side * side * 4 for side in SIDES)
        if not path.is_file():
            from tqdm import tqdm

            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                table = np.lib.format.open_memmap(
                    temporary, mode="w+", dtype=np.uint8, shape=(len(individuals), widest, size)
                )
                for n, individual in enumerate(tqdm(individuals, desc="individuals", mininterval=5)):
                    for e, expression in enumerate(BY_NAME[individual.style].expressions):
                        table[n, e] = np.concatenate(
                            [part.ravel() for part in sprite_sides(render(individual, expression))]
                        )
                table.flush()
                del table
        self.table = np.load(path, mmap_mode="r")

    def get(self, individual: Individual, expression: str, side: int) -> np.ndarray:
        """Premultiplied uint8 array (side, side, 4)."""
        e = list(BY_NAME[individual.style].expressions).index(expression)
        start = 0
        for one in SIDES:
            if one == side:
                row = self.table[self.index[individual.style, individual.number], e, start : start + side * side * 4]
                return row.reshape(side, side, 4)
            start += one * one * 4
        raise ValueError(f"side {side} is not one of {SIDES}")

"""Edits whose right answer is known: scenes of the picture world, before and after.

The picture to edit is a composition that the base was not trained on (`world.is_held_out`), and because we compose it, the
picture that the edit should lead to can be composed as well: nothing but what was asked for has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Literal

from svdiff.base.captions import WHERE, sides, with_article
from svdiff.base.things import COLOURS
from svdiff.base.world import (
    BIG,
    MEDIUM,
    SMALL,
    Layout,
    Placed,
    Scene,
    World,
    is_held_out,
    on_grid,
    places_left,
)
from svdiff.errors import SvdiffError
from svdiff.experiments.edits import KnownEdit

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 256  # pixels; as the pictures of concepts
GREYS = ("white", "black", "gray")

Kind = Literal["background", "remove", "move", "zoom"]
#: Edits that change where things are: those that the paper gives more noise (Sec. 3.4).
STRUCTURAL: tuple[Kind, ...] = ("move", "zoom")


@dataclass(frozen=True)
class SceneEdit:
    """An edit of a composed picture: what is there, what is asked for, and how that would look."""

    name: str
    kind: Kind
    before: Scene
    after: Scene
    prompt: str
    target: str

    @property
    def structural(self) -> bool:
        """Whether things change their places or sizes."""
        return self.kind in STRUCTURAL

    def known(self, world: World) -> KnownEdit:
        """The edit as the experiment takes it."""
        pictures = self.picture(world), self.answer(world)
        return KnownEdit(self.name, self.kind, self.structural, self.prompt, self.target, *pictures)

    def picture(self, world: World) -> Image:
        """The picture to edit, SIZE × SIZE."""
        return world.picture(self.before, SIZE)

    def answer(self, world: World) -> Image:
        """The picture that the edit should lead to, SIZE × SIZE."""
        return world.picture(self.after, SIZE)


def scene_edits(world: World) -> list[SceneEdit]:
    """The edits of the benchmark, two of each kind, for what `world` can draw; the same world gives the same edits.

    Raises SvdiffError if nothing that is held out can be found for one of them.
    """
    return [recipe(world) for recipe in RECIPES]


def describe(scene: Scene) -> str:
    """A prompt in the words that captions of the world use: the things, their places, the background."""
    nouns = [with_article(thing.word) for thing in scene.things]
    if scene.layout == "one":
        (thing,) = scene.things
        adjective = {BIG: "big ", SMALL: "small "}.get(thing.size, "")
        text = " ".join([with_article(adjective + thing.word), *(WHERE[side] for side in sides(thing)[:1])])
    elif scene.layout == "left-right":
        text = f"{nouns[0]} on the left and {nouns[1]} on the right"
    else:
        text = f"{nouns[0]} above {nouns[1]}"
    return f"{text} on a {scene.colour} background"


def _one(world: World, word: str, size: float = MEDIUM) -> Scene:
    return _held_out(world, "one", (_centred(word, size),))


def _centred(word: str, size: float) -> Placed:
    middle = places_left(size) // 2
    return Placed(word, *on_grid(size, middle, middle), size, 0.0)


def _pair(world: World, first: str, second: str) -> Scene:
    return _held_out(world, "left-right", _places((first, second), "left-right"))


def _places(words: tuple[str, str], layout: Layout) -> tuple[Placed, ...]:
    last = places_left(SMALL) - 1
    spots = [(0, last // 2), (last, last // 2)] if layout == "left-right" else [(last // 2, 0), (last // 2, last)]
    return tuple(Placed(word, *on_grid(SMALL, *spot), SMALL, 0.0) for word, spot in zip(words, spots, strict=True))


def _held_out(world: World, layout: Layout, things: tuple[Placed, ...]) -> Scene:
    """The scene on the first background by the first artist for which it was kept out of training."""
    for colour, artist in product([c for c in COLOURS if c not in GREYS], world.artists):
        drawn = all((artist, thing.word) in world.sprites for thing in things)
        if drawn and any(is_held_out(thing.word, artist, colour) for thing in things):
            return Scene(artist, world.styles[artist], colour, layout, things)
    raise SvdiffError(
        f"the picture world has no held-out picture of {' and '.join(thing.word for thing in things)}; "
        "expected the words of svdiff/base/things.py: run `dvc pull data.dvc`"
    )


def _edit(name: str, kind: Kind, before: Scene, after: Scene) -> SceneEdit:
    return SceneEdit(name, kind, before, after, describe(before), describe(after))


def _recolour(name: str, scene: Scene) -> SceneEdit:
    """Another background: the colour farthest from the one that is there."""
    ours = COLOURS[scene.colour]
    colours = [colour for colour in COLOURS if colour not in GREYS]
    farthest = max(colours, key=lambda c: sum((a - b) ** 2 for a, b in zip(COLOURS[c], ours, strict=True)))
    return _edit(name, "background", scene, replace(scene, colour=farthest))


def _keep(name: str, scene: Scene, kept: int) -> SceneEdit:
    """One of two things taken away; the other stays where it is."""
    return _edit(name, "remove", scene, replace(scene, layout="one", things=(scene.things[kept],)))


def _rearrange(name: str, scene: Scene, layout: Layout, words: tuple[str, str]) -> SceneEdit:
    """The same two things at other places."""
    return _edit(name, "move", scene, replace(scene, layout=layout, things=_places(words, layout)))


def _zoom(name: str, scene: Scene, size: float) -> SceneEdit:
    """The same thing, larger or smaller."""
    return _edit(name, "zoom", scene, replace(scene, things=(_centred(scene.things[0].word, size),)))


RECIPES: tuple[Callable[[World], SceneEdit], ...] = (
    lambda world: _recolour("dog-background", _one(world, "dog")),
    lambda world: _recolour("cat-tree-background", _pair(world, "cat", "tree")),
    lambda world: _keep("remove-car", _pair(world, "panda", "car"), kept=0),
    lambda world: _keep("remove-tree", _pair(world, "tree", "frog"), kept=1),
    lambda world: _rearrange("swap-bear-rocket", _pair(world, "bear", "rocket"), "left-right", ("rocket", "bear")),
    lambda world: _rearrange("dog-above-car", _pair(world, "dog", "car"), "above-below", ("dog", "car")),
    lambda world: _zoom("zoom-in-lion", _one(world, "lion", SMALL), BIG),
    lambda world: _zoom("zoom-out-penguin", _one(world, "penguin", BIG), SMALL),
)

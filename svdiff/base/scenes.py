"""Edits whose right answer is known: scenes of the picture world, before and after.

The picture to edit shows an individual whom nothing was trained on, and because we compose it, the picture that the edit
should lead to can be composed as well: nothing but what was asked for has changed.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from svdiff.base.captions import WHERE, feature_phrase, sides, with_article
from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.individuals import Individual
from svdiff.base.styles import BY_NAME, spoken
from svdiff.base.words import COLOURS
from svdiff.base.world import MEDIUM, SMALL, Placed, Scene, World, draw_large
from svdiff.errors import SvdiffError
from svdiff.experiments.edits import KnownEdit

if TYPE_CHECKING:
    from PIL.Image import Image

SIZE = 256  # pixels; as the pictures of concepts
GREYS = ("white", "black", "gray")
_MIDDLE = (PICTURE_SIZE - SMALL) // 2
_LEFT, _RIGHT = (0, _MIDDLE), (PICTURE_SIZE - SMALL, _MIDDLE)

Kind = Literal["background", "expression", "remove", "add", "move", "zoom"]
#: Edits that change where somebody is or how large: those that the paper gives more noise (Sec. 3.4).
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
        """Whether places or sizes change."""
        return self.kind in STRUCTURAL

    def known(self, world: World) -> KnownEdit:
        """The edit as the experiment takes it."""
        pictures = self.picture(world), self.answer(world)
        return KnownEdit(self.name, self.kind, self.structural, self.prompt, self.target, *pictures)

    def picture(self, world: World) -> Image:
        """The picture to edit, SIZE × SIZE."""
        return draw_large(self.before, SIZE // PICTURE_SIZE, world.drawings)

    def answer(self, world: World) -> Image:
        """The picture that the edit should lead to, SIZE × SIZE."""
        return draw_large(self.after, SIZE // PICTURE_SIZE, world.drawings)


def scene_edits(world: World) -> list[SceneEdit]:
    """The edits of the benchmark; the same world gives the same edits.

    Raises SvdiffError if nobody who is held out will do for one of them.
    """
    return [recipe(world) for recipe in RECIPES]


def describe(scene: Scene, features: tuple[str, ...] = ()) -> str:
    """A prompt in the words of captions: who is there and what is there, of their features those in `features`, and where."""
    nouns = []
    for one in scene.placed:
        words, tail = [one.what.kind], ""
        if isinstance(one.what, Individual):
            whole, _, drawn = spoken(BY_NAME[one.what.style], dict(one.what.traits))
            words = [word for word in (one.expression, whole, one.what.kind) if word]
            said = [feature_phrase(word) for word in drawn if word in features]
            tail = " with " + " and ".join(said) if said else ""
        if scene.layout == "one" and one.side == SMALL:
            words.insert(0, "small")
        nouns.append(with_article(" ".join(words)) + tail)
    if scene.layout == "one":
        text = " ".join([*nouns, *(WHERE[side] for side in sides(scene.placed[0])[:1])])
    else:
        text = f"{nouns[0]} on the left and {nouns[1]} on the right"
    return f"{text} on {with_article(scene.colour)} background"


def _who(world: World, style: str, **traits: tuple[str, ...]) -> Individual:
    """The first held-out individual of a style with one of these values of each of these traits."""
    for who in world.others[style]:
        if all(dict(who.traits).get(trait) in values for trait, values in traits.items()):
            return who
    asked = " and ".join(f"{trait} {' or '.join(values)}" for trait, values in traits.items())
    raise SvdiffError(
        f"none of the world's {len(world.others[style])} held-out individuals of {style} has {asked}: "
        "raise base_training.world.held_out"
    )


def _alone(who: Individual, side: int = MEDIUM, corner: tuple[int, int] | None = None) -> Scene:
    """Somebody smiling, in the middle or at a corner in pixels, on a background of another colour."""
    left, top = corner or ((PICTURE_SIZE - side) // 2,) * 2
    colour = random.Random(str(who.traits)).choice(_colours(who))
    return Scene(colour, "one", (Placed(who, side, left, top, expression="smiling"),))


def _colours(who: Individual) -> list[str]:
    """Backgrounds on which somebody stands out: not gray, nor the colour of the whole."""
    whole, _, _ = spoken(BY_NAME[who.style], dict(who.traits))
    return [colour for colour in COLOURS if colour not in (*GREYS, "brown", whole)]


def _edit(name: str, kind: Kind, before: Scene, after: Scene, feature: str = "") -> SceneEdit:
    said = (feature,)
    return SceneEdit(name, kind, before, after, describe(before, said), describe(after, said))


def _changed(scene: Scene, **changes: object) -> Scene:
    """The scene of one with something else about whom it shows."""
    return replace(scene, placed=(replace(scene.placed[0], **changes),))  # type: ignore[arg-type]


def _recolour(name: str, who: Individual) -> SceneEdit:
    """Another background: the colour farthest from the one that is there."""
    scene = _alone(who)
    ours = COLOURS[scene.colour]
    farthest = max(_colours(who), key=lambda c: sum((a - b) ** 2 for a, b in zip(COLOURS[c], ours, strict=True)))
    return _edit(name, "background", scene, replace(scene, colour=farthest))


def _sadden(name: str, who: Individual) -> SceneEdit:
    """Another expression."""
    scene = _alone(who)
    return _edit(name, "expression", scene, _changed(scene, expression="sad"))


def _shrink(name: str, who: Individual) -> SceneEdit:
    """The same individual, smaller."""
    scene = _alone(who)
    return _edit(name, "zoom", scene, _changed(scene, side=SMALL, left=_MIDDLE, top=_MIDDLE))


def _move(name: str, who: Individual, start: tuple[int, int], end: tuple[int, int]) -> SceneEdit:
    """The same individual at another place."""
    scene = _alone(who, SMALL, start)
    return _edit(name, "move", scene, _changed(scene, left=end[0], top=end[1]))


def _accompany(name: str, world: World, who: Individual, word: str) -> SceneEdit:
    """A thing added on the right of somebody who stays on the left."""
    scene = _alone(who, SMALL, _LEFT)
    thing = next(thing for thing in world.things if thing.word == word)
    added = (*scene.placed, Placed(thing, SMALL, *_RIGHT))
    return _edit(name, "add", scene, replace(scene, layout="left-right", placed=added))


def _take_off(name: str, who: Individual, feature: str, trait: str, without: str | None) -> SceneEdit:
    """An accessory gone: the individual with the same other traits, which has no number of its own."""
    scene = _alone(who)
    traits = {**dict(who.traits), trait: without}
    bare = replace(who, number=-1, traits=tuple((t, value) for t, value in traits.items() if value is not None))
    return _edit(name, "remove", scene, _changed(scene, what=bare), feature)


RECIPES: tuple[Callable[[World], SceneEdit], ...] = (
    lambda world: _recolour("cat-background", _who(world, "revoy")),
    lambda world: _recolour("critter-background", _who(world, "critters")),
    lambda world: _sadden("sad-person", _who(world, "toon-head")),
    lambda world: _sadden("sad-plant", _who(world, "sprouts")),
    lambda world: _take_off(
        "glasses-off",
        _who(world, "avataaars", accessoriesVariant=("prescription01", "round")),
        "glasses",
        "accessoriesVariant",
        None,
    ),
    lambda world: _take_off("hat-off", _who(world, "revoy", accessory=("5", "13")), "hat", "accessory", "15"),
    lambda world: _accompany("robot-and-tree", world, _who(world, "voxel-bot"), "tree"),
    lambda world: _shrink("smaller-robot", _who(world, "bottts")),
    lambda world: _move("critter-to-the-right", _who(world, "critters"), _LEFT, _RIGHT),
    lambda world: _move("plant-to-the-left", _who(world, "sprouts"), _RIGHT, _LEFT),
)

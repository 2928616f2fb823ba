"""Whether pictures show what captions ask for, told by linear probes on CLIP's pictures that are trained on real ones.

CLIP shares no weights with the base, so that it can judge it; each probe's accuracy on real pictures stands beside.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from svdiff.base.captions import feature_phrase, with_article
from svdiff.base.individuals import Individual
from svdiff.base.styles import BY_NAME, spoken
from svdiff.base.world import Scene, World

SEED = 90_001  # far from every seed of training
_REAL = 3000


@dataclass(frozen=True)
class Attribute:
    """Something that a caption can ask for: `label` reads it from a scene (None: not asked there), `say` words it."""

    name: str
    label: Callable[[Scene], str | None]
    say: Callable[[Scene], str]


def _only(scene: Scene) -> Individual | None:
    what = scene.placed[0].what
    return what if len(scene.placed) == 1 and isinstance(what, Individual) else None


def _colour(scene: Scene) -> str | None:
    who = _only(scene)
    return None if who is None else spoken(BY_NAME[who.style], dict(who.traits))[0]


_WORN = {
    "hat",
    "scarf",
    "glasses",
    "sunglasses",
    "beard",
    "horns",
    "antenna",
    "ears",
    "flower",
    "stripes",
    "dots",
    "bow",
}


def _feature(scene: Scene) -> str | None:
    who = _only(scene)
    if who is None:
        return None
    words = spoken(BY_NAME[who.style], dict(who.traits))[2]
    return next((word for word in words if word in _WORN), None)


def _part(scene: Scene, part: str) -> str | None:
    who = _only(scene)
    return None if who is None else spoken(BY_NAME[who.style], dict(who.traits))[1].get(part)


def _kind(scene: Scene) -> str:
    return scene.placed[0].what.kind


def _pair(scene: Scene) -> str | None:
    return (
        _kind(scene)
        if scene.layout == "left-right" and scene.placed[0].what.kind != scene.placed[1].what.kind
        else None
    )


ATTRIBUTES = (
    Attribute("kind", lambda s: _kind(s) if len(s.placed) == 1 else None, lambda s: with_article(_kind(s))),
    Attribute(
        "background",
        lambda s: s.colour,
        lambda s: f"{with_article(_kind(s))} on {with_article(s.colour)} background",
    ),
    Attribute("colour", _colour, lambda s: with_article(f"{_colour(s)} {_kind(s)}")),
    Attribute(
        "feature",
        _feature,
        lambda s: f"{with_article(_kind(s))} with {feature_phrase(str(_feature(s)))}",
    ),
    Attribute("hair", lambda s: _part(s, "hair"), lambda s: f"a person with {_part(s, 'hair')} hair"),
    Attribute("pot", lambda s: _part(s, "pot"), lambda s: f"a plant with {with_article(str(_part(s, 'pot')))} pot"),
    Attribute(
        "expression",
        lambda s: (s.placed[0].expression or None) if _only(s) is not None else None,
        lambda s: with_article(f"{s.placed[0].expression} {_kind(s)}"),
    ),
    Attribute(
        "order",
        _pair,
        lambda s: f"{with_article(_kind(s))} on the left and {with_article(s.placed[1].what.kind)} on the right",
    ),
)


def _scenes(world: World, attribute: Attribute, count: int, first: int) -> list[Scene]:
    """Scenes in which the attribute can be asked for; held-out individuals."""
    found: list[Scene] = []
    index = first
    while len(found) < count:
        scene = world.scene(SEED, index, "held-out", pairs=1.0 if attribute.name == "order" else 0.0)
        index += 1
        if attribute.label(scene) is not None:
            found.append(scene)
    return found


class Probe:
    """A linear classifier of an attribute on embeddings of real pictures of training's individuals."""

    def __init__(self, world: World, attribute: Attribute, encode: Any) -> None:
        scenes: list[Scene] = []
        index = 0
        while len(scenes) < _REAL:
            scene = world.scene(SEED + 1, index, pairs=1.0 if attribute.name == "order" else 0.0, named=0.0)
            index += 1
            if attribute.label(scene) is not None:
                scenes.append(scene)
        labels = [str(attribute.label(scene)) for scene in scenes]
        self.classes = sorted(set(labels))
        x = torch.as_tensor(np.asarray(encode([world.picture(scene) for scene in scenes]))).float()
        y = torch.tensor([self.classes.index(label) for label in labels])
        self.encode = encode
        self.linear = torch.nn.Linear(x.shape[1], len(self.classes))
        optimiser = torch.optim.LBFGS(self.linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(20 * self.linear(x), y) + 1e-3 * self.linear.weight.pow(2).sum()
            loss.backward()
            return loss

        optimiser.step(closure)

    @torch.no_grad()
    def accuracy(self, pictures: list[Image.Image], labels: list[str]) -> float:
        """Share of pictures that are told to show what was asked for."""
        told = self.linear(torch.as_tensor(np.asarray(self.encode(pictures))).float()).argmax(1).tolist()
        return sum(self.classes[t] == label for t, label in zip(told, labels, strict=True)) / len(labels)


def obedience(
    world: World, encode: Any, draw: Callable[[list[str]], list[Image.Image]], count: int
) -> dict[str, float]:
    """For each attribute `obeys_<name>` of `count` drawn pictures, and `real_<name>` of real ones on the same probe."""
    numbers = {}
    for attribute in ATTRIBUTES:
        probe = Probe(world, attribute, encode)
        scenes = _scenes(world, attribute, count, 0)
        random.Random(attribute.name).shuffle(scenes)
        labels = [str(attribute.label(scene)) for scene in scenes]
        numbers[f"real_{attribute.name}"] = probe.accuracy([world.picture(scene) for scene in scenes], labels)
        numbers[f"obeys_{attribute.name}"] = probe.accuracy(draw([attribute.say(scene) for scene in scenes]), labels)
    return numbers

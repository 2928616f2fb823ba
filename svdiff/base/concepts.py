"""Concept folders: five pictures each of one individual whom neither the base nor an evaluator has ever seen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.individuals import HELD_OUT, Individual, population
from svdiff.base.styles import BY_NAME, STYLES
from svdiff.base.words import COLOURS
from svdiff.base.world import GRID, Placed, Scene, draw_large
from svdiff.files import atomic_dir, write_atomic

CONCEPT_SIZE = 256
#: Sides of the individual in its pictures, in pixels of a 64×64 picture.
_SIDES = (56, 32, 48, 32, 32)


@dataclass(frozen=True)
class Concept:
    """A folder of `data/concepts`: a held-out individual by its style and number."""

    name: str
    style: str
    number: int


CONCEPTS = (
    Concept("scarf-cat", "revoy", 0),
    Concept("green-cat", "revoy", 14),
    Concept("white-cat", "revoy", 9),
    Concept("bow-cat", "revoy", 8),
    Concept("bobble-critter", "critters", 9),  # looks like the next one
    Concept("antenna-critter", "critters", 13),
    Concept("clay-critter", "clay", 13),  # of a style that the base has never seen
    Concept("gray-robot", "bottts", 1),
    Concept("pink-robot", "bottts", 5),
    Concept("yellow-robot", "voxel-bot", 7),
    Concept("pink-flower", "sprouts", 3),  # looks like the next one
    Concept("violet-flower", "sprouts", 13),
    Concept("bearded-man", "toon-head", 4),
    Concept("woman-with-glasses", "avataaars", 3),
    Concept("man-with-hat", "avataaars", 7),
    Concept("curly-person", "personas", 2),  # of a style that the base has never seen
)


def individual(concept: Concept) -> Individual:
    """Who it is."""
    _, others = population(BY_NAME[concept.style], 1, concept.number + 1)
    return others[concept.number]


def rivals(concept: Concept, count: int = 99) -> list[Individual]:
    """Held-out individuals of the concept's style, without itself."""
    _, others = population(BY_NAME[concept.style], 1, count + 1)
    return [other for other in others if other != individual(concept)][:count]


def scenes(who: Individual, seed: str) -> list[Scene]:
    """Five scenes of an individual: other expressions, places, sizes and backgrounds, one of them mirrored."""
    draw = random.Random(seed)
    colours = draw.sample(list(COLOURS), len(_SIDES))
    expressions = list(BY_NAME[who.style].expressions)
    found = []
    for number, (side, colour) in enumerate(zip(_SIDES, colours, strict=True)):
        room = (PICTURE_SIZE - side) // GRID
        left, top = (GRID * draw.randint(0, room) for _ in range(2))
        one = Placed(who, side, left, top, number == 3, expressions[number % len(expressions)])
        found.append(Scene(colour, "one", (one,)))
    return found


def pictures(who: Individual, seed: str) -> list[Image.Image]:
    """The pictures of these scenes, CONCEPT_SIZE pixels a side."""
    return [draw_large(scene, CONCEPT_SIZE // PICTURE_SIZE) for scene in scenes(who, seed)]


def write_concepts(folder: Path) -> list[str]:
    """Write `folder/<name>/*.png`, five pictures each, and `folder/ATTRIBUTION.md`; returns the names."""
    for concept in CONCEPTS:
        with atomic_dir(folder / concept.name) as target:
            for number, picture in enumerate(pictures(individual(concept), f"concept/{concept.name}")):
                picture.save(target / f"{number:02d}.png", optimize=True)
    folders = "Folders: " + ", ".join(f"`{c.name}` ({c.style} {HELD_OUT + c.number})" for c in CONCEPTS) + ".\n"
    whose = attribution("The pictures of these folders are made of drawings by")
    write_atomic(folder / "ATTRIBUTION.md", f"{whose}\n{folders}")
    return [concept.name for concept in CONCEPTS]


def attribution(what: str) -> str:
    """Who drew the individuals, and under which licence."""
    lines = [
        "# Attribution",
        "",
        f"{what} these artists (layers combined, rasterised, placed on flat backgrounds).",
        "",
    ]
    lines += ["| style | author | licence | source | package |", "|---|---|---|---|---|"]
    lines += [f"| {s.name} | {s.author} | {s.licence} | {s.url} | {s.package} |" for s in STYLES]
    return "\n".join(lines) + "\n"

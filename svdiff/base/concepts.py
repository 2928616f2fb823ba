"""Concept folders: five pictures each of one thing as drawn by an artist whom the base has never seen."""

from __future__ import annotations

import json
import random
from pathlib import Path

from svdiff.base.artwork import attribution, fetch_icon_set
from svdiff.base.things import COLOURS, CONCEPT_ARTISTS, CONCEPTS, THINGS
from svdiff.base.world import BIG, MEDIUM, SMALL, TILTS, Placed, compose, on_grid, places_left
from svdiff.files import atomic_dir, write_atomic

PICTURES = 5
CONCEPT_SIZE = 256
_SHORT = {"openmoji": "openmoji", "emojione-v1": "emojione"}


def concept_name(artist: str, word: str) -> str:
    """The folder's name."""
    return f"{_SHORT[artist]}-{word}"


def write_concepts(folder: Path, cache: Path) -> list[str]:
    """Write `folder/<artist>-<thing>/*.png`, five compositions each, and `folder/ATTRIBUTION.md`; returns the names."""
    sets = {artist.name: fetch_icon_set(artist, cache) for artist in CONCEPT_ARTISTS}
    infos = {a.name: json.loads((cache / f"{a.name}-{a.version}" / "info.json").read_text()) for a in CONCEPT_ARTISTS}
    names = []
    for artist, word in CONCEPTS:
        name = concept_name(artist, word)
        draw = random.Random(f"concept/{name}")
        # Bigger than shown, so that tilting and shrinking stay sharp.
        sprite = sets[artist].render(THINGS[word], 2 * CONCEPT_SIZE)
        colours = ["white", *draw.sample([c for c in COLOURS if c not in ("white", "black")], PICTURES - 1)]
        with atomic_dir(folder / name) as target:
            for index, colour in enumerate(colours):
                size = (MEDIUM, BIG, SMALL, MEDIUM, BIG)[index]
                corner = draw.randrange(places_left(size)), draw.randrange(places_left(size))
                tilt = draw.choice(TILTS) if index == PICTURES - 1 else 0.0
                place = Placed(word, *on_grid(size, *corner), size, tilt)
                picture = compose([sprite], (place,), COLOURS[colour], CONCEPT_SIZE)
                picture.save(target / f"{index:02d}.png", optimize=True)
        names.append(name)
    what = (
        "The pictures of these folders are adapted from drawings of these packages (rasterised, tilted, placed on flat "
        "backgrounds) and are shared under the same licence, CC BY-SA 4.0. The folder's name says whose drawing it is."
    )
    write_atomic(folder / "ATTRIBUTION.md", attribution(CONCEPT_ARTISTS, infos, what))
    return names

"""What is written to data: the things' sheets and the concept folders, with who drew them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdiff.base import concepts, things
from svdiff.base.concepts import CONCEPTS, individual, pictures, rivals, write_concepts
from svdiff.base.config import WorldSettings
from svdiff.base.individuals import HELD_OUT
from svdiff.base.styles import STYLES
from svdiff.base.words import COLOURS, THINGS
from svdiff.base.world import Thing, World
from svdiff.errors import SvdiffError


def write_package(cache: Path, artist: things.Artist, spdx: str) -> None:
    """A fetched package in which every thing is a bar of its own height."""
    folder = cache / f"{artist.name}-{artist.version}"
    folder.mkdir(parents=True)
    bodies = {name: {"body": f'<rect x="3" y="2" width="30" height="{n + 1}" fill="red"/>'} for n, name in enumerate(THINGS.values())}  # fmt: skip
    (folder / "icons.json").write_text(json.dumps({"icons": bodies, "width": 40, "height": 40}))
    author = {"name": f"who drew {artist.name}", "url": "https://example.org"}
    licence = {"spdx": spdx, "url": "https://example.org/licence"}
    (folder / "info.json").write_text(json.dumps({"author": author, "license": licence}))


def test_the_world_reads_the_sheets_that_are_written(tmp_path: Path) -> None:
    for artist in things.ARTISTS:
        write_package(tmp_path / "cache", artist, artist.spdx)
    assert things.write_things(tmp_path / "world", tmp_path / "cache") == list(THINGS)
    world = World(tmp_path / "world", tmp_path, 1, 1, 1)
    assert set(world.drawings) == {Thing(word, artist.name) for word in THINGS for artist in things.ARTISTS}
    for n, word in enumerate(THINGS):
        box = world.drawings[Thing(word, "twemoji")].getchannel("A").getbbox()
        assert box is not None
        assert box[2] - box[0] == 128
        assert box[3] - box[1] == pytest.approx(128 * (n + 1) / 30, abs=2)
    text = (tmp_path / "world" / "ATTRIBUTION.md").read_text()
    for named in (*(f"who drew {a.name} | [{a.spdx}]" for a in things.ARTISTS), *(s.author for s in STYLES)):
        assert named in text


def test_another_licence_than_the_expected_is_refused(tmp_path: Path) -> None:
    write_package(tmp_path, things.ARTISTS[0], "CC-BY-NC-4.0")
    with pytest.raises(SvdiffError, match=r"noto.*CC-BY-NC-4\.0"):
        things.fetch(things.ARTISTS[0], tmp_path)


def test_icons_follow_aliases_and_are_trimmed() -> None:
    body = '<rect x="10" y="20" width="4" height="8" fill="red"/>'
    icons = {"icons": {"a": {"body": body}}, "aliases": {"b": {"parent": "a"}}, "width": 40, "height": 40}
    sprite = things.render_icon(things.svg(icons, "b"), 64)
    assert sprite.size == (64, 64)
    assert sprite.getchannel("A").getbbox() == (16, 0, 48, 64)
    with pytest.raises(SvdiffError, match="nothing-such"):
        things.svg(icons, "nothing-such")


def test_concepts_and_their_rivals_are_individuals_that_nothing_was_trained_on() -> None:
    assert len({concept.name for concept in CONCEPTS}) == len(CONCEPTS) >= 16
    assert len({individual(concept) for concept in CONCEPTS}) == len(CONCEPTS)
    assert {individual(concept).kind for concept in CONCEPTS} == {style.kind for style in STYLES}
    held_out = {style.name for style in STYLES if style.held_out}
    assert sum(concept.style in held_out for concept in CONCEPTS) >= 2
    limit = HELD_OUT + WorldSettings().held_out
    for concept in CONCEPTS:
        others = rivals(concept)
        assert len({other.traits for other in others}) == 99
        assert individual(concept).traits not in {other.traits for other in others}
        assert all(HELD_OUT <= who.number < limit for who in (individual(concept), *others))
        assert all(other.style == concept.style for other in others)


def test_a_concepts_pictures_show_it_in_several_ways() -> None:
    who = individual(CONCEPTS[0])
    found = concepts.scenes(who, "seed")
    assert {scene.placed[0].what for scene in found} == {who}
    assert len({scene.colour for scene in found}) == len(found) == 5
    assert len({scene.placed[0].expression for scene in found}) > 2
    assert len({scene.placed[0].side for scene in found}) == 3
    assert sum(scene.placed[0].mirrored for scene in found) == 1
    assert found != concepts.scenes(who, "other")


def test_concept_folders_hold_the_pictures_and_who_drew_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts, "CONCEPTS", CONCEPTS[:2])
    names = write_concepts(tmp_path)
    assert names == [concept.name for concept in CONCEPTS[:2]]
    for concept in CONCEPTS[:2]:
        expected = pictures(individual(concept), f"concept/{concept.name}")
        paths = sorted((tmp_path / concept.name).glob("*.png"))
        assert len(paths) == 5
        for path, picture in zip(paths, expected, strict=True):
            shown = np.asarray(Image.open(path))
            assert shown.shape == (256, 256, 3)
            assert (shown == np.asarray(picture)).all()
            assert tuple(shown[0, 0]) in COLOURS.values() or tuple(shown[-1, -1]) in COLOURS.values()
    text = (tmp_path / "ATTRIBUTION.md").read_text()
    assert all(f"{s.author} | {s.licence}" in text for s in STYLES)
    assert all(f"`{name}`" in text for name in names)

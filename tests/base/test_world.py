from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdiff.base.artwork import IconSet, fetch_icon_set
from svdiff.base.captions import WHERE, caption, vocabulary
from svdiff.base.clip import rival_captions
from svdiff.base.things import BASE_ARTISTS, COLOURS, CONCEPT_ARTISTS, CONCEPTS, HAND_WORDS, SPECIAL_WORDS, THINGS
from svdiff.base.world import BIG, GRID, PICTURE_SIZE, SMALL, Scene, World, is_held_out
from svdiff.errors import SvdiffError

REAL = Path("data/world/things.json")


def test_a_picture_depends_on_seed_and_index_alone(world_folder: Path) -> None:
    first, second = World(world_folder), World(world_folder)
    second.scene(5, 77)  # what was drawn before does not matter
    for index in range(30):
        one, other = first.scene(5, index), second.scene(5, index)
        assert one == other
        assert first.picture(one).tobytes() == second.picture(other).tobytes()
    assert {first.scene(5, i) for i in range(20)}.isdisjoint({first.scene(6, i) for i in range(20)})


def test_held_out_combinations_never_occur_in_training(world_folder: Path) -> None:
    world = World(world_folder)

    def combinations(split: str) -> list[list[bool]]:
        scenes = [world.scene(0, i, split) for i in range(400)]  # type: ignore[arg-type]
        return [[is_held_out(t.word, s.artist, s.colour) for t in s.things] for s in scenes]

    assert not any(any(c) for c in combinations("train"))
    assert all(any(c) for c in combinations("held-out"))
    share = np.mean([is_held_out(w, a.name, c) for w in THINGS for a in BASE_ARTISTS for c in COLOURS])
    assert 0.06 < share < 0.11


def test_the_background_is_the_named_colour_and_the_thing_is_inside(world_folder: Path) -> None:
    world = World(world_folder)
    for index in range(60):
        scene = world.scene(1, index)
        pixels = np.asarray(world.picture(scene))
        assert pixels.shape == (64, 64, 3)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (np.median(border, 0) == COLOURS[scene.colour]).all()
        for thing in scene.things:
            for middle in (thing.x, thing.y):
                corner = middle - thing.size / 2
                assert 0 <= corner <= 1 - thing.size
                assert corner * PICTURE_SIZE % GRID == 0


def test_pairs_stand_in_the_order_that_captions_name(world_folder: Path) -> None:
    world = World(world_folder)
    seen = set()
    for index in range(1500):
        scene = world.scene(2, index)
        if scene.layout == "one":
            continue
        first, second = scene.things
        assert (first.x < second.x) if scene.layout == "left-right" else (first.y < second.y)
        text = caption(scene, random.Random(index))
        for phrase, before in ((" on the left and ", True), (" to the left of ", True), (" to the right of ", False)):
            left, found, right = text.partition(phrase)
            if found and "thing" not in text:
                a, b = (first, second) if before else (second, first)
                assert a.word in left.split()
                assert b.word in right.split()
                seen.add(phrase)
    assert len(seen) == 3


def test_captions_say_truly_on_which_side_one_thing_stands(world_folder: Path) -> None:
    world = World(world_folder)
    seen = set()
    for index in range(2000):
        scene = world.scene(7, index)
        text = caption(scene, random.Random(index))
        if scene.layout != "one":
            continue
        (thing,) = scene.things
        truth = {"left": thing.x < 0.5, "right": thing.x > 0.5, "top": thing.y < 0.5, "bottom": thing.y > 0.5}
        for side, phrase in WHERE.items():
            if phrase in text:
                assert truth[side]
                seen.add(side)
        assert ("big" in text.split()) <= (thing.size == BIG)
        assert ("small" in text.split()) <= (thing.size == SMALL)
    assert seen == set(WHERE)


def test_an_alteration_changes_one_thing_alone(world_folder: Path) -> None:
    world = World(world_folder)
    draw = random.Random(0)
    for index in range(300):
        scene = world.scene(4, index)
        other = world.altered(scene, draw)
        words, others = ([t.word for t in s.things] for s in (scene, other))
        changes = [scene.artist != other.artist, scene.colour != other.colour, words != others]
        assert sum(changes) == 1
        assert [(t.x, t.y, t.size, t.tilt) for t in scene.things] == [(t.x, t.y, t.size, t.tilt) for t in other.things]
        assert other.style == world.styles[other.artist]


def test_rival_captions_are_untrue_or_the_caption_itself(world_folder: Path) -> None:
    world = World(world_folder)
    draw = random.Random(0)
    shown = 0
    for index in range(400):
        scene = world.scene(6, index)
        own, *rivals = rival_captions(world, scene, True, draw, 2)
        for rival in rivals:
            shown += rival != own
            if rival != own and set(rival.split()) == set(own.split()):  # the same words in another order
                assert {"left", "right", "above", "below", "top", "under"} & set(own.split())
    assert shown > 400


def test_hands_redraw_alike_and_are_always_named(world_folder: Path) -> None:
    world = World(world_folder)
    of = {hand: artist for artist in world.artists for hand in world.hands(artist)}
    assert sorted(of) == sorted(HAND_WORDS)  # each belongs to one artist
    drawings: dict[tuple[str | None, str, str], set[bytes]] = {}
    for index in range(1200):
        scene, plain = world.scene(9, index, hands=0.5), world.scene(9, index)
        assert [replace(thing, hand=None) for thing in scene.things] == list(plain.things)
        named = [word for word in caption(scene, random.Random(index)).split() if word in of]
        assert sorted(named) == sorted(thing.hand for thing in scene.things if thing.hand is not None)
        assert all(of[word] == scene.artist for word in named)
        if named:
            assert world.picture(scene).tobytes() != world.picture(plain).tobytes()
        for thing in scene.things:
            alone = Scene(scene.artist, scene.style, "blue", "one", (replace(thing, x=0.5, y=0.5, size=BIG, tilt=0.0),))
            drawings.setdefault((thing.hand, scene.artist, thing.word), set()).add(world.picture(alone).tobytes())
    assert len(drawings) > 100
    assert all(len(same) == 1 for same in drawings.values())


def test_the_hand_stands_before_the_noun_that_it_drew(world_folder: Path) -> None:
    world = World(world_folder)
    shown = 0
    for index in range(400):
        scene = world.scene(9, index, pairs=1.0, hands=0.5)
        words = caption(scene, random.Random(index)).split()
        for thing in scene.things:
            if thing.hand is not None and thing.word in words:
                shown += 1
                assert (thing.hand, thing.word) in pairwise(words)
    assert shown > 200


def test_captions_use_known_words_and_no_special_one(world_folder: Path) -> None:
    world = World(world_folder)
    words = set(vocabulary())
    used: set[str] = set()
    for index in range(3000):
        used |= set(caption(world.scene(3, index, hands=0.2), random.Random(index)).split())
    assert used <= words
    assert not used & set(SPECIAL_WORDS)
    assert not set(SPECIAL_WORDS) & set(HAND_WORDS)
    assert {"thing", "style", "beside", "big", "small", "background"} <= used


def test_no_concept_artist_is_a_base_artist() -> None:
    base, concepts = {a.name for a in BASE_ARTISTS}, {a.name for a in CONCEPT_ARTISTS}
    assert not base & concepts
    assert {artist for artist, _ in CONCEPTS} == concepts
    assert len({word for artist, word in CONCEPTS if (next(iter(concepts - {artist})), word) in CONCEPTS}) >= 2
    if REAL.is_file():
        assert set(json.loads(REAL.read_text())["artists"]) == base


def test_another_licence_than_the_expected_is_refused(tmp_path: Path) -> None:
    artist = BASE_ARTISTS[0]
    folder = tmp_path / f"{artist.name}-{artist.version}"
    folder.mkdir()
    (folder / "icons.json").write_text("{}")
    (folder / "info.json").write_text(json.dumps({"license": {"spdx": "CC-BY-NC-4.0"}}))
    with pytest.raises(SvdiffError, match=r"CC-BY-NC-4\.0"):
        fetch_icon_set(artist, tmp_path)


def test_icons_follow_aliases_and_are_trimmed() -> None:
    pytest.importorskip("resvg_py")
    body = '<rect x="10" y="20" width="4" height="8" fill="red"/>'
    icons = {"icons": {"a": {"body": body}}, "aliases": {"b": {"parent": "a"}}, "width": 40, "height": 40}
    drawn = IconSet(BASE_ARTISTS[0], icons)
    assert "b" in drawn
    sprite = drawn.render("b", 64)
    assert sprite.size == (64, 64)
    assert sprite.getchannel("A").getbbox() == (16, 0, 48, 64)
    assert isinstance(sprite, Image.Image)
    with pytest.raises(SvdiffError, match="nothing-such"):
        drawn.render("nothing-such")

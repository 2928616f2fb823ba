"""Scenes, pictures and captions of the world of individuals."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from world_parts import tiny_world

from svdiff.base.captions import WHERE, caption, full_caption, vocabulary
from svdiff.base.clip import rival_captions
from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.config import WorldSettings
from svdiff.base.individuals import HELD_OUT, Individual, population, render
from svdiff.base.styles import BY_NAME, EXPRESSIONS, STYLES, colour_word, spoken
from svdiff.base.words import COLOURS, SPECIAL_WORDS, made_up_words
from svdiff.base.world import BIG, GRID, SMALL, Placed, Scene, World, draw_large, is_held_out
from svdiff.errors import SvdiffError


def people(scene: Scene) -> list[Individual]:
    return [one.what for one in scene.placed if isinstance(one.what, Individual)]


@pytest.mark.slow
def test_a_picture_depends_on_seed_and_index_alone(world: World, world_folder: Path, sprites: Path) -> None:
    other = tiny_world(world_folder, sprites)
    other.scene(5, 77)  # what was drawn before does not matter
    for index in range(30):
        assert world.scene(5, index) == other.scene(5, index)
        assert (world.array(world.scene(5, index)) == other.array(other.scene(5, index))).all()
    assert {world.scene(5, i) for i in range(20)}.isdisjoint({world.scene(6, i) for i in range(20)})


def test_a_missing_world_is_said(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match="dvc pull"):
        World(tmp_path, tmp_path, 1, 1)


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_no_two_individuals_are_alike_and_more_of_them_change_no_held_out_one(style) -> None:
    known, others = population(style, 60, 40)
    traits = [who.traits for who in (*known, *others)]
    assert len(set(traits)) == len(traits) == 100
    assert population(style, 300, 10)[1] == others[:10]
    assert population(style, 60, 60)[1][:40] == others
    assert all(who.number >= HELD_OUT for who in others)
    assert all(who.number < HELD_OUT for who in known)


def test_every_named_individual_has_a_word_of_its_own() -> None:
    settings = WorldSettings()
    names = settings.named * sum(not style.held_out for style in STYLES)
    words = vocabulary(names)
    assert len(words) == len(set(words))
    assert len([word for word in words if word in made_up_words()[:names]]) == names


def test_training_shows_nothing_that_is_held_out(world: World) -> None:
    train = [world.scene(0, index, pairs=0.6) for index in range(600)]
    seen = {who for scene in train for who in people(scene)}
    assert all(who.number < HELD_OUT and not BY_NAME[who.style].held_out for who in seen)
    assert not any(is_held_out(one.what.kind, scene.colour) for scene in train for one in scene.placed)
    tests = [world.scene(0, index, "held-out", pairs=0.6) for index in range(600)]
    assert all(who.number >= HELD_OUT for scene in tests for who in people(scene))
    assert any(is_held_out(one.what.kind, scene.colour) for scene in tests for one in scene.placed)
    share = np.mean([is_held_out(style.kind, colour) for style in STYLES for colour in COLOURS])
    assert 0.02 < share < 0.2


def test_strangers_come_only_where_they_are_asked_for(world: World) -> None:
    def foreign(share: float) -> int:
        scenes = [world.scene(0, index, strangers=share) for index in range(200)]
        return sum(BY_NAME[who.style].held_out for scene in scenes for who in people(scene))

    assert foreign(0.0) == 0
    assert foreign(0.5) > 20


def test_all_is_drawn_inside_its_square_on_the_named_background(world: World) -> None:
    for index in range(120):
        scene = world.scene(1, index, pairs=0.5)
        pixels, empty = world.array(scene), np.ones((PICTURE_SIZE, PICTURE_SIZE), bool)
        for one in scene.placed:
            assert one.left % GRID == one.top % GRID == 0
            assert min(one.left, one.top) >= 0
            assert max(one.left, one.top) + one.side <= PICTURE_SIZE
            square = np.s_[one.top : one.top + one.side, one.left : one.left + one.side]
            assert empty[square].all(), "one covers the other"
            empty[square] = False
            assert (pixels[square] != COLOURS[scene.colour]).any(axis=2).mean() > 0.1
        assert (pixels[empty] == COLOURS[scene.colour]).all()


def test_a_mirror_image_is_one(world: World) -> None:
    who = world.known["revoy"][0]
    plain = Scene("blue", "one", (Placed(who, 48, 8, 8, expression="happy"),))
    mirrored = replace(plain, placed=(replace(plain.placed[0], mirrored=True),))
    assert (world.array(plain) == world.array(mirrored)[:, ::-1]).all()
    assert (world.array(plain) != world.array(mirrored)).any()


def test_large_pictures_show_what_small_ones_do(world: World) -> None:
    for index in range(12):
        scene = world.scene(3, index, pairs=0.5)
        large = draw_large(scene, 4, world.drawings).resize((PICTURE_SIZE, PICTURE_SIZE), 4)
        assert np.abs(np.asarray(large).astype(int) - world.array(scene)).mean() < 3


@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_expressions_and_traits_show(style) -> None:
    """No two expressions look alike; a change of one trait shows; the same is drawn the same."""
    draw = random.Random(0)
    known, _ = population(style, 40, 1)
    who = known[0]
    drawings = [render(who, expression, 64).tobytes() for expression in style.expressions]
    assert len(set(drawings)) == len(drawings)
    assert render(who, next(iter(style.expressions)), 64).tobytes() == drawings[0]
    for other in draw.sample(known[1:], 4):
        assert render(other, next(iter(style.expressions)), 64).tobytes() != drawings[0]


def test_captions_name_pairs_in_the_order_in_which_they_stand(world: World) -> None:
    seen = set()
    for index in range(1500):
        scene = world.scene(2, index, pairs=1.0)
        first, second = scene.placed
        assert (first.left < second.left) if scene.layout == "left-right" else (first.top < second.top)
        text = caption(scene, random.Random(index))
        phrases = {" on the left and ": 1, " to the left of ": 1, " to the right of ": 0, " above ": 1, " below ": 0}
        for phrase, before in phrases.items():
            ahead, found, behind = text.partition(phrase)
            if found and "thing" not in text:
                a, b = (first, second) if before else (second, first)
                assert a.what.kind in ahead.split()
                assert b.what.kind in behind.split()
                seen.add(phrase)
    assert len(seen) == 5


def test_captions_say_truly_where_somebody_stands_how_large_and_on_what(world: World) -> None:
    seen = set()
    for index in range(2500):
        scene = world.scene(7, index, pairs=0.0)
        text = caption(scene, random.Random(index))
        (one,) = scene.placed
        x, y = one.left + one.side / 2, one.top + one.side / 2
        truth = {"left": x < 32, "right": x > 32, "top": y < 32, "bottom": y > 32}
        for side, phrase in WHERE.items():
            if phrase in text:
                assert truth[side]
                seen.add(side)
        assert ("big" in text.split()) <= (one.side == BIG)
        assert ("small" in text.split()) <= (one.side == SMALL)
        if "background" in text:
            assert text.endswith(f"{scene.colour} background")
    assert seen == set(WHERE)


def test_captions_say_of_individuals_what_is_drawn_and_no_more(world: World) -> None:
    features = {word for style in STYLES for table in style.features.values() for word in table.values()}
    every_name = set(made_up_words())
    said = dict.fromkeys(("expression", "colour", "feature", "name"), 0)
    for index in range(2500):
        scene = world.scene(8, index, pairs=0.0, named=0.5)
        if not (found := people(scene)):
            continue
        (who,) = found
        style = BY_NAME[who.style]
        words = caption(replace(scene, colour="white"), random.Random(index)).split()
        whole, parts, drawn = spoken(style, dict(who.traits))
        expressions = {word for word in words if word in EXPRESSIONS and word}
        assert expressions <= {scene.placed[0].expression}
        colours = {word for word in words if word in COLOURS} - {"white"}
        assert colours <= {whole, *parts.values()}
        spoken_of = {word for word in words if word in features and word not in style.word} - {"left", "top"}
        assert spoken_of <= {*drawn, *parts}
        names = {word for word in words if word in every_name}
        assert names <= {who.name}
        for key, what in (("expression", expressions), ("colour", colours), ("feature", spoken_of), ("name", names)):
            said[key] += bool(what)
    assert min(said.values()) > 100


def test_captions_use_known_words_and_no_special_one(world: World) -> None:
    words = set(vocabulary(600))
    used: set[str] = set()
    for index in range(3000):
        scene = world.scene(3, index, pairs=0.4)
        used |= set(caption(scene, random.Random(index)).split()) | set(full_caption(scene).split())
    assert used <= words
    assert not used & set(SPECIAL_WORDS)
    assert {"thing", "beside", "big", "small", "background", "smiling", "hat", "tree"} <= used


def test_an_alteration_changes_one_thing_alone(world: World) -> None:
    draw = random.Random(0)
    seen = set()
    for index in range(400):
        scene = world.scene(4, index, pairs=0.5)
        other, change = world.altered(scene, draw)
        seen.add(change)
        assert other != scene or change in ("trait", "order")  # of few individuals, the same may be drawn again
        assert (scene.colour != other.colour) == (change == "colour")
        pairs = list(zip(scene.placed, other.placed, strict=True))
        assert all((a.side, a.left, a.top, a.mirrored) == (b.side, b.left, b.top, b.mirrored) for a, b in pairs)
        who = [a.what != b.what for a, b in pairs]
        assert sum(who) == {"what": 1, "order": sum(who)}.get(change, min(sum(who), change == "trait"))
        if change == "expression":
            assert sum(a.expression != b.expression for a, b in pairs) == 1
        world.array(other)  # it can be drawn
    assert seen == {"what", "trait", "expression", "colour", "order"}


def test_rival_captions_of_another_order_are_untrue_or_the_caption_itself(world: World) -> None:
    draw = random.Random(0)
    differ = 0
    for index in range(400):
        scene = world.scene(6, index, pairs=0.5)
        own, *rivals = rival_captions(world, scene, draw, 2)
        assert len(rivals) == 2
        for rival in rivals:
            differ += rival != own
            if rival != own and sorted(rival.split()) == sorted(own.split()):  # the same words in another order
                assert {"left", "right", "above", "below", "top", "under"} & set(own.split())
    assert differ > 300


@pytest.mark.parametrize(
    ("value", "word"),
    [("#fafafa", "white"), ("#101010", "black"), ("#909090", "gray"), ("#d02020", "red"), ("#e08020", "orange"),
     ("#f0e040", "yellow"), ("#30a040", "green"), ("#3060d0", "blue"), ("#8040c0", "purple"), ("#6b4020", "brown"),
     ("#f0abfc", "pink")],
)  # fmt: skip
def test_colours_have_the_words_that_people_use(value: str, word: str) -> None:
    assert colour_word(value) == word

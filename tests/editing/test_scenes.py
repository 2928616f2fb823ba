"""The edits whose answer is known: never trained on, told as captions tell them, and different only as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svdiff.base.captions import vocabulary
from svdiff.base.scenes import RECIPES, SceneEdit, scene_edits
from svdiff.base.things import COLOURS, THINGS
from svdiff.base.world import World, is_held_out
from svdiff.errors import SvdiffError


@pytest.fixture(scope="module")
def world(world_folder: Path) -> World:
    return World(world_folder)


@pytest.fixture(scope="module")
def edits(world: World) -> dict[str, SceneEdit]:
    return {edit.name: edit for edit in scene_edits(world)}


def test_two_of_each_kind_and_all_different(edits: dict[str, SceneEdit]) -> None:
    assert len(edits) == len(RECIPES) == 8
    kinds = [edit.kind for edit in edits.values()]
    assert all(kinds.count(kind) == 2 for kind in ("background", "remove", "move", "zoom"))
    assert len({edit.prompt for edit in edits.values()}) == 8


def test_no_picture_to_edit_was_trained_on(edits: dict[str, SceneEdit]) -> None:
    for edit in edits.values():
        scene = edit.before
        assert any(is_held_out(thing.word, scene.artist, scene.colour) for thing in scene.things)


def test_prompts_say_what_is_there_in_words_that_captions_have(edits: dict[str, SceneEdit]) -> None:
    known = set(vocabulary())
    for edit in edits.values():
        for prompt, scene in ((edit.prompt, edit.before), (edit.target, edit.after)):
            words = prompt.split()
            assert set(words) <= known
            assert [word for word in words if word in THINGS] == [thing.word for thing in scene.things]
            assert f"on a {scene.colour} background" in prompt
        assert edit.prompt != edit.target


def pixels(edit: SceneEdit, world: World) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(edit.picture(world)).astype(int), np.asarray(edit.answer(world)).astype(int)


def test_another_background_leaves_the_thing_alone(edits: dict[str, SceneEdit], world: World) -> None:
    edit = edits["dog-background"]
    before, after = pixels(edit, world)
    changed = (before != after).any(axis=2)
    assert changed[0, 0]
    assert not changed[128, 128]
    assert tuple(after[0, 0]) == COLOURS[edit.after.colour]


def test_a_thing_taken_away_leaves_the_other_in_its_place(edits: dict[str, SceneEdit], world: World) -> None:
    for name, kept in (("remove-car", slice(0, 120)), ("remove-tree", slice(136, 256))):
        before, after = pixels(edits[name], world)
        assert (before[:, kept] == after[:, kept]).all()
        gone = after[:, slice(136, 256) if kept.start == 0 else slice(0, 120)]
        assert (gone == COLOURS[edits[name].before.colour]).all()


def test_moved_things_are_the_same_things_elsewhere(edits: dict[str, SceneEdit], world: World) -> None:
    before, after = pixels(edits["swap-bear-rocket"], world)
    assert (before != after).any()
    colours, counts = np.unique(before.reshape(-1, 3), axis=0, return_counts=True)
    others, other_counts = np.unique(after.reshape(-1, 3), axis=0, return_counts=True)
    assert np.array_equal(colours, others)
    assert np.array_equal(counts, other_counts)
    assert "small lion" in edits["zoom-in-lion"].prompt
    assert "big lion" in edits["zoom-in-lion"].target


def test_a_world_without_the_things_says_so(world_folder: Path) -> None:
    with pytest.raises(SvdiffError, match="no held-out picture of cat and tree"):
        scene_edits(World(world_folder, 8))

"""The edits whose answer is known: of individuals never trained on, told as captions tell, and different only as asked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from svdiff.base.captions import vocabulary
from svdiff.base.individuals import HELD_OUT
from svdiff.base.scenes import RECIPES, SceneEdit, scene_edits
from svdiff.base.styles import BY_NAME
from svdiff.base.words import COLOURS
from svdiff.base.world import World
from svdiff.errors import SvdiffError


@pytest.fixture(scope="module")
def edits(world: World) -> dict[str, SceneEdit]:
    return {edit.name: edit for edit in scene_edits(world)}


def test_every_edit_has_a_name_and_a_kind_and_the_same_world_the_same_edits(
    edits: dict[str, SceneEdit], world: World
) -> None:
    assert len(edits) == len(RECIPES) == 10
    assert {edit.kind for edit in edits.values()} == {"background", "expression", "remove", "add", "move", "zoom"}
    assert {edit.name for edit in edits.values() if edit.structural} == {
        "smaller-robot",
        "critter-to-the-right",
        "plant-to-the-left",
    }
    assert scene_edits(world) == list(edits.values())


def test_no_individual_to_edit_was_trained_on(edits: dict[str, SceneEdit]) -> None:
    for edit in edits.values():
        who = edit.before.placed[0].what
        assert who.number >= HELD_OUT
        assert not BY_NAME[who.style].held_out, "the base knows the style"


def test_prompts_are_in_words_that_captions_have(edits: dict[str, SceneEdit]) -> None:
    known = set(vocabulary(0))
    for edit in edits.values():
        for prompt, scene in ((edit.prompt, edit.before), (edit.target, edit.after)):
            words = prompt.split()
            assert set(words) <= known
            assert [word for word in words if word in {one.what.kind for one in scene.placed}] == [
                one.what.kind for one in scene.placed
            ]
            assert prompt.endswith(f"{scene.colour} background")
        assert edit.prompt != edit.target


def test_prompts_differ_in_what_is_asked_for_alone(edits: dict[str, SceneEdit]) -> None:
    def change(name: str) -> tuple[set[str], set[str]]:
        before, after = set(edits[name].prompt.split()), set(edits[name].target.split())
        return before - after, after - before

    assert change("sad-person") == change("sad-plant") == ({"smiling"}, {"sad"})
    assert change("glasses-off") == ({"with", "glasses"}, set())
    assert change("hat-off") == ({"with", "hat"}, set())
    assert change("smaller-robot") == (set(), {"small"})
    assert change("critter-to-the-right") == ({"left"}, {"right"})
    assert change("plant-to-the-left") == ({"right"}, {"left"})
    assert {"tree", "right"} <= change("robot-and-tree")[1]
    for name in ("cat-background", "critter-background"):
        assert change(name)[0] - {"a", "an"} == {edits[name].before.colour}


def pixels(edit: SceneEdit, world: World) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(edit.picture(world)).astype(int), np.asarray(edit.answer(world)).astype(int)


@pytest.mark.parametrize("name", ["cat-background", "critter-background"])
def test_another_background_leaves_the_individual_alone(name: str, edits: dict[str, SceneEdit], world: World) -> None:
    edit = edits[name]
    before, after = pixels(edit, world)
    assert before.shape == (256, 256, 3)
    assert tuple(before[0, 0]) == COLOURS[edit.before.colour]
    assert tuple(after[0, 0]) == COLOURS[edit.after.colour]
    same = (before == after).all(axis=2)
    assert 0.15 < same.mean() < 0.6
    assert not same[:32].any()
    assert not same[:, :32].any()


@pytest.mark.parametrize("name", ["sad-person", "sad-plant", "glasses-off", "hat-off"])
def test_a_small_edit_changes_a_small_part(name: str, edits: dict[str, SceneEdit], world: World) -> None:
    before, after = pixels(edits[name], world)
    assert 0.001 < (before != after).any(axis=2).mean() < 0.12


def test_a_thing_added_leaves_who_was_there_in_place(edits: dict[str, SceneEdit], world: World) -> None:
    edit = edits["robot-and-tree"]
    before, after = pixels(edit, world)
    assert (before[:, :128] == after[:, :128]).all()
    assert (before[:, 128:] == COLOURS[edit.before.colour]).all()
    assert (after[:, 128:] != COLOURS[edit.before.colour]).any()


@pytest.mark.parametrize("name", ["critter-to-the-right", "plant-to-the-left"])
def test_who_moves_is_the_same_elsewhere(name: str, edits: dict[str, SceneEdit], world: World) -> None:
    before, after = pixels(edits[name], world)
    assert (before[:, :128] == after[:, 128:]).all()
    assert (before[:, 128:] == after[:, :128]).all()
    assert (before != after).any()


def test_smaller_is_smaller_in_the_same_place(edits: dict[str, SceneEdit], world: World) -> None:
    edit = edits["smaller-robot"]
    drawn = [np.argwhere((p != COLOURS[edit.before.colour]).any(axis=2)) for p in pixels(edit, world)]
    large, small = ((found.max(0) - found.min(0)) for found in drawn)
    assert np.allclose(small / large, 32 / 48, atol=0.05)
    assert np.allclose(drawn[0].mean(0), drawn[1].mean(0), atol=10)


def test_a_world_with_nobody_for_an_edit_says_what_to_change(world_folder: Path) -> None:
    with pytest.raises(SvdiffError, match=r"1 held-out individuals of avataaars has accessoriesVariant.*held_out"):
        scene_edits(World(world_folder, world_folder, 1, 1, 1))

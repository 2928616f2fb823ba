from __future__ import annotations

import random
from pathlib import Path

from svdiff.base.captions import full_caption
from svdiff.base.measures import hard_captions, named_background, ordered_as_asked
from svdiff.base.world import World


def test_hard_captions_are_different_and_share_something(world_folder: Path) -> None:
    world = World(world_folder)
    for index in range(20):
        scene = world.scene(1, index)
        own, *others = hard_captions(world, scene, random.Random(index), 60)
        assert own == full_caption(scene, styles=True)
        assert len({own, *others}) == 60
        known = {scene.style, scene.colour, *(thing.word for thing in scene.things)}
        assert all(known & set(text.split()) for text in others)


def test_real_pictures_pass_the_tests_that_need_no_clip(world_folder: Path) -> None:
    world = World(world_folder)
    scenes = [world.scene(2, index, pairs=1.0) for index in range(12)]
    pictures = [world.picture(scene) for scene in scenes]
    assert [named_background(picture) for picture in pictures] == [scene.colour for scene in scenes]
    assert sum(ordered_as_asked(world, s, p) for s, p in zip(scenes, pictures, strict=True)) >= 11

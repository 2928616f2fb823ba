from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from PIL import ImageFilter

from svdiff.base.captions import full_caption
from svdiff.base.measures import hard_captions, named_background, nearness, ordered_as_asked
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


def test_nearness_tells_sharp_and_right_from_smeared_and_from_wrong(world_folder: Path) -> None:
    world = World(world_folder)
    scene = world.scene(3, 0, pairs=0.0)
    scene = replace(scene, things=(replace(scene.things[0], tilt=0.0),))
    picture = world.picture(scene)
    smeared = nearness(world, scene, picture.filter(ImageFilter.GaussianBlur(3)))
    other = next(word for word in world.words if word != scene.things[0].word)
    wrong = nearness(world, replace(scene, things=(replace(scene.things[0], word=other),)), picture)
    assert nearness(world, scene, picture) > 100
    assert smeared < 30
    assert wrong < smeared

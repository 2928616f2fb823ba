"""The classifiers that tell whether the base obeys prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from world_parts import tiny_config

from svdiff.base import clip, probes
from svdiff.base.individuals import Individual
from svdiff.base.probes import ATTRIBUTES, EXCLUSIVE, FEATURES, Probes, features, labels
from svdiff.base.text_encoder import NOT_ASKED
from svdiff.base.world import Placed, Scene, Thing, World

BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}


def person(**traits: str) -> Individual:
    return Individual("avataaars", 0, tuple(traits.items()))


def scene(*what: Individual | Thing, expression: str = "sad") -> Scene:
    placed = tuple(Placed(one, 32, 32 * n, 8, expression=expression) for n, one in enumerate(what))
    return Scene("blue", "one" if len(what) == 1 else "left-right", placed)


def test_a_scene_is_asked_for_what_it_shows() -> None:
    who = person(topVariant="hat", accessoriesVariant="round", facialHairVariant="beardMedium")
    alone, pair = scene(who), scene(Thing("tree", "noto"), who)
    words = {attribute.name: attribute.word(alone) for attribute in ATTRIBUTES}
    assert words == {
        "kind": "person", "background": "blue", "colour": None, "feature": "hat", "hair": None, "pot": None,
        "expression": "sad", "order": None,
    }  # fmt: skip
    assert BY_NAME["feature"].say(alone) == "a person with a hat"
    assert BY_NAME["expression"].say(alone) == "a sad person"
    assert [BY_NAME[name].word(pair) for name in ("kind", "order", "feature")] == [None, "tree", None]
    assert BY_NAME["order"].say(pair) == "a tree on the left and a person on the right"
    told = {word for word, there in zip(FEATURES, features(alone), strict=True) if there == 1}
    absent = {word for word, there in zip(FEATURES, features(alone), strict=True) if there == 0}
    assert told == {"hat", "glasses", "beard"}  # of which a prompt asks for one: the others are no mistake
    assert absent == {"sunglasses", "scarf"}  # what an avataaar could have
    assert set(features(pair)) == {NOT_ASKED}


def test_every_scene_of_the_world_has_a_place_among_the_words(world: World) -> None:
    scenes = [world.scene(1, number, pairs=0.4) for number in range(300)]
    rows = labels(scenes)
    assert rows.shape == (300, len(EXCLUSIVE) + len(FEATURES))
    for column, attribute in zip(rows.T, EXCLUSIVE, strict=False):
        asked = column != NOT_ASKED
        assert asked.any()
        found = [attribute.words[place] for place in column[asked].tolist()]
        assert found == [word for word in map(attribute.word, scenes) if word is not None]


def test_what_is_not_asked_weighs_nothing_and_a_rare_feature_its_rarity(world: World) -> None:
    sizes = [len(attribute.words) for attribute in EXCLUSIVE]
    answers = [torch.zeros(2, size) for size in (*sizes, len(FEATURES))]

    class Still(Probes):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(answers)

    asked = torch.full((2, len(sizes) + len(FEATURES)), NOT_ASKED)
    loss = Still().loss(torch.zeros(2), asked, torch.ones(len(FEATURES)))
    assert loss == 0
    asked[0, 0], asked[1, len(sizes) + 3] = 5, 1
    loss = Still().loss(torch.zeros(2), asked, torch.full((len(FEATURES),), 4.0))
    assert float(loss) == pytest.approx(float(torch.tensor(sizes[0]).log() + 4 * torch.tensor(2.0).log()))


@pytest.mark.slow
def test_they_learn_real_pictures_and_resume(world: World, world_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(world_folder, clip={"steps": 1, "batch_size": 4, "width": 8})
    assert clip.train(config, tmp_path / "clip")
    settings = replace_probes(config, steps=150)
    trained = probes.train(world, tmp_path / "clip", settings)
    untrained = Probes(tmp_path / "clip").eval()
    background = BY_NAME["background"]
    scenes = [world.scene(3, number) for number in range(48)]
    pictures, words = [world.picture(one) for one in scenes], [one.colour for one in scenes]
    assert trained.right(background, pictures, words) > 0.5 > untrained.right(background, pictures, words)
    again = probes.train(world, tmp_path / "clip", settings)  # nothing is left to train
    assert all(
        torch.equal(a, b) for a, b in zip(trained.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert 0 <= trained.false_features(pictures, scenes) <= 1


def replace_probes(config, **settings):
    return config.model_copy(
        update={"probes": config.probes.model_copy(update={"batch_size": 32, "lr": 3e-3} | settings)}
    )

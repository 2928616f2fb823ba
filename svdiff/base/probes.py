"""Whether pictures show what captions ask for, told by classifiers that are trained on real pictures.

They start from the pictures' half of the CLIP evaluator, which shares no weights with the base, so that they can judge it; how
right they are about real pictures stands beside.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from svdiff.base import loop
from svdiff.base.autoencoder import to_float
from svdiff.base.captions import feature_phrase, with_article
from svdiff.base.compose import compose
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.identity import noisy
from svdiff.base.individuals import Individual
from svdiff.base.styles import BY_NAME, EXPRESSIONS, KINDS, Style, spoken
from svdiff.base.text_encoder import NOT_ASKED
from svdiff.base.words import COLOURS, THINGS
from svdiff.base.world import Scene, World
from svdiff.errors import SvdiffError
from svdiff.files import sha256_tree

SEED = 90_001  # far from every seed of training

#: Features that are seen at this size and that captions ask for.
FEATURES = ("hat", "scarf", "glasses", "sunglasses", "beard", "horns", "antenna", "ears", "flower", "stripes", "dots",
            "bow")  # fmt: skip


@dataclass(frozen=True)
class Attribute:
    """Something of which captions ask for one of several words.

    `word` reads it from a scene (None: it is not asked there), `say` makes a prompt that asks for it.
    """

    name: str
    words: tuple[str, ...]
    word: Callable[[Scene], str | None]
    say: Callable[[Scene], str]


def _only(scene: Scene) -> Individual | None:
    what = scene.placed[0].what
    return what if len(scene.placed) == 1 and isinstance(what, Individual) else None


def _spoken(who: Individual) -> tuple[str | None, dict[str, str], list[str]]:
    return spoken(BY_NAME[who.style], dict(who.traits))


def _colour(scene: Scene) -> str | None:
    who = _only(scene)
    return None if who is None else _spoken(who)[0]


def _feature(scene: Scene) -> str | None:
    who = _only(scene)
    return None if who is None else next((word for word in _spoken(who)[2] if word in FEATURES), None)


def _part(scene: Scene, part: str) -> str | None:
    who = _only(scene)
    return None if who is None else _spoken(who)[1].get(part)


def _kind(scene: Scene) -> str:
    return scene.placed[0].what.kind


def _left(scene: Scene) -> str | None:
    kinds = {one.what.kind for one in scene.placed}
    return _kind(scene) if scene.layout == "left-right" and len(kinds) == 2 else None


ATTRIBUTES = (
    Attribute(
        "kind",
        (*KINDS, *THINGS),
        lambda s: _kind(s) if len(s.placed) == 1 else None,
        lambda s: with_article(_kind(s)),
    ),
    Attribute(
        "background",
        tuple(COLOURS),
        lambda s: s.colour,
        lambda s: f"{with_article(_kind(s))} on {with_article(s.colour)} background",
    ),
    Attribute("colour", tuple(COLOURS), _colour, lambda s: with_article(f"{_colour(s)} {_kind(s)}")),
    Attribute(
        "feature", FEATURES, _feature, lambda s: f"{with_article(_kind(s))} with {feature_phrase(str(_feature(s)))}"
    ),
    Attribute("hair", tuple(COLOURS), lambda s: _part(s, "hair"), lambda s: f"a person with {_part(s, 'hair')} hair"),
    Attribute(
        "pot",
        tuple(COLOURS),
        lambda s: _part(s, "pot"),
        lambda s: f"a plant with {with_article(str(_part(s, 'pot')))} pot",
    ),
    Attribute(
        "expression",
        tuple(word for word in EXPRESSIONS if word),
        lambda s: (s.placed[0].expression or None) if _only(s) is not None else None,
        lambda s: with_article(f"{s.placed[0].expression} {_kind(s)}"),
    ),
    Attribute(
        "order",
        (*KINDS, *THINGS),
        _left,
        lambda s: f"{with_article(_kind(s))} on the left and {with_article(s.placed[1].what.kind)} on the right",
    ),
)
EXCLUSIVE = tuple(attribute for attribute in ATTRIBUTES if attribute.name != "feature")


def _possible(style: Style) -> set[str]:
    return {word for table in style.features.values() for word in table.values()}


def features(scene: Scene) -> list[int]:
    """For each of FEATURES whether somebody alone has it: 1 or 0; NOT_ASKED where nobody of the style could."""
    who = _only(scene)
    if who is None:
        return [NOT_ASKED] * len(FEATURES)
    possible, own = _possible(BY_NAME[who.style]), _spoken(who)[2]
    return [int(word in own) if word in possible else NOT_ASKED for word in FEATURES]


def labels(scenes: Sequence[Scene]) -> torch.Tensor:
    """N×(attributes + features): places of words among those of each exclusive attribute, then `features`."""
    rows = []
    for scene in scenes:
        words = [attribute.word(scene) for attribute in EXCLUSIVE]
        places = [
            NOT_ASKED if word is None else attribute.words.index(word)
            for attribute, word in zip(EXCLUSIVE, words, strict=True)
        ]
        rows.append(places + features(scene))
    return torch.tensor(rows)


def _scenes(world: World, attribute: Attribute, count: int) -> list[Scene]:
    """Scenes of held-out individuals in which the attribute can be asked for."""
    found: list[Scene] = []
    index = 0
    while len(found) < count:
        scene = world.scene(SEED, index, "held-out", pairs=1.0 if attribute.name == "order" else 0.0)
        index += 1
        if attribute.word(scene) is not None:
            found.append(scene)
    random.Random(attribute.name).shuffle(found)
    return found


class Probes(torch.nn.Module):
    """CLIP's pictures with an answer for every word of every attribute. `clip` is a folder of open_clip's layout."""

    def __init__(self, clip: str | Path) -> None:
        import open_clip

        super().__init__()
        model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{clip}")
        self.trunk = model.float().visual
        statistics = (torch.tensor(numbers).view(3, 1, 1) for numbers in (self.trunk.image_mean, self.trunk.image_std))
        self.mean, self.std = (torch.nn.Buffer(numbers) for numbers in statistics)
        self.sizes = [*(len(attribute.words) for attribute in EXCLUSIVE), len(FEATURES)]
        self.linear = torch.nn.Linear(self.trunk.output_dim, sum(self.sizes))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """N×3×64×64 in [−1, 1] to logits N×words, one of each exclusive attribute, the last of FEATURES."""
        vectors = self.trunk(((x + 1) / 2 - self.mean) / self.std)
        answers: tuple[torch.Tensor, ...] = self.linear(vectors).float().split(self.sizes, dim=1)
        return answers

    def loss(self, x: torch.Tensor, asked: torch.Tensor, rarity: torch.Tensor) -> torch.Tensor:
        """Sum over attributes of the mean cross-entropy of what was asked; a feature that is there weighs its `rarity`."""
        *exclusive, worn = self(x)
        places, there = asked[:, : len(exclusive)], asked[:, len(exclusive) :]
        losses = [
            F.cross_entropy(answer, place, ignore_index=NOT_ASKED, reduction="sum") / (place != NOT_ASKED).sum().clip(1)
            for answer, place in zip(exclusive, places.T, strict=True)
        ]
        open_ = there != NOT_ASKED
        each = F.binary_cross_entropy_with_logits(worn, there.float().clip(0), pos_weight=rarity, reduction="none")
        return torch.stack(losses).sum() + (each * open_).sum() / open_.sum().clip(1)

    @torch.no_grad()
    def told(self, pictures: list[Image.Image]) -> tuple[torch.Tensor, ...]:
        """What `forward` answers about pictures."""
        x = to_float(torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])))
        where = self.linear.weight.device
        parts = [self(part.to(where)) for part in x.split(64)]
        return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))

    def right(self, attribute: Attribute, pictures: list[Image.Image], words: list[str]) -> float:
        """Share of pictures that are told to show their word."""
        answers = self.told(pictures)
        places = torch.tensor([attribute.words.index(word) for word in words])
        if attribute in EXCLUSIVE:
            told = answers[EXCLUSIVE.index(attribute)].argmax(1) == places
        else:
            told = answers[-1].gather(1, places[:, None]) > 0
        return float(told.float().mean())

    def false_features(self, pictures: list[Image.Image], scenes: list[Scene]) -> float:
        """Share of the features that nobody has, of those that their styles know, that are told to be there."""
        absent = torch.tensor([features(scene) for scene in scenes]) == 0
        return float((self.told(pictures)[-1] > 0)[absent].float().mean())


def train(world: World, clip: str | Path, config: BaseTrainingConfig) -> Probes:
    """Train on real pictures of training's individuals; resumes. Raises SvdiffError if it is stopped before its end."""
    settings, where = config.probes, loop.device()
    torch.manual_seed(config.seed + 6)
    probes = Probes(clip).train().to(where)
    optimiser = torch.optim.AdamW(probes.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    table = world.table(where)

    def scenes_of(step: int, count: int) -> list[Scene]:
        return [world.scene(SEED + 1, step * count + n, pairs=0.3, named=0.0) for n in range(count)]

    known = torch.tensor([features(scene) for scene in scenes_of(0, 4000)])
    rarity = ((known == 0).sum(0) / (known == 1).sum(0).clip(1)).clip(1, 30).to(where)

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        scenes = scenes_of(step, settings.batch_size)
        return *world.layout(scenes), labels(scenes)

    def learn(
        step: int, places: torch.Tensor, backgrounds: torch.Tensor, asked: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * loop.cosine_rate(step, settings.steps, 100, 0.9)
        x = to_float(compose(table, places, backgrounds))
        x = noisy(x, random.Random(f"probes/{step}"), loop.step_generator(config.seed, step, 6, where))
        with loop.autocast(where):
            loss = probes.loss(x, asked, rarity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(probes.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"loss": loss}

    ended = loop.run(
        "probes",
        steps=settings.steps,
        state={"probes": probes, "optimiser": optimiser},
        draw=draw,
        learn=learn,
        config=config,
        identity=f"{settings.model_dump_json()}/{config.world}/{config.seed}/{sha256_tree(Path(clip))}",
    )
    if not ended:
        raise SvdiffError("the training of the card's classifiers was stopped; the same command goes on from there")
    return probes.eval()


def obedience(
    world: World, probes: Probes, draw: Callable[[list[str]], list[Image.Image]], count: int
) -> dict[str, float]:
    """For each attribute `obeys_<name>` of `count` drawn pictures, and `real_<name>` of real ones; `real_feature_false`."""
    numbers = {}
    for attribute in ATTRIBUTES:
        scenes = _scenes(world, attribute, count)
        words = [str(attribute.word(scene)) for scene in scenes]
        real = [world.picture(scene) for scene in scenes]
        numbers[f"real_{attribute.name}"] = probes.right(attribute, real, words)
        if attribute.name == "feature":
            numbers["real_feature_false"] = probes.false_features(real, scenes)
        numbers[f"obeys_{attribute.name}"] = probes.right(
            attribute, draw([attribute.say(scene) for scene in scenes]), words
        )
    return numbers

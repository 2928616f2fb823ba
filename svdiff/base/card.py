"""The model card: what the embedded base can do, measured, with sheets of pictures none of which is chosen.

Identity, drift and text alignment are measured on the sixteen concepts by `svdiff.experiments`, with the settings of
params.yaml; whatever was trained already is not trained again.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image

from svdiff.base import loop, probes
from svdiff.base.autoencoder import psnr
from svdiff.base.captions import caption
from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.concepts import CONCEPTS, Concept, individual, pictures, rivals
from svdiff.base.config import BaseTrainingConfig, load_base_training
from svdiff.base.identity import view
from svdiff.base.individuals import Individual
from svdiff.base.probes import SEED
from svdiff.base.styles import STYLES
from svdiff.base.unet import TRAINING_FILE
from svdiff.base.world import Scene, World
from svdiff.config import Config, load_config
from svdiff.data.concepts import to_square
from svdiff.data.cutmix import PROBABILITY
from svdiff.data.mixes import pair_entry
from svdiff.evaluation.identity import both_identified, identity_top1, told_apart, variety
from svdiff.evaluation.intervals import mean_interval
from svdiff.evaluation.pairs import reference
from svdiff.evaluation.regions import find_two
from svdiff.evaluation.score import real_pictures
from svdiff.experiments.cells import Cell, Runner
from svdiff.experiments.pairs import PROMPT as PAIR_PROMPT
from svdiff.files import atomic_file, write_atomic
from svdiff.sampling.images import Job, sample_images

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

#: Unseen prompts of each concept; the second half has something beside the concept.
PROMPTS = (
    "a {subject} on a blue background",
    "a {subject} on a yellow background",
    "a big {subject} on a green background",
    "a small {subject}",
    "a {subject} on the left and a tree on the right",
    "a house on the left and a {subject} on the right",
    "a {subject} beside a car",
    "a {subject} and a ball on a pink background",
)
ALONE = 4
SEEDS = (0, 1, 2, 3)
DRIFT_SEEDS = tuple(range(100, 124))
_SHOWN = (0, 1, 2, 4, 5, 6)  # prompts of the sheet


def measure_concepts(
    config: Config, world: World, *, only: tuple[str, ...] = ()
) -> tuple[dict[str, float], pd.DataFrame]:
    """Identity of the sixteen concepts among those of 99 held-out individuals of their style that can be told from them, what
    it costs, and all pictures.

    Returns the numbers of the card and a row a picture (concept, model, prompt, seed, path, text_alignment, top1).
    """
    chosen = [concept for concept in CONCEPTS if not only or concept.name in only]
    settings = {c.name: {"class_word": individual(c).kind, "token": "sks"} for c in chosen}
    words = sorted({one["class_word"] for one in settings.values()})
    whole = Config.model_validate(config.model_dump(mode="json") | {"classes": words, "concepts": settings,
                                                                    "pairs": {}, "edits": {}, "rank": {"concepts": []}})  # fmt: skip
    runner = Runner(whole)
    tables, real = [], {}
    for concept in chosen:
        entry = whole.concept(concept.name)
        jobs = [Job(text.format(subject=entry.subject), seed) for text in PROMPTS for seed in SEEDS]
        jobs += [Job(f"a {entry.class_word}", seed) for seed in DRIFT_SEEDS]
        cells = [Cell({"concept": concept.name, "model": model}, whole, concept.name, train, jobs)
                 for model, train in (("trained", {}), ("base", None))]  # fmt: skip
        table = runner.run(cells)
        known, others = gallery(runner.evaluators.encode_identity, concept)
        draw = random.Random(f"real/{concept.name}")
        scenes = [view(individual(concept), draw, world, seen=False) for _ in range(64)]
        vectors = _embedded(runner.evaluators.encode_identity, [world.picture(scene) for scene in scenes])
        others = told_apart(vectors, known, others)
        real[f"identity_real_top1_of_{concept.name}"] = float(identity_top1(vectors, known, others).mean())
        real[f"identity_rivals_of_{concept.name}"] = len(others)
        vectors = _embedded(runner.evaluators.encode_identity, [Image.open(path) for path in table["path"]])
        table["top1"] = identity_top1(vectors, known, others)
        table["drift"] = table["prompt"] == f"a {entry.class_word}"
        table["beside"] = [not d and t.startswith(tuple(_openings(entry.subject)[ALONE:])) for d, t in
                           zip(table["drift"], table["prompt"], strict=True)]  # fmt: skip
        table["vector"] = list(vectors)
        tables.append(table)
    every = pd.concat(tables, ignore_index=True)
    mean = float(np.mean([value for key, value in real.items() if key.startswith("identity_real")]))
    return _numbers(every) | {"identity_real_top1": mean} | real, every


def measure_pair(config: Config, count: int = 40, trainings: int = 3) -> dict[str, float]:
    """Of the first pair, in `count` pictures of an unseen prompt: how often both individuals are identified, each in its region.

    With Cut-Mix-Unmix and without, each trained from several seeds, with 95 % intervals; `_worst` is that of the worst
    training; `_among_100` asks that no region is more like one of 98 other individuals of the style, either.
    """
    name = next(iter(config.pairs))
    entry = pair_entry(config, name)
    prompts = entry.prompts([f"{PAIR_PROMPT} on a green background"])  # on which neither disappears
    jobs = [Job(prompts[seed % len(prompts)], seed) for seed in range(count)]
    ways: dict[str, dict[str, Any]] = {
        "": {"mix_probability": PROBABILITY},
        "_without": {"mix_probability": 0.0, "unmix_weight": 0.0},
    }
    runner = Runner(config)
    table = runner.run(
        [
            Cell({"way": way, "training": seed}, config, name, {**train, "seed": seed}, jobs)
            for way, train in ways.items()
            for seed in range(trainings)
        ]
    )
    subjects = [next(concept for concept in CONCEPTS if concept.name == subject) for subject in entry.concepts]
    side = Image.open(table["path"][0]).width
    references = [
        reference(pictures(who, f"rival/{who.style}/{who.number}"), runner.evaluators, side).identity
        for who in rivals(subjects[0])
        if who != individual(subjects[1])
    ]
    own = [reference(real, runner.evaluators, side).identity for real in real_pictures(entry).values()]
    numbers: dict[str, float] = {}
    for way, rows in table.groupby("way"):
        regions = [find_two(Image.open(path).convert("RGB"), side=side) for path in rows["path"]]
        first, second = (
            _embedded(runner.evaluators.encode_identity, [getattr(region, place) for region in regions])
            for place in ("first", "second")
        )
        strict = both_identified((first, second), (own[0], own[1]), references)
        shown = rows.sort_values("training", kind="stable")["both_identified"].to_numpy().reshape(trainings, count)
        interval = mean_interval(shown, resamples=config.score.bootstrap, seed=config.score.seed)
        key = f"pair_both_identified{way}"
        numbers[f"{key}_worst"] = float(shown.mean(axis=1).min())
        numbers |= {key: interval.mean, f"{key}_low": interval.low, f"{key}_high": interval.high}
        numbers[f"{key}_among_100"] = float(strict.mean())
    return numbers


def _openings(subject: str) -> list[str]:
    return [text.format(subject=subject) for text in PROMPTS]


def _numbers(every: pd.DataFrame) -> dict[str, float]:
    asked = every[~every["drift"]]
    trained, base = (asked[asked["model"] == model] for model in ("trained", "base"))
    by_concept = trained.groupby("concept")["top1"].mean()
    drift = every[every["drift"]]
    kept = []
    for _, group in drift.groupby("concept"):
        spread = {model: variety(np.stack(rows["vector"].tolist())) for model, rows in group.groupby("model")}
        kept.append(spread["trained"] / spread["base"])
    return {
        "identity_top1": float(trained["top1"].mean()),
        "identity_top1_worst": float(by_concept.min()),
        "identity_top1_alone": float(trained[~trained["beside"]]["top1"].mean()),
        "identity_top1_beside": float(trained[trained["beside"]]["top1"].mean()),
        "identity_base_top1": float(base["top1"].mean()),
        "identity_text_gain": float(trained["text_alignment"].mean() - base["text_alignment"].mean()),
        "drift_identified": float(drift[drift["model"] == "trained"]["top1"].mean()),
        "drift_variety_kept": float(np.mean(kept)),
        "drift_variety_kept_worst": float(np.min(kept)),
    } | {f"identity_top1_of_{name}": float(value) for name, value in by_concept.items()}


def _embedded(encode: Any, shown: list[Image.Image]) -> Array:
    return np.asarray(encode([picture.convert("RGB") for picture in shown]), dtype=np.float64)


def gallery(encode: Any, concept: Concept) -> tuple[Array, list[Array]]:
    """Embeddings of the concept's pictures (5, d), and of five pictures each of its 99 rivals, all as large as drawn ones."""

    def of(who: Individual, seed: str) -> Array:
        return _embedded(encode, [to_square(picture, PICTURE_SIZE) for picture in pictures(who, seed)])

    own = of(individual(concept), f"concept/{concept.name}")
    return own, [of(who, f"rival/{who.style}/{who.number}") for who in rivals(concept)]


def concept_sheet(every: pd.DataFrame, root: Path) -> Image.Image:
    """A row a concept: three of its pictures, then six prompts at the first seed. None is chosen."""
    cell, gap = 96, 4
    rows = []
    for concept in CONCEPTS:
        trained = every[(every["concept"] == concept.name) & (every["model"] == "trained") & ~every["drift"]]
        if trained.empty:
            continue
        first = trained[trained["seed"] == SEEDS[0]]["path"].tolist()
        rows.append([*(root / concept.name / f"{k:02d}.png" for k in range(3)), *(first[k] for k in _SHOWN)])
    width = max(map(len, rows))
    sheet = Image.new("RGB", (width * cell + 3 * gap, len(rows) * cell), "white")
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            shown = Image.open(path).convert("RGB").resize((cell - gap, cell - gap), Image.Resampling.LANCZOS)
            sheet.paste(shown, (x * cell + (3 * gap if x > 2 else 0), y * cell))
    return sheet


def nearest_training(world: World, shown: list[Image.Image], seed: int, count: int = 4000) -> list[Image.Image]:
    """For each picture the nearest of the first `count` training pictures, compared at 16×16 pixels."""

    def small(picture: Image.Image) -> NDArray[np.float32]:
        return np.asarray(picture.convert("RGB").resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel()

    real = [world.picture(world.scene(seed + 1, index)) for index in range(count)]
    table = np.stack([small(picture) for picture in real])
    return [real[int(((table - small(picture)) ** 2).sum(1).argmin())] for picture in shown]


def sample_sheet(shown: list[Image.Image], near: list[Image.Image], columns: int = 8) -> Image.Image:
    """Each generated picture with its nearest training picture to its right."""
    side, gap = 64, 6
    width, height = 2 * side + gap, side + gap
    sheet = Image.new("RGB", (columns * width, -(-len(shown) // columns) * height), "white")
    for i, (drawn, real) in enumerate(zip(shown, near, strict=True)):
        sheet.paste(drawn, (i % columns * width, i // columns * height))
        sheet.paste(real, (i % columns * width + side, i // columns * height))
    return sheet


def write_card(params: Path, models: Path, count: int = 96) -> Path:
    """Measure everything and write README.md, samples.webp, concepts.webp and measurements.json to `models/card`.

    Beside the weights, not among them: measuring anew makes nothing stale that was made with them.
    """
    config, training = load_config(params), load_base_training(params)
    world = loop.load_world(training)
    runner = Runner(config)
    pipe, sampling = runner.pipe, config.sample

    def draw(prompts: list[str]) -> list[Image.Image]:
        jobs = [Job(text, seed) for seed, text in enumerate(prompts)]
        return sample_images(
            pipe, jobs, steps=sampling.steps, guidance=sampling.guidance, eta=sampling.eta, progress="card"
        )

    numbers: dict[str, float] = {"autoencoder_psnr_db": psnr(pipe.vae, world, SEED)}
    numbers |= probes.obedience(world, probes.train(world, config.evaluators.clip_model, training), draw, count)
    scenes = [world.scene(SEED + 3, n, "held-out", pairs=0.0) for n in range(64)]
    scenes += [world.scene(SEED + 4, n, "held-out", pairs=1.0) for n in range(32)]
    shown = draw([_caption(scene, n) for n, scene in enumerate(scenes)])
    started = time.perf_counter()
    draw(["a cat on a blue background"])
    numbers["seconds_a_picture"] = time.perf_counter() - started
    card = models / "card"
    with atomic_file(card / "samples.webp") as path:
        sample_sheet(shown, nearest_training(world, shown, training.seed)).save(path, format="webp", quality=85)
    found, every = measure_concepts(config, world)
    numbers |= found | measure_pair(config)
    with atomic_file(card / "concepts.webp") as path:
        concept_sheet(every, params.parent / "data" / "concepts").save(path, format="webp", quality=85)
    numbers = {name: round(value, 4) for name, value in numbers.items()}
    write_atomic(card / "measurements.json", json.dumps(numbers, indent=1))
    write_atomic(card / "README.md", _text(training, Path(config.base.model), numbers))
    return card / "README.md"


def _caption(scene: Scene, number: int) -> str:
    return caption(scene, random.Random(number))


def _text(training: BaseTrainingConfig, base: Path, numbers: dict[str, float]) -> str:
    record = base / TRAINING_FILE
    past = json.loads(record.read_text()) if record.is_file() else {}
    rows = "\n".join(f"| {name} | {value:g} |" for name, value in numbers.items())
    styles = "\n".join(
        f"- {s.kind}, {s.word} ({s.name}, {s.author}, {s.licence}){': held out' if s.held_out else ''}" for s in STYLES
    )
    return f"""---
license: apache-2.0
library_name: diffusers
---
# The embedded base, version 2

A small Stable Diffusion in diffusers' layout, trained from nothing on compositions of openly licensed drawings: a world of
individuals. {training.world.individuals:,} individuals a style, {training.world.named} of them with a made-up name of their own, alone or in
pairs, on flat backgrounds, 64×64 pixels. The UNet predicts the clean latents; it saw {past.get("pictures", 0):,} pictures.

## Who is drawn
{styles}

Individuals of the concepts and of the tests were never shown to the base or to an evaluator; the evaluators know other
individuals of the held-out styles. Authors and licences: `data/concepts/ATTRIBUTION.md`, `data/world/ATTRIBUTION.md`.

## Training
`svdiff base train all` repeats it. It was done on one H200, the parts side by side, in twelve minutes; on CPU cores it takes days. The encoder is a linear code (principal components of 8×8 patches), the decoder is trained
on it; the text encoder learns from captions alone what is where, then is frozen; then the UNet; CLIP, LPIPS and the identity
embedding learn from pictures of their own, the embedding against look-alikes at last: an hour and a half of one shared CPU core. Settings: `base_training` in params.yaml, and training.json beside the weights.

## Measured
- `obeys_*`: share of drawn pictures that show what the prompt asks for, told by classifiers trained on real pictures; `real_*`: the
  same classifiers on real pictures of held-out individuals; `real_feature_false`: features that they see where there are none.
- `identity_top1`: sixteen held-out individuals, five pictures each, trained with the settings of params.yaml; eight unseen prompts
  and four seeds each. Share of pictures that the identity evaluator finds more like the concept than like any of 99 other
  held-out individuals of its style (`identity_rivals_of_*` less than 99: without those by whom alone more than a tenth of its real
  pictures are not identified, told by the same real pictures that `identity_real_top1` counts); `_alone` and `_beside` something, `_worst` concept, `identity_base_top1` of the untrained base,
  `identity_real_top1` of real pictures. `identity_text_gain`: text alignment, trained minus base.
- `pair_both_identified`: of the first pair of params.yaml, trained from three seeds, 40 pictures each of an unseen prompt with both:
  in how many each of the two regions is more like another one of the two individuals (`_low`, `_high`: 95 % interval; `_worst`
  training; `_without`: trained without Cut-Mix-Unmix; `_among_100`: and more like it than like 98 other individuals of the style).
- `drift_*`: pictures of the bare class word after training: how many are identified as the concept, and how much of their variety is
  kept (spread of embeddings).

| measure | value |
|---|---|
{rows}

![64 single pictures and 32 pairs, each with the nearest of 4000 training pictures to its right](samples.webp)

![A row for each concept: three of its pictures, then six prompts, one seed, none chosen](concepts.webp)

## Limits
It knows its world's words only, one or two at a time, on flat backgrounds, at 64×64. Scores by its evaluators compare with each
other, not with scores of CLIP, LPIPS or DINO as published.
"""

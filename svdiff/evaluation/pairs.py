"""How well two identities are kept apart in one picture, and the stage `score` of a pair (Sec. 4.2).

The paper asks people whether a picture contains both subjects. Here the background is plain, so the two things can be
found; each is compared with both subjects. On the scale of *likeness* the real pictures of the first subject lie at 1 on
average and those of the second at −1, whatever the evaluator; a picture's *separation* is how far its less distinct
thing is on its own subject's side, the things being given to the subjects as fits them best. So it is about 1 where both
are themselves, about 0 where they are blended, and negative where both things are rather the same subject.

LPIPS judges, since identity is how a thing is drawn. CLIP tells a cat from a dog by whoever drew it: *clip_separation*, by
its cosines, says whether there are two kinds of things.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from svdiff.catalogue import Entry
from svdiff.config import Config
from svdiff.data.concepts import concept_folder, load_concept_images, to_square
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES, Evaluators, load_evaluators, without_token
from svdiff.evaluation.score import SAMPLES, SCORES, describe_evaluators, read_samples, summarise
from svdiff.evaluation.things import cut_out, find_two
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

PAIR_MEASURES = (*MEASURES, "separation", "apart", "clip_separation")
PER_SUBJECT = ("image_alignment_first", "image_alignment_second")


class Reference(NamedTuple):
    """A subject's real pictures, cut out, and their CLIP embeddings (n, d)."""

    pictures: list[Image.Image]
    embedded: Array


def reference(pictures: Sequence[Image.Image], evaluators: Evaluators, side: int) -> Reference:
    """Cut-outs of a subject's pictures, as sharp as a thing is that takes half of a picture of `side` pixels."""
    cut = [cut_out(to_square(picture, 4 * side), side=side, detail=side // 2) for picture in pictures]
    return Reference(cut, _embed(cut, evaluators))


class Nearness(NamedTuple):
    """Similarities, the larger the more alike, by any evaluator: of things and of two subjects' real pictures."""

    first: Array  # (n, n₁) things with pictures of the first subject
    second: Array  # (n, n₂)
    within_first: Array  # (n₁, n₁) its pictures with each other
    within_second: Array  # (n₂, n₂)
    across: Array  # (n₁, n₂) pictures of both


def likeness(near: Nearness) -> Array:
    """Which of two subjects a thing is like: 1 as real pictures of the first are on average, −1 as those of the second.

    Returns:
        (n,): d(x) = s̄(x, first) − s̄(x, second), with s̄ the mean similarity, moved and scaled so that the mean of d over the
        real pictures is ±1; a real picture is not compared with itself, and a single one counts as like itself.

    Raises:
        SvdiffError: the real pictures of the two subjects cannot be told apart.
    """
    own = _mean_of_others(near.within_first), _mean_of_others(near.within_second)
    middle, half = (own[0] - own[1]) / 2, (own[0] + own[1]) / 2 - float(near.across.mean())
    if half <= 1e-6:
        raise SvdiffError(
            "the real pictures of the two subjects are as like each other as themselves to the evaluator; "
            "whether they are kept apart cannot be measured by it"
        )
    return (near.first.mean(axis=1) - near.second.mean(axis=1) - middle) / half


def _mean_of_others(similarities: Array) -> float:
    """Mean similarity of different pictures."""
    count = len(similarities)
    return float((similarities.sum() - np.trace(similarities)) / (count * (count - 1))) if count > 1 else 1.0


def separation(likenesses: tuple[float, float]) -> float:
    """How far the less distinct of two things is on its own subject's side, in the assignment that fits best."""
    a, b = likenesses
    return max(min(a, -b), min(-a, b))


def score_things(
    pictures: Sequence[Image.Image], subjects: tuple[Reference, Reference], evaluators: Evaluators
) -> pd.DataFrame:
    """Scores of pictures that should show two subjects.

    Returns:
        One row a picture: `things` found (1 or 2); `likeness_first`, `likeness_second`: of the left (upper) and the other
        thing; `separation`; `apart`, 1 where it is positive; `clip_separation`; `image_alignment` (1 − LPIPS) and `clip_i` (CLIP
        cosine): mean over the subjects of each one's thing with the subject's real pictures, cut-outs both;
        `image_alignment_first`, `image_alignment_second`: that of each subject.
    """
    found = [find_two(picture, side=subjects[0].pictures[0].width) for picture in pictures]
    parts = [[things.first for things in found], [things.second for things in found]]

    def seen(one: list[Image.Image], other: list[Image.Image]) -> Array:
        return 1 - _matrix(evaluators.distance(one, other))

    drawn = _nearness(parts, [subject.pictures for subject in subjects], seen)
    meant = _nearness(
        [_embed(part, evaluators) for part in parts], [subject.embedded for subject in subjects], _cosines
    )
    likenesses = [likeness(near) for near in drawn]
    straight = likenesses[0] >= likenesses[1]  # whether the first thing is the first subject
    table = pd.DataFrame({"things": [things.found for things in found]})
    table["likeness_first"], table["likeness_second"] = likenesses
    table["separation"] = [separation(pair) for pair in zip(*likenesses, strict=True)]
    table["apart"] = (table["separation"] > 0).astype(float)
    table["clip_separation"] = [separation(pair) for pair in zip(*map(likeness, meant), strict=True)]
    for place, name in enumerate(("first", "second")):
        mine = straight if place == 0 else ~straight
        for measure, near in (("clip_i", meant), ("image_alignment", drawn)):
            one, other = (part[place].mean(axis=1) for part in near)
            table[f"{measure}_{name}"] = np.where(mine, one, other)
    for measure in ("clip_i", "image_alignment"):
        table[measure] = table[[f"{measure}_first", f"{measure}_second"]].mean(axis=1)
    return table


def _nearness(parts: Sequence[Any], subjects: Sequence[Any], similarity: Callable[[Any, Any], Array]) -> list[Nearness]:
    """Of the first and of the second things of pictures, to two subjects."""
    first, second = subjects
    real = similarity(first, first), similarity(second, second), similarity(first, second)
    return [Nearness(similarity(part, first), similarity(part, second), *real) for part in parts]


def _cosines(one: Array, other: Array) -> Array:
    return one @ other.T


def score_pair(
    config: Config,
    name: str,
    *,
    samples_dir: Path | None = None,
    out_dir: Path | None = None,
    evaluators: Evaluators | None = None,
) -> Path:
    """Score the samples of a pair into out/score/<name>: metrics.json, images.csv and evaluators.json, as of a concept.

    Beside text and image alignment metrics.json has the latter of each subject (`image_alignment_first`, `…_second`, in the
    order of the pair), `separation`, `clip_separation`, and `apart`, the share of pictures in which the two are kept apart.

    Raises:
        SvdiffError: no samples, or a prompt that does not name two of the subjects.
    """
    entry = config.entry(name)
    samples_dir, out_dir = samples_dir or SAMPLES / name, out_dir or SCORES / name
    samples = read_samples(samples_dir)
    scored = score_samples(config, entry, samples, samples_dir, evaluators or load_evaluators(config.evaluators))
    metrics = summarise(
        scored, resamples=config.score.bootstrap, seed=config.score.seed, measures=(*PAIR_MEASURES, *PER_SUBJECT)
    )
    with atomic_dir(out_dir) as folder:
        scored.to_csv(folder / "images.csv", index=False, float_format="%.6f")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "evaluators.json").write_text(json.dumps(describe_evaluators(config.evaluators), indent=2) + "\n")
    return out_dir


def score_samples(
    config: Config, entry: Entry, samples: pd.DataFrame, folder: Path, evaluators: Evaluators
) -> pd.DataFrame:
    """`samples` with the scores of each picture beside; see `score_things`, and `text_alignment`: CLIP cosine with the prompt.

    `first` and `second` name the concepts that a prompt asks for.
    """
    pictures = [Image.open(folder / file).convert("RGB") for file in samples["file"]]
    references = {
        name: reference([p.image for p in load_concept_images(concept_folder(name))], evaluators, pictures[0].width)
        for name in entry.concepts
    }
    texts = [_without_tokens(prompt, entry) for prompt in samples["prompt"]]
    text = (_embed(pictures, evaluators) * _matrix(evaluators.encode_texts(texts))).sum(axis=1)
    parts = []
    asked = [tuple(entry.shown(prompt)) for prompt in samples["prompt"]]
    for names in dict.fromkeys(asked):
        rows = [row for row, found in enumerate(asked) if found == names]
        if len(names) != 2:
            raise SvdiffError(
                f"prompt '{samples['prompt'].iloc[rows[0]]}' names {len(names)} subjects of {entry.name}; expected two: use "
                "{first} and {second} in mix.prompts"
            )
        scores = score_things([pictures[row] for row in rows], (references[names[0]], references[names[1]]), evaluators)
        scores.index = samples.index[rows]
        parts.append(scores.assign(first=names[0], second=names[1]))
    return pd.concat([samples, pd.concat(parts).sort_index().assign(text_alignment=text)], axis=1)


def _without_tokens(prompt: str, entry: Entry) -> str:
    for token in entry.tokens:
        prompt = without_token(prompt, token)
    return prompt


def _embed(pictures: list[Image.Image], evaluators: Evaluators) -> Array:
    return _matrix(evaluators.encode_images(pictures))


def _matrix(tensor: object) -> Array:
    return np.asarray(tensor.detach().cpu().double().numpy())  # type: ignore[attr-defined]

"""Stage `score`: how well pictures agree with their prompts and with the concept (Fig. 9b), and what the class word lost.

The evaluators do not know the special token: the text that a picture is held against is its prompt without it
(`a sks dog on a red background` is scored as `a dog on a red background`), for the trained model and for the
untrained base alike.

It writes to out/score/<name>, for a concept and for a pair:

- images.csv: a row a picture (`model` is `trained` or `base`; `prompt`, `prompt_index`, `seed`) with its scores.
- drift.csv: the same for pictures of the bare class prompt, with `identity`: that to the concept, the highest of those of a
  pair. Without rows where `sample.drift_pictures` is 0.
- evaluators.json: which networks, weights and transforms made the scores. Scores of different evaluators do not compare.
- metrics.json, flat numbers:

  - `<measure>` and `base_<measure>`: means over the trained model's pictures and over the base's, from the same prompts and seeds.
  - `<short>_gain`, `<short>_gain_low`, `<short>_gain_high`: mean of trained − base over pairs of pictures, and its 95 %
    interval. `<short>` is the measure without `_alignment`.
  - The measures: `identity`, `image_alignment` (short `image`), `text_alignment` (short `text`), `clip_i`; of pairs also
    `both_identified`, `separation`, and `identity_first`, `identity_second`, `image_alignment_first`, …, those of each subject.
  - `pairs`: number of pairs of pictures.
  - `drift_identity`, `base_drift_identity`, `drift_gain`, `drift_gain_low`, `drift_gain_high`: the same for the `identity` of
    drift.csv. A gain above 0 means that the class word alone has moved towards the concept.
  - `variety`, `base_variety`: spread of the class prompt's pictures (1 − mean cosine of their embeddings); `variety_kept`,
    `variety_kept_low`, `variety_kept_high`: the share of the base's that is left, with its interval.
  - `drift_pairs`: number of pairs of pictures of class prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image

from svdiff.catalogue import Entry
from svdiff.config import Config, ScoreConfig
from svdiff.data.concepts import concept_folder, load_concept_images, to_square
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES, align, as_array, without_token
from svdiff.evaluation.evaluators import Evaluators, describe_evaluators, load_evaluators
from svdiff.evaluation.identity import identity, variety_kept
from svdiff.evaluation.intervals import paired_gain
from svdiff.evaluation.pairs import PAIR_MEASURES, PER_SUBJECT, reference, score_regions
from svdiff.files import atomic_dir, check_writable, read_table
from svdiff.peaks import Peaks

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SAMPLES = Path("out/sample")
SCORES = Path("out/score")
DRIFT = "drift"  # folder of the class prompts' pictures inside a sample folder
PAIR = ["prompt_index", "seed"]


def score(
    config: Config,
    name: str,
    *,
    samples_dir: Path | None = None,
    out_dir: Path | None = None,
    evaluators: Evaluators | None = None,
) -> Path:
    """Score the samples of a concept or pair into out/score/<name>; see above for the files.

    Raises:
        SvdiffError: no samples, a picture missing, pictures of the two models that are not pairs, or a prompt of a pair that
            does not name two of its subjects.
    """
    entry = config.entry(name)
    samples_dir, out_dir = samples_dir or SAMPLES / name, out_dir or SCORES / name
    check_writable(out_dir)
    real = real_pictures(entry)
    samples, pictures = read_samples(samples_dir)
    of_class = read_samples(samples_dir / DRIFT) if (samples_dir / DRIFT).is_dir() else None
    peaks = Peaks()
    with peaks.phase("loading"):
        evaluators = evaluators or load_evaluators(config.evaluators)
    with peaks.phase("scoring"):
        scored = samples.join(score_pictures(entry, samples["prompt"].tolist(), pictures, real, evaluators))
        drift = pd.DataFrame(columns=[*samples.columns, "identity", "embedding"])
        if of_class is not None:
            drift = score_drift(*of_class, real, evaluators)
    measures = (*PAIR_MEASURES, *PER_SUBJECT) if entry.kind == "pair" else MEASURES
    metrics = summarise(scored, config.score, measures)
    if of_class is not None:
        metrics |= summarise_drift(drift, config.score)
    peaks.say()
    with atomic_dir(out_dir) as folder:
        for file, table in (("images.csv", scored), ("drift.csv", drift.drop(columns="embedding"))):
            table.to_csv(folder / file, index=False, float_format="%.6f")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "evaluators.json").write_text(json.dumps(describe_evaluators(config.evaluators), indent=2) + "\n")
    return out_dir


def real_pictures(entry: Entry, root: Path = Path()) -> dict[str, list[Image.Image]]:
    """The pictures of each concept of an entry, from the checkout at `root`."""
    folders = {name: root / concept_folder(name) for name in entry.concepts}
    return {name: [picture.image for picture in load_concept_images(folder)] for name, folder in folders.items()}


def read_samples(folder: Path) -> tuple[pd.DataFrame, list[Image.Image]]:
    """`images.csv` of a sample folder and its pictures, checked: every picture is there, from the trained model and the base."""
    table = folder / "images.csv"
    if not table.is_file():
        raise SvdiffError(f"{table} not found; draw the pictures first, with `svdiff sample {folder.name}`")
    samples = read_table(table)
    missing = [file for file in samples["file"] if not (folder / file).is_file()]
    if missing:
        raise SvdiffError(f"{table} names {len(missing)} pictures that are not there, e.g. {missing[0]}; sample again")
    keys = {model: set(rows[PAIR].itertuples(index=False, name=None)) for model, rows in samples.groupby("model")}
    paired = set(keys) == {"trained", "base"} and keys["trained"] == keys["base"]
    if not paired or samples.duplicated(["model", *PAIR]).any():
        raise SvdiffError(
            f"{table}: expected one picture of 'trained' and one of 'base' for each prompt and seed; sample again"
        )
    return samples, [Image.open(folder / file).convert("RGB") for file in samples["file"]]


def score_pictures(
    entry: Entry,
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    real: Mapping[str, Sequence[Image.Image]],
    evaluators: Evaluators,
) -> pd.DataFrame:
    """Scores of pictures of a concept or pair, a row a picture: see `align`, and for a pair `score_regions`.

    Args:
        entry: says which tokens the prompts have.
        prompts: one a picture, special tokens included.
        pictures: of one square size.
        real: the pictures of each concept, see `real_pictures`.
        evaluators: who scores.

    Raises:
        SvdiffError: pictures of several sizes, or a prompt of a pair that does not name two of its subjects.
    """
    texts = [_without_tokens(prompt, entry) for prompt in prompts]
    if entry.kind == "concept":
        [training] = real.values()
        return align(pictures, texts, training, evaluators)
    side = pictures[0].width
    references = {name: reference(training, evaluators, side) for name, training in real.items()}
    asked = [tuple(entry.shown(prompt)) for prompt in prompts]
    parts = []
    for names in dict.fromkeys(asked):
        places = [place for place, shown in enumerate(asked) if shown == names]
        if len(names) != 2:
            raise SvdiffError(
                f"prompt '{prompts[places[0]]}' names {len(names)} subjects of {entry.name}; expected two: use "
                "{first} and {second} in mix.prompts"
            )
        subjects = references[names[0]], references[names[1]]
        scores = score_regions([pictures[place] for place in places], subjects, evaluators).set_axis(places)
        parts.append(scores.assign(first=names[0], second=names[1]))
    embedded = as_array(evaluators.encode_images(list(pictures)))
    text = (embedded * as_array(evaluators.encode_texts(texts))).sum(axis=1)
    return pd.concat(parts).sort_index().assign(text_alignment=text)


def _without_tokens(prompt: str, entry: Entry) -> str:
    for token in entry.tokens:
        prompt = without_token(prompt, token)
    return prompt


def score_drift(
    samples: pd.DataFrame,
    pictures: Sequence[Image.Image],
    real: Mapping[str, Sequence[Image.Image]],
    evaluators: Evaluators,
) -> pd.DataFrame:
    """`samples`, pictures of class prompts, with `identity` and the instance `embedding` of each."""
    embedded = as_array(evaluators.encode_identity(list(pictures)))
    squares = [[to_square(picture, pictures[0].width) for picture in training] for training in real.values()]
    concepts = [identity(embedded, as_array(evaluators.encode_identity(training))) for training in squares]
    return samples.assign(identity=pd.DataFrame(concepts).max(), embedding=list(embedded))


def summarise(scored: pd.DataFrame, settings: ScoreConfig, measures: Sequence[str] = MEASURES) -> dict[str, float]:
    """Numbers of metrics.json from the scored pictures of both models."""
    trained, base = _of_models(scored)
    metrics: dict[str, float] = {measure: trained[measure].mean() for measure in measures}
    metrics |= {f"base_{measure}": base[measure].mean() for measure in measures}
    for measure in measures:
        metrics |= _gain(measure.removesuffix("_alignment"), trained[measure], base[measure], settings)
    return _rounded(metrics) | {"pairs": len(trained)}


def summarise_drift(scored: pd.DataFrame, settings: ScoreConfig) -> dict[str, float]:
    """Numbers of metrics.json from the scored pictures of class prompts of both models, see `score_drift`."""
    trained, base = _of_models(scored)
    metrics = {"drift_identity": trained["identity"].mean(), "base_drift_identity": base["identity"].mean()}
    metrics |= _gain("drift", trained["identity"], base["identity"], settings)
    spread, base_spread, kept = variety_kept(
        _by_prompt(trained), _by_prompt(base), resamples=settings.bootstrap, seed=settings.seed
    )
    metrics |= {"variety": spread, "base_variety": base_spread}
    metrics |= {"variety_kept": kept.mean, "variety_kept_low": kept.low, "variety_kept_high": kept.high}
    return _rounded(metrics) | {"drift_pairs": len(trained)}


def _of_models(scored: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The pictures of the trained model and of the base, in one order."""
    trained, base = (scored[scored["model"] == model].set_index(PAIR).sort_index() for model in ("trained", "base"))
    return trained, base


def _by_prompt(scored: pd.DataFrame) -> list[NDArray[np.float64]]:
    """Embeddings of each prompt's pictures."""
    return [pd.DataFrame(rows["embedding"].tolist()).to_numpy() for _, rows in scored.groupby(level="prompt_index")]


def _gain(short: str, trained: pd.Series, base: pd.Series, settings: ScoreConfig) -> dict[str, float]:
    gain = paired_gain(trained, base, resamples=settings.bootstrap, seed=settings.seed)
    return {f"{short}_gain": gain.mean, f"{short}_gain_low": gain.low, f"{short}_gain_high": gain.high}


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in metrics.items()}

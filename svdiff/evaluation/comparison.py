"""Whether Cut-Mix-Unmix keeps identities apart (Sec. 4.2, Fig. 6), measured: `svdiff compare-pairs`.

Every cell (a pair, a method, a way to train, a seed) is trained, sampled and scored once, and kept: after a kill the rest is
made, and more seeds or pictures add to what is there. All cells draw the same prompt from the same noise, so that they are
compared picture by picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from svdiff.config import Config
from svdiff.data.mixes import make_mixes, mix_folder, pair_entry
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.evaluators import Evaluators, load_evaluators
from svdiff.evaluation.kept import key
from svdiff.evaluation.pairs import PAIR_MEASURES
from svdiff.evaluation.score import real_pictures, score_pictures
from svdiff.files import atomic_dir, atomic_file, sha256_tree, write_atomic
from svdiff.models import load_pipeline, scratch
from svdiff.sampling.images import Job
from svdiff.sampling.stage import default_negatives, draw_pictures, personalise

PROMPT = "a {first} sitting beside a {second}"  # the mixes' own prompts are others
METHODS = ("svdiff", "full")
UNTRAINED = "base"  # the method of the cells with no training
WAYS = ("without", "cut-mix-unmix", "unmix")  # joint training alone, on mixes as well, and with the unmix loss on them
SHOWN = 6  # pictures a row of the sheet
CODE = (
    *("data/*.py", "spectral/*.py", "training/**/*.py", "sampling/guidance.py", "sampling/images.py"),
    *("evaluation/alignment.py", "evaluation/evaluators.py", "evaluation/pairs.py", "evaluation/regions.py"),
)


class Cell(NamedTuple):
    """One training and the pictures of it."""

    pair: str
    method: str
    way: str
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.pair}/{self.method}-{self.way}-{self.seed}"


def compare_pairs(
    config: Config,
    pairs: Sequence[str] = (),
    *,
    methods: Sequence[str] = METHODS,
    ways: Sequence[str] = WAYS,
    seeds: int = 3,
    pictures: int = 40,
    prompt: str = PROMPT,
    unmix_weight: float = 1.0,
    overrides: Mapping[str, Any] | None = None,
    output: Path,
) -> Path:
    """Make what is missing of every cell, then write the whole to `output`.

    Args:
        config: params.yaml; section `mix` says how pairs are trained.
        pairs: names under `pairs`; default all.
        methods: of training (`train.method`); the untrained base stands beside them.
        ways: of WAYS; the others are compared with the first.
        seeds: trainings a way, with seeds 0, 1, ….
        pictures: of each training, with seeds 0, 1, ….
        prompt: with {first} and {second}; of a triple each picture takes the next two of its subjects.
        unmix_weight: of the way `unmix`.
        overrides: further keys of `train`, the same for all.
        output: gets pictures.csv (a row a picture), table.csv and table.md (means, and differences with 95 % intervals), sheet.png.

    Returns:
        `output`.

    Raises:
        SvdiffError: an unknown pair, or what training and sampling raise; for all cells before the first is made.
    """
    pairs = list(pairs or config.pairs)
    options = _ways(ways, unmix_weight, overrides or {})
    for pair in pairs:
        pair_entry(config, pair)
        for method in methods:
            for way in ways:
                config.train_config(pair, options[way] | {"method": method})
    cells = [Cell(pair, UNTRAINED, UNTRAINED, 0) for pair in pairs]
    cells += [Cell(pair, m, w, s) for s in range(seeds) for pair in pairs for m in methods for w in ways]
    evaluators = load_evaluators(config.evaluators)
    tables = []
    for cell in tqdm(cells, desc="cells", unit="cell"):
        jobs = cell_jobs(config, cell.pair, prompt, pictures)
        folder = _drawn(config, cell, options.get(cell.way, {}), jobs)
        tables.append(_scored(config, cell, jobs, folder, evaluators))
    table = pd.concat(tables, ignore_index=True)
    results = summarise(table, ways, resamples=config.score.bootstrap, seed=config.score.seed)
    with atomic_dir(output) as folder:
        table.drop(columns="path").to_csv(folder / "pictures.csv", index=False, float_format="%.6f")
        results.to_csv(folder / "table.csv", index=False, float_format="%.6f")
        (folder / "table.md").write_text(as_markdown(results))
        plots.save(_sheet(table), folder / "sheet.png")
    return output


def _ways(ways: Iterable[str], unmix_weight: float, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Keys of `train` by way of training."""
    known: dict[str, dict[str, Any]] = {
        "without": {"mix_probability": 0.0, "unmix_weight": 0.0},
        "cut-mix-unmix": {"unmix_weight": 0.0},
        "unmix": {"unmix_weight": unmix_weight},
    }
    if unknown := [way for way in ways if way not in known]:
        raise SvdiffError(f"no way of training '{unknown[0]}'; known: {', '.join(known)}")
    return {way: {**overrides, **known[way]} for way in ways}


def cell_jobs(config: Config, pair: str, prompt: str, pictures: int) -> list[Job]:
    """The pictures of every cell: `prompt` in the words of the pair, from seeds 0, 1, …."""
    prompts = config.entry(pair).prompts([prompt])
    return [Job(prompts[seed % len(prompts)], seed) for seed in range(pictures)]


def _drawn(config: Config, cell: Cell, options: dict[str, Any], jobs: Sequence[Job]) -> Path:
    """The folder of a cell with its pictures as NNNN.png; trains and draws what is missing."""
    from svdiff.training import train

    if not mix_folder(cell.pair).is_dir():
        make_mixes(config, cell.pair)
    changes: dict[str, Any] = {}
    if cell.method != UNTRAINED:
        changes = options | {"method": cell.method, "seed": cell.seed}
        # Pictures at the ends only: nobody follows it.
        changes["validate_every"] = config.train_config(cell.pair, changes).steps
    folder = scratch() / "compare-pairs" / cell.folder / _key(config, cell, changes)[:16]
    missing = [job for job in jobs if not _picture(folder, job).is_file()]
    if not missing:
        return folder
    pipe = load_pipeline(config.base)
    if changes:
        quiet = config.model_copy(update={"tracking": config.tracking.model_copy(update={"live": "none"})})
        delta = folder / "train" / "delta.safetensors"
        if not delta.is_file():
            train(quiet, cell.pair, out_dir=folder / "train", overrides=changes)
        personalise(pipe, delta)
    negatives = default_negatives(config, config.entry(cell.pair))
    images = draw_pictures(pipe, missing, config.sample, negatives, progress=cell.folder)
    for job, image in zip(missing, images, strict=True):
        with atomic_file(_picture(folder, job)) as temporary:
            image.save(temporary)
    return folder


def _picture(folder: Path, job: Job) -> Path:
    prompt = hashlib.sha256(job.prompt.encode()).hexdigest()[:8]
    return folder / f"{prompt}-{job.seed:04d}.png"


def _key(config: Config, cell: Cell, changes: dict[str, Any]) -> str:
    """Identity of a cell's training and of how it is sampled."""
    return key(
        config,
        CODE,
        train=config.train_config(cell.pair, changes).model_dump(mode="json") if changes else None,
        subjects=config.entry(cell.pair).subjects,
        mixes=sha256_tree(mix_folder(cell.pair)) if changes else None,
        prior=config.prior.prompt,
        sample=config.sample.model_dump(mode="json", exclude={"prompts", "seeds", "batch_size"}),
    )


def _scored(config: Config, cell: Cell, jobs: Sequence[Job], folder: Path, evaluators: Evaluators) -> pd.DataFrame:
    """A row a picture: the cell, the picture's seed, prompt, path and scores. Scores are kept beside the pictures."""
    files = [_picture(folder, job).name for job in jobs]
    kept = folder / f"scores-{hashlib.sha256(repr(files).encode()).hexdigest()[:8]}.csv"
    if not kept.is_file():
        entry, prompts = config.entry(cell.pair), [job.prompt for job in jobs]
        pictures = [Image.open(folder / file).convert("RGB") for file in files]
        scores = score_pictures(entry, prompts, pictures, real_pictures(entry), evaluators)
        scores = scores.assign(file=files, prompt=prompts)
        write_atomic(kept, scores.to_csv(index=False))
    table = pd.read_csv(kept).assign(**cell._asdict(), picture=[job.seed for job in jobs])
    return table.assign(path=[str(folder / file) for file in files])


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def estimate(values: NDArray[np.float64], *, resamples: int, seed: int) -> Estimate:
    """Mean of `values`, (trainings, pictures), and its 95 % percentile bootstrap interval.

    Trainings are resampled, and the pictures of each: the interval covers training anew as well as drawing anew. With few
    trainings it is rough.
    """
    random = np.random.default_rng(seed)
    trainings, pictures = values.shape
    rows = random.integers(0, trainings, (resamples, trainings, 1))
    means = values[rows, random.integers(0, pictures, (resamples, trainings, pictures))].mean(axis=(1, 2))
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


def summarise(table: pd.DataFrame, ways: Sequence[str], *, resamples: int, seed: int) -> pd.DataFrame:
    """Means and differences with their intervals.

    Returns:
        A row for each pair (and 'all' of several), method, way and measure: `against` is empty for a mean; else the row is
        the difference to that cell (the first way of the same method, or an earlier method trained in the same way), picture
        by picture.
    """
    pairs = list(table["pair"].unique())
    groups = {pair: table[table["pair"] == pair] for pair in pairs} | ({"all": table} if len(pairs) > 1 else {})
    rows = []
    for pair, group in groups.items():
        cells = {(str(m), str(w)): rows for (m, w), rows in group.groupby(["method", "way"], sort=False)}
        for (method, way), own in cells.items():
            others = [(method, ways[0])] if way != ways[0] else []
            earlier = list(cells)[: list(cells).index((method, way))]
            others += [(other, other_way) for other, other_way in earlier if other_way == way and other != method]
            for measure in PAIR_MEASURES:
                values = _matrix(own, measure)
                found = {"": values}
                found |= {" ".join(o): values - _matrix(cells[o], measure) for o in others if o in cells}
                for against, numbers in found.items():
                    result = estimate(numbers, resamples=resamples, seed=seed)
                    size = dict(zip(("trainings", "pictures"), numbers.shape, strict=True))
                    named = {"pair": pair, "method": method, "way": way, "measure": measure, "against": against}
                    rows.append(named | result._asdict() | size)
    return pd.DataFrame(rows)


def _matrix(cell: pd.DataFrame, measure: str) -> NDArray[np.float64]:
    """(trainings, pictures) of one measure, in the order of pairs, seeds and pictures."""
    return cell.pivot_table(index=["pair", "seed"], columns="picture", values=measure).to_numpy(np.float64)


def as_markdown(results: pd.DataFrame) -> str:
    """The table for people: a row a cell, then the differences, with intervals in brackets."""
    lines = [
        "| pair | method | training | compared with | " + " | ".join(PAIR_MEASURES) + " |",
        "|" + "---|" * (4 + len(PAIR_MEASURES)),
    ]
    for (pair, against, method, way), rows in results.groupby(["pair", "against", "method", "way"], sort=False):
        numbers = {
            row["measure"]: f"{row['mean']:{'+' if against else ''}.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            for row in rows.to_dict("records")
        }
        lines.append(
            f"| {pair} | {method} | {way} | {against} | " + " | ".join(numbers[m] for m in PAIR_MEASURES) + " |"
        )
    return "\n".join(lines) + "\n"


def _sheet(table: pd.DataFrame) -> plots.Figure:
    """The first pictures of each cell's first training, the same noise below each other (Fig. 6)."""
    first = table[(table["seed"] == 0) & (table["picture"] < SHOWN)]
    rows, labels = [], []
    for (pair, method, way), cell in first.groupby(["pair", "method", "way"], sort=False):
        rows.append([Image.open(path).convert("RGB") for path in cell.sort_values("picture")["path"]])
        labels.append(f"{pair}, {method}" if method == way else f"{pair}, {method}, {way}")
    return plots.captioned_grid(rows, labels, [f"seed {number}" for number in range(len(rows[0]))], cell=1.1)

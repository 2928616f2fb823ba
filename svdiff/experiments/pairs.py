"""Whether Cut-Mix-Unmix keeps identities apart (Sec. 4.2, Fig. 6), measured: `svdiff compare-pairs`.

All cells (a pair, a method, a way to train, a seed) draw the same prompt from the same noise, so that they are compared
picture by picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from svdiff.config import Config
from svdiff.data.mixes import pair_entry
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.intervals import mean_interval
from svdiff.evaluation.pairs import PAIR_MEASURES
from svdiff.experiments.cells import Cell, Runner, check_distinct
from svdiff.files import atomic_dir
from svdiff.sampling.images import Job
from svdiff.words import check_template

PROMPT = "a {first} sitting beside a {second}"  # the mixes' own prompts are others
METHODS = ("svdiff", "full")
UNTRAINED = "base"  # the method of the cells with no training
WAYS = ("without", "cut-mix-unmix", "unmix")  # joint training alone, on mixes as well, and with the unmix loss on them
SHOWN = 6  # pictures a row of the sheet


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
    """Run every cell, then write the whole to `output`.

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
    if not (pairs or config.pairs):
        raise SvdiffError("params.yaml has no `pairs:`, so there is nothing to compare; add one with two concepts")
    for given in (pairs, methods, ways):
        check_distinct(given)
    try:
        check_template(prompt, ["first", "second"], ["first", "second"])
    except ValueError as error:
        raise SvdiffError(str(error)) from None
    options = _ways(ways, unmix_weight, overrides or {})
    trainings: list[tuple[str, str, int, dict[str, Any] | None]] = [(UNTRAINED, UNTRAINED, 0, None)]
    trainings += [
        (method, way, seed, options[way] | {"method": method, "seed": seed})
        for seed in range(seeds)
        for method in methods
        for way in ways
    ]
    cells = []
    for pair in pairs or config.pairs:
        prompts = pair_entry(config, pair).prompts([prompt])
        jobs = [Job(prompts[number % len(prompts)], number) for number in range(pictures)]
        for method, way, seed, train in trainings:
            labels = {"pair": pair, "method": method, "way": way, "training": seed}
            cells.append(Cell(labels, config, pair, train, jobs))
    table = Runner(config).run(cells).rename(columns={"seed": "picture"})
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
                    result = mean_interval(numbers, resamples=resamples, seed=seed)
                    size = dict(zip(("trainings", "pictures"), numbers.shape, strict=True))
                    named = {"pair": pair, "method": method, "way": way, "measure": measure, "against": against}
                    rows.append(named | result._asdict() | size)
    return pd.DataFrame(rows)


def _matrix(cell: pd.DataFrame, measure: str) -> NDArray[np.float64]:
    """(trainings, pictures) of one measure, in the order of pairs, trainings and pictures."""
    return cell.pivot_table(index=["pair", "training"], columns="picture", values=measure).to_numpy(np.float64)


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
    first = table[(table["training"] == 0) & (table["picture"] < SHOWN)]
    rows, labels = [], []
    for (pair, method, way), cell in first.groupby(["pair", "method", "way"], sort=False):
        rows.append([Image.open(path).convert("RGB") for path in cell.sort_values("picture")["path"]])
        labels.append(f"{pair}, {method}" if method == way else f"{pair}, {method}, {way}")
    return plots.captioned_grid(rows, labels, [f"seed {number}" for number in range(len(rows[0]))], cell=1.1)

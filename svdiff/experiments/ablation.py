"""One key of `train` at several values: what it does to identity and text alignment, and how that looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.alignment import MEASURES
from svdiff.evaluation.intervals import paired_gain
from svdiff.evaluation.pairs import PAIR_MEASURES
from svdiff.experiments.cells import Cell, Runner, check_distinct
from svdiff.files import atomic_dir
from svdiff.sampling.images import Job

#: Keys of `train` that an experiment sets itself, or that say only what is stored on the way.
WITHOUT_EFFECT = (
    "save_every", "validate_every", "validation_prompts", "validation_seeds", "keep_deltas", "choose", "patience", "methods"
)  # fmt: skip

UNTRAINED = "base"


def ablation(config: Config, name: str, key: str, values: Sequence[Any], *, output: Path) -> Path:
    """Train a concept or pair once a value, and draw its evaluation prompts.

    Args:
        config: params.yaml; section `sample` says with which prompts and seeds.
        name: a concept or pair of it.
        key: of `train`, such as prior_weight.
        values: of that key.
        output: gets pictures.csv (a row a picture), gains.csv (for each value and measure the mean, and its gain over the
            untrained base with a 95 % interval) and strip.png.

    Raises:
        SvdiffError: an edit, or an unknown key or value; before the first training.
    """
    if config.entry(name).kind == "edit":
        raise SvdiffError(f"'{name}' is an edit; an ablation compares trainings of a concept or pair")
    check_distinct(values)
    if key in WITHOUT_EFFECT:
        raise SvdiffError(
            f"'{key}' decides nothing of an ablation, whose trainings are validated and saved in a way of their own; choose "
            "another key of `train`"
        )
    jobs = [Job(prompt, seed) for prompt in config.sample_prompts(name) for seed in config.sample.seeds]
    cells = [Cell({"value": UNTRAINED}, config, name, None, jobs)]
    cells += [Cell({"value": str(value)}, config, name, {key: value}, jobs) for value in values]
    table = Runner(config).run(cells)
    measures = PAIR_MEASURES if config.entry(name).kind == "pair" else MEASURES
    with atomic_dir(output) as folder:
        table.drop(columns="path").to_csv(folder / "pictures.csv", index=False, float_format="%.6f")
        gains(config, table, measures).to_csv(folder / "gains.csv", index=False, float_format="%.6f")
        plots.save(_strip(table, key), folder / "strip.png")
    return output


def gains(config: Config, table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """A row a value and measure: `mean`, and the `gain` over the untrained base with its interval, `low` to `high`."""
    of_values = {value: rows.set_index(["prompt", "seed"]) for value, rows in table.groupby("value", sort=False)}
    base = of_values.pop(UNTRAINED)
    rows = []
    for value, own in of_values.items():
        for measure in measures:
            pairs = own[measure], base.loc[own.index, measure]
            gain = paired_gain(*pairs, resamples=config.score.bootstrap, seed=config.score.seed)
            found = {"mean": own[measure].mean(), "gain": gain.mean, "low": gain.low, "high": gain.high}
            rows.append({"value": value, "measure": measure} | found)
    return pd.DataFrame(rows)


def _strip(table: pd.DataFrame, key: str) -> plots.Figure:
    """A row a prompt at its first seed, a column a value; the noise of a row is the same in all columns."""
    first = table[table["seed"] == table["seed"].iloc[0]]
    rows = {
        str(prompt): [Image.open(path).convert("RGB") for path in of_prompt["path"]]
        for prompt, of_prompt in first.groupby("prompt", sort=False)
    }
    columns = [UNTRAINED if value == UNTRAINED else f"{key}\n{value}" for value in first["value"].unique()]
    return plots.captioned_grid(list(rows.values()), list(rows), columns, cell=1.1)

"""What is gained by an edit against what is kept of the picture, for methods and lengths of training (Sec. 4.3, 4.5).

Longer training keeps more of the picture and, by language drift, obeys the target less.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from svdiff.config import Config
from svdiff.editing.stage import with_edit
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.alignment import align
from svdiff.evaluation.evaluators import Evaluators
from svdiff.experiments.cells import Cell, Runner, check_distinct
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import scratch

METHODS = ("svdiff", "full", "lora")
LENGTHS = (50, 100, 200, 400)
UNTRAINED = "base"  # the method of the cells with no training
CELL = ["name", "kind", "structural", "method", "steps", "start"]
MEASURES = ["reconstruction", "edit", "answer", "reconstruction_psnr", "input_edit", "answer_edit"]


class KnownEdit(NamedTuple):
    """An edit whose right answer is known: what is there, what is asked for, and how that would look."""

    name: str
    kind: str
    structural: bool  # whether things change their places or sizes
    prompt: str
    target: str
    picture: Image.Image
    answer: Image.Image


def edit_curves(
    config: Config,
    edits: Sequence[KnownEdit],
    *,
    names: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    lengths: Sequence[int] = LENGTHS,
    output: Path,
) -> Path:
    """Run every cell, then write the whole to `output`.

    Args:
        config: params.yaml; section `edit` gives starts, seeds and each method's learning rates.
        edits: those that can be asked for.
        names: of those that are; default all.
        methods: of training; the untrained base stands beside them.
        lengths: steps of training.
        output: gets cells.csv (a row an edit, method, length and start), curves.csv (their means over small and over
            structural edits), curves.png and pictures.png.

    Returns:
        `output`.

    Raises:
        SvdiffError: an unknown edit or method, or an impossible length; before any work.
    """
    for given in (names, methods, lengths):
        check_distinct(given)
    known = {edit.name: edit for edit in edits}
    if unknown := [name for name in names if name not in known]:
        raise SvdiffError(f"no edit '{unknown[0]}' whose answer is known; there are: {', '.join(known)}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise SvdiffError(f"no method '{unknown[0]}' to compare; known: {', '.join(METHODS)}")
    for steps in lengths:
        config.train.replaced({"steps": steps})
    chosen = [known[name] for name in names or known]
    trainings = {(UNTRAINED, 0): None} | {
        (m, steps): {"method": m, "steps": steps} for m in methods for steps in lengths
    }
    runner, tables = Runner(config), []
    for edit in tqdm(chosen, desc="edits", unit="edit"):
        cells = [_cell(config, edit, method, steps, train) for (method, steps), train in trainings.items()]
        tables.append(score_known(runner.run(cells), edit, runner.evaluators))
    pictures = pd.concat(tables, ignore_index=True)
    table = of_cells(pictures)
    curves = summarise(table)
    with atomic_dir(output) as folder:
        table.to_csv(folder / "cells.csv", index=False, float_format="%.6f")
        curves.to_csv(folder / "curves.csv", index=False, float_format="%.6f")
        plots.save(plots.edit_curves(curves), folder / "curves.png")
        plots.save(_pictures(config, chosen, pictures, methods, max(lengths)), folder / "pictures.png")
    return output


def _cell(config: Config, edit: KnownEdit, method: str, steps: int, train: Mapping[str, Any] | None) -> Cell:
    """The cell of one training on the picture to edit, which is written to a file to be trained on."""
    path = scratch() / "experiments" / "inputs" / f"{hashlib.sha256(edit.picture.tobytes()).hexdigest()[:16]}.png"
    if not path.is_file():
        with atomic_file(path) as temporary:
            edit.picture.save(temporary)
    own = with_edit(config, edit.name, {"image": str(path), "prompt": edit.prompt, "targets": [edit.target]})
    labels = {"name": edit.name, "kind": edit.kind, "structural": edit.structural, "method": method, "steps": steps}
    return Cell(labels, own, edit.name, train)


def score_known(pictures: pd.DataFrame, edit: KnownEdit, evaluators: Evaluators) -> pd.DataFrame:
    """The pictures of an edit's cells with `answer`, 1 − LPIPS to the right answer, and `answer_edit`, what that one scores."""
    drawn = [Image.open(path).convert("RGB") for path in pictures["path"]]
    near = align(drawn, pictures["prompt"].tolist(), [edit.answer], evaluators)["image_alignment"]
    known = align([edit.answer], [edit.target], [edit.answer], evaluators)["text_alignment"].iloc[0]
    return pictures.assign(answer=near.to_numpy(), answer_edit=known)


def of_cells(pictures: pd.DataFrame) -> pd.DataFrame:
    """A row a cell and start: MEASURES, means over its pictures of the target, `reconstruction` over those of the training
    prompt.
    """
    training = pictures["prompt_index"] == 0
    table = pictures[~training].groupby(CELL, sort=False)[MEASURES[1:]].mean()
    table.insert(0, "reconstruction", pictures[training].groupby(CELL)["faithfulness"].mean())
    return table.reset_index()


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over edits, those that keep the structure apart from the others: a row a group, start, method and length."""
    groups = table.groupby(["structural", "start", "method", "steps"], sort=False)
    return groups[MEASURES].mean().assign(edits=groups.size()).reset_index()


def _pictures(
    config: Config, edits: Sequence[KnownEdit], pictures: pd.DataFrame, methods: Sequence[str], steps: int
) -> plots.Figure:
    """A row an edit: the input, the right answer, then each method's longest training from each start."""
    columns = [(method, start) for method in methods for start in config.edit.starts]
    longest = pictures[(pictures["steps"] == steps) & (pictures["prompt_index"] == 1)]
    first = longest.groupby(["name", "method", "start"])["path"].first()
    rows = [
        [edit.picture, edit.answer, *(Image.open(first[edit.name, method, start]) for method, start in columns)]
        for edit in edits
    ]
    labels = ["input", "answer", *(f"{method}\n{start}" for method, start in columns)]
    return plots.captioned_grid(rows, [edit.name for edit in edits], labels)

"""What is gained by an edit against what is kept of the picture, for methods and lengths of training (Sec. 4.3, 4.5).

Longer training keeps more of the picture and, by language drift, obeys the target less. Every cell (an edit, a method, a
number of steps) is trained, sampled from every start and scored once, and kept: after a kill the rest is made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from svdiff.config import Config
from svdiff.editing.edits import EditedPicture, edit_picture
from svdiff.editing.scores import score_edits
from svdiff.editing.stage import with_edit
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.alignment import align
from svdiff.evaluation.evaluators import Evaluators, load_evaluators
from svdiff.evaluation.kept import key
from svdiff.files import atomic_dir, atomic_file
from svdiff.models import load_pipeline, scratch
from svdiff.sampling.stage import personalise

METHODS = ("svdiff", "full", "lora")
LENGTHS = (50, 100, 200, 400)
CODE = ("data/*.py", "editing/*.py", "sampling/*.py", "spectral/*.py", "training/**/*.py")
UNTRAINED = "base"  # the method of the cells with no training
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


class Cell(NamedTuple):
    """One training and what comes of it."""

    edit: KnownEdit
    method: str
    steps: int


def edit_curves(
    config: Config,
    edits: Sequence[KnownEdit],
    *,
    names: Sequence[str] = (),
    methods: Sequence[str] = METHODS,
    lengths: Sequence[int] = LENGTHS,
    output: Path,
) -> Path:
    """Make what is missing of every cell, then write the whole to `output`.

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
    known = {edit.name: edit for edit in edits}
    if unknown := [name for name in names if name not in known]:
        raise SvdiffError(f"no edit '{unknown[0]}' whose answer is known; there are: {', '.join(known)}")
    if unknown := [method for method in methods if method not in METHODS]:
        raise SvdiffError(f"no method '{unknown[0]}' to compare; known: {', '.join(METHODS)}")
    for steps in lengths:
        config.train.replaced({"steps": steps})
    chosen = [known[name] for name in names or known]
    work = scratch() / "edit-curves" / _key(config, edits)[:16]
    cells = [Cell(edit, UNTRAINED, 0) for edit in chosen]
    cells += [Cell(edit, method, steps) for edit in chosen for method in methods for steps in lengths]
    evaluators = load_evaluators(config.evaluators)
    folders = [_finished(config, cell, evaluators, work) for cell in tqdm(cells, desc="cells", unit="cell")]
    table = pd.concat([pd.read_csv(folder / "scores.csv") for folder in folders], ignore_index=True)
    curves = summarise(table)
    with atomic_dir(output) as folder:
        table.to_csv(folder / "cells.csv", index=False, float_format="%.6f")
        curves.to_csv(folder / "curves.csv", index=False, float_format="%.6f")
        plots.save(plots.edit_curves(curves), folder / "curves.png")
        plots.save(_pictures(config, chosen, work, methods, max(lengths)), folder / "pictures.png")
    return output


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over edits, those that keep the structure apart from the others: a row a group, start, method and length."""
    groups = table.groupby(["structural", "start", "method", "steps"], sort=False)
    return groups[MEASURES].mean().assign(edits=groups.size()).reset_index()


def _finished(config: Config, cell: Cell, evaluators: Evaluators, work: Path) -> Path:
    """The folder of a cell: scores.csv (a row a start) and the first picture of each start; made unless it is there."""
    final = _folder(work, cell)
    if final.is_dir():
        return final
    delta = _train(config, cell, final) if cell.steps else None
    pipe = load_pipeline(config.base)
    if delta is not None:
        personalise(pipe, delta)
    edited = edit_picture(pipe, cell.edit.picture, cell.edit.prompt, [cell.edit.target], config.edit)
    rows = _score(cell, edited, cell.edit.answer, evaluators)
    with atomic_dir(final) as folder:
        rows.to_csv(folder / "scores.csv", index=False)
        targets = edited.table[edited.table["prompt_index"] == 1]
        for start, chosen in targets.groupby("start"):
            edited.pictures[chosen.index[0]].save(folder / f"{start}.png")
    if delta is not None:
        _discard(delta.parent)
    return final


def _train(config: Config, cell: Cell, final: Path) -> Path:
    """Train on the cell's picture; the delta's path."""
    from svdiff.training import train

    edit, picture = cell.edit, final.with_name("input.png")
    with atomic_file(picture) as temporary:
        edit.picture.save(temporary)
    own = with_edit(config, edit.name, {"image": str(picture), "prompt": edit.prompt, "targets": [edit.target]})
    overrides = {"method": cell.method, "steps": cell.steps, "validate_every": cell.steps}
    return train(own, edit.name, out_dir=final.with_name(f"{final.name}-train"), overrides=overrides)


def _score(cell: Cell, edited: EditedPicture, answer: Image.Image, evaluators: Evaluators) -> pd.DataFrame:
    """A row a start: MEASURES, of which `answer` is 1 − LPIPS to the right answer and `answer_edit` what that one scores."""
    pictures, numbers = score_edits(edited, evaluators)
    near = align(edited.pictures, pictures["prompt"].tolist(), [answer], evaluators)["image_alignment"]
    known = align([answer], [cell.edit.target], [answer], evaluators)["text_alignment"].iloc[0]
    rows = [
        {
            "name": cell.edit.name,
            "kind": cell.edit.kind,
            "structural": cell.edit.structural,
            "method": cell.method,
            "steps": cell.steps,
            "start": start,
            "reconstruction": numbers[f"{start}_reconstruction"],
            "edit": numbers[f"{start}_edit"],
            "answer": near[(pictures["prompt_index"] == 1) & (pictures["start"] == start)].mean(),
            "reconstruction_psnr": numbers["reconstruction_psnr"],
            "input_edit": numbers["input_edit"],
            "answer_edit": known,
        }
        for start in pictures["start"].unique()
    ]
    return pd.DataFrame(rows)


def _discard(trained: Path) -> None:
    """Remove a training and its resume state: those of full weights would fill a disk with cells that are done."""
    from svdiff.training.stage import state_folder

    train_key = json.loads((trained / "train.json").read_text())["train_key"]
    shutil.rmtree(state_folder(train_key), ignore_errors=True)
    shutil.rmtree(trained)


def _folder(work: Path, cell: Cell) -> Path:
    return work / cell.edit.name / f"{cell.method}-{cell.steps:05d}"


def _pictures(
    config: Config, edits: Sequence[KnownEdit], work: Path, methods: Sequence[str], steps: int
) -> plots.Figure:
    """A row an edit: the input, the right answer, then each method's longest training from each start."""
    rows = []
    for edit in edits:
        folders = [_folder(work, Cell(edit, method, steps)) for method in methods]
        made = [Image.open(folder / f"{start}.png") for folder in folders for start in config.edit.starts]
        rows.append([edit.picture, edit.answer, *made])
    columns = ["input", "answer", *(f"{method}\n{start}" for method in methods for start in config.edit.starts)]
    return plots.captioned_grid(rows, [edit.name for edit in edits], columns)


def _key(config: Config, edits: Sequence[KnownEdit]) -> str:
    """Of everything that a finished cell depends on, but for what its folder's name says."""
    return key(
        config,
        CODE,
        train=config.train.model_dump(mode="json"),
        edit=config.edit.model_dump(mode="json"),
        edits=[[*edit[:5], *(hashlib.sha256(image.tobytes()).hexdigest() for image in edit[5:])] for edit in edits],
        sample=config.sample.model_dump(mode="json", exclude={"prompts", "seeds", "batch_size"}),
    )

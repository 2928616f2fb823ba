"""Runs the cells of experiments: each setting is trained, draws its pictures and is scored once, and all experiments share it.

An experiment is a table of cells, `Runner.run`, and a drawing of the table that comes back: `rank`, `ablation`, `pairs` and
`edits` are such. Everything is stored in the scratch folder under a hash of what it depends on (the base, the data, the settings,
the code), so after a kill only what is missing is made, and more pictures or cells add to what is there.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from svdiff.catalogue import Entry
from svdiff.config import Config, TrainConfig
from svdiff.data.mixes import make_mixes, mix_folder
from svdiff.data.prior import prior_folder
from svdiff.editing.stage import make_edits
from svdiff.errors import SvdiffError
from svdiff.evaluation.evaluators import Evaluators, describe_evaluators, load_evaluators
from svdiff.evaluation.score import real_pictures, score_pictures
from svdiff.files import atomic_file, read_table, sha256_file, sha256_tree, write_atomic
from svdiff.models import load_pipeline, scratch
from svdiff.sampling.images import Job
from svdiff.sampling.prior import make_prior_images
from svdiff.sampling.stage import Switch, default_negatives, draw_pictures

PACKAGE = Path(__file__).parents[1]
TRAINING = ("data/*.py", "models/*.py", "spectral/**/*.py", "training/**/*.py")  # code that decides each result
DRAWING = ("models/*.py", "sampling/*.py", "spectral/**/*.py", "editing/edits.py")
SCORING = ("data/concepts.py", "data/foreground.py", "data/reading.py", "evaluation/*.py", "editing/scores.py")
SMALL = 10_000_000  # bytes: larger deltas, of whole weights, are removed when their pictures are drawn


def check_distinct(values: Sequence[Any]) -> None:
    """Raise SvdiffError for a value that is given twice: its rows would count twice."""
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise SvdiffError(f"{twice[0]!r} is given twice; expected each once")


@dataclass(frozen=True)
class Cell:
    """One setting: a training and the pictures that are drawn after it."""

    labels: Mapping[str, Any]  # columns of the results, which tell the cell from others
    config: Config  # params.yaml as the cell sees it
    name: str  # of a concept, pair or edit
    train: Mapping[str, Any] | None  # keys of `train` set differently; None: the untrained base
    jobs: Sequence[Job] = field(default=())  # the pictures of a concept or pair; an edit draws its targets

    @property
    def entry(self) -> Entry:
        """What is trained and drawn."""
        return self.config.entry(self.name)

    @property
    def overrides(self) -> dict[str, Any]:
        """Keys of `train` set differently. Validation pictures at the ends only: nobody follows the training."""
        own = dict(self.train or {})
        return own | {"validate_every": self.config.train_config(self.name, own).steps}

    @property
    def settings(self) -> TrainConfig | None:
        """All settings of the training. Raises SvdiffError for impossible ones."""
        return None if self.train is None else self.config.train_config(self.name, self.overrides)


class Runner:
    """Makes what is missing of cells, one after another. The base and the evaluators are loaded once, if they are needed."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = scratch() / "experiments"

    def run(self, cells: Sequence[Cell], *, scored: bool = True) -> pd.DataFrame:
        """Train, draw and score whatever is missing.

        Returns:
            A row a picture: the cell's labels, `path`, `prompt`, `seed`, and unless `scored` is false the scores of
            `score_pictures`. Of an edit: `prompt_index`, `start` and the scores of `score_edits` instead.

        Raises:
            SvdiffError: an unknown name or an impossible setting, for all cells before the first is made; or what training,
                sampling and scoring raise.
        """
        for cell in cells:
            _ = cell.entry, cell.settings
        tables = []
        for cell in tqdm(cells, desc="cells", unit="cell"):
            _prepare(cell)
            trained = self._trained_key(cell)
            is_edit = cell.entry.kind == "edit"
            table = self._edited(cell, trained) if is_edit else self._pictures(cell, trained, scored)
            tables.append(table.assign(**cell.labels))
        return pd.concat(tables, ignore_index=True)

    def _delta(self, cell: Cell, trained: str) -> Path:
        """The delta of a cell, trained unless it is there."""
        from svdiff.training import train
        from svdiff.training.run import state_folder

        folder = self.folder / "trained" / trained
        delta = folder / "delta.safetensors"
        if not delta.is_file():
            self.__dict__.pop("_switch", None)  # the training loads the base itself; two would not fit everywhere
            gc.collect()  # hooks of networks refer to each other, and commands look for such rings rarely
            quiet = cell.config.tracking.model_copy(update={"live": "none"})
            config = cell.config.model_copy(update={"tracking": quiet})
            train(config, cell.name, out_dir=folder, overrides=cell.overrides)
        key = json.loads((folder / "train.json").read_text())["train_key"]
        shutil.rmtree(state_folder(key), ignore_errors=True)  # of full weights it would fill a disk
        return delta

    def _pictures(self, cell: Cell, trained: str | None, scored: bool) -> pd.DataFrame:
        """The pictures of a concept or pair, and their scores."""
        folder = self.folder / "drawn" / self._drawn_key(cell, trained)
        files = [f"{_digest(job.prompt)[:8]}-{job.seed:04d}.png" for job in cell.jobs]
        missing = [(file, job) for file, job in zip(files, cell.jobs, strict=True) if not (folder / file).is_file()]
        if missing:
            with self._personalised(cell, trained) as pipe:
                jobs, negatives = [job for _, job in missing], default_negatives(cell.config, cell.entry)
                images = draw_pictures(pipe, jobs, cell.config.sample, negatives, progress=f"draw {cell.name}")
                for (file, _), image in zip(missing, images, strict=True):
                    with atomic_file(folder / file) as temporary:
                        image.save(temporary)
        table = pd.DataFrame(cell.jobs, columns=["prompt", "seed"]).assign(path=[str(folder / file) for file in files])
        return table.join(self._scores(cell, folder, files)) if scored else table

    def _scores(self, cell: Cell, folder: Path, files: Sequence[str]) -> pd.DataFrame:
        """Scores of a cell's pictures, stored beside them."""
        real = real_pictures(cell.entry)
        hashes = {name: [hashlib.sha256(one.tobytes()).hexdigest() for one in of] for name, of in real.items()}
        path = folder / f"scores-{_digest(self._scored_by, hashes, cell.entry.tokens, files)[:16]}.csv"
        if not path.is_file():
            pictures = [Image.open(folder / file).convert("RGB") for file in files]
            prompts = [job.prompt for job in cell.jobs]
            scores = score_pictures(cell.entry, prompts, pictures, real, self.evaluators)
            write_atomic(path, scores.to_csv(index=False, float_format="%.9f"))
        return read_table(path)

    def _edited(self, cell: Cell, trained: str | None) -> pd.DataFrame:
        """The edits of one picture and their scores; numbers of the whole edit stand in every row."""
        folder = self.folder / "edited" / _digest(self._drawn_key(cell, trained), self._scored_by)[:24]
        if not folder.is_dir():
            with self._personalised(cell, trained) as pipe:
                make_edits(pipe, cell.config, cell.name, self.evaluators, folder)
        table, numbers = read_table(folder / "images.csv"), json.loads((folder / "metrics.json").read_text())
        table["path"] = [str(folder / "pictures" / file) for file in table["file"]]
        return table.assign(**{name: numbers[name] for name in ("reconstruction_psnr", "input_edit")})

    @contextmanager
    def _personalised(self, cell: Cell, trained: str | None) -> Iterator[Any]:
        """The pipeline with the cell's training on it."""
        if trained is None:
            self._switch.off()
            yield self.pipe
            return
        delta = self._delta(cell, trained)
        with self._switch.on([(delta, 1.0)]) as pipe:
            yield pipe
        if delta.stat().st_size > SMALL:
            shutil.rmtree(delta.parent)

    @property
    def pipe(self) -> Any:
        """The base, untrained unless a cell is on it."""
        return self._switch.pipe

    @cached_property
    def _switch(self) -> Switch:
        return Switch(load_pipeline(self.config.base))

    @cached_property
    def evaluators(self) -> Evaluators:
        """Those of params.yaml."""
        return load_evaluators(self.config.evaluators)

    @cached_property
    def _base(self) -> str:
        model, settings = Path(self.config.base.model), self.config.base.model_dump(exclude={"offload", "vae_slicing"})
        files = [Path(name) for name in (model, self.config.base.config) if name and Path(name).exists()]
        return _digest(settings, [sha256_tree(path) for path in files])

    @cached_property
    def _scored_by(self) -> str:
        return _digest(describe_evaluators(self.config.evaluators), _code(SCORING))

    def _trained_key(self, cell: Cell) -> str | None:
        """Hash of everything that a cell's training depends on; None: the untrained base."""
        from svdiff.training.datasets import read_training_data

        settings = cell.settings
        if settings is None:
            return None
        data = read_training_data(cell.config, cell.entry, settings)
        training = settings.model_dump(mode="json", exclude={"save_every"})
        own = cell.entry.kind, cell.entry.subjects, cell.config.prior.prompt, data.reads
        return _digest(self._base, training, own, _code(TRAINING))[:24]

    def _drawn_key(self, cell: Cell, trained: str | None) -> str:
        """Hash of everything that a cell's pictures depend on, but their prompts and seeds."""
        if cell.entry.kind == "edit":
            request, settings = cell.config.edit_of(cell.name), cell.config.edit
            picture = sha256_file(request.image)
            drawn = [
                picture,
                request.model_dump(mode="json", exclude={"image", "train"}),
                settings.model_dump(mode="json", exclude={"train", "methods"}),
            ]
        else:
            neutral = {"prompts", "seeds", "batch_size", "drift_pictures"}
            negatives = default_negatives(cell.config, cell.entry)
            drawn = [cell.config.sample.model_dump(mode="json", exclude=neutral), negatives]
        return _digest(self._base, trained, drawn, _code(DRAWING))[:24]


def _prepare(cell: Cell) -> None:
    """Prior images and mixes that the training needs and that no stage has made yet."""
    settings, entry = cell.settings, cell.entry
    if settings is None:
        return
    if settings.prior_weight > 0 or entry.kind == "pair":
        for word in dict.fromkeys(concept.class_word for concept in entry.concepts.values()):
            if not prior_folder(word).is_dir():
                make_prior_images(cell.config, word)
    if entry.kind == "pair" and not mix_folder(cell.name).is_dir():
        make_mixes(cell.config, cell.name)


def _code(patterns: Sequence[str]) -> list[str]:
    return [sha256_file(path) for pattern in patterns for path in sorted(PACKAGE.glob(pattern))]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

"""Reads what the stages of one concept wrote below out/, and checks it before anything is registered."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline.order import stage_of
from svdiff.catalogue import Entry
from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.files import read_table, sha256_file, sha256_tree

if TYPE_CHECKING:
    import pandas as pd

EVALUATORS = "evaluators.json"
REQUIRED = {
    "train": ("delta.safetensors", "curve.csv", "train.json"),
    "sample": ("images.csv",),
    "score": ("metrics.json", "images.csv"),
}


@dataclass(frozen=True)
class Results:
    """Folders `train`, `sample` and `score` of a concept or pair below `root`/out, all complete."""

    entry: Entry
    root: Path

    @property
    def concept(self) -> str:
        """Its name."""
        return self.entry.name

    def folder(self, stage: str) -> Path:
        """Output folder of a stage."""
        return self.root / "out" / stage / self.concept

    @property
    def delta(self) -> Path:
        """The trained shifts."""
        return self.folder("train") / "delta.safetensors"

    @cached_property
    def delta_sha256(self) -> str:
        """Hash of the delta's bytes: with the base's hash, the identity of a registered version."""
        return sha256_file(self.delta)

    @cached_property
    def delta_metadata(self) -> dict[str, str]:
        """Provenance inside the delta file. Raises SvdiffError if it is no delta, or a number in it is not finite."""
        import numpy as np
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.delta), "np") as stream:
                metadata: dict[str, str] = stream.metadata() or {}
                broken = [name for name in stream.keys() if not np.isfinite(stream.get_tensor(name)).all()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise SvdiffError(f"{self.delta} cannot be read ({error}); {self._again('train')}") from None
        if broken:
            raise SvdiffError(f"{self.delta}: '{broken[0]}' has values that are not finite; {self._again('train')}")
        if "base_hash" not in metadata:
            raise SvdiffError(f"{self.delta} says no base_hash, so nobody could tell where it fits: no spectral delta")
        return metadata

    @property
    def base_hash(self) -> str:
        """Hash of the base weights that the delta belongs to."""
        return self.delta_metadata["base_hash"]

    @cached_property
    def training(self) -> dict[str, Any]:
        """train.json."""
        content: dict[str, Any] = json.loads((self.folder("train") / "train.json").read_text())
        if "train_key" not in content:
            raise SvdiffError(f"{self.folder('train') / 'train.json'} has no train_key; {self._again('train')}")
        return content

    @cached_property
    def curve(self) -> pd.DataFrame:
        """curve.csv: one row a step."""

        return read_table(self.folder("train") / "curve.csv")

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The numbers of metrics.json."""
        path = self.folder("score") / "metrics.json"
        content = json.loads(path.read_text())
        for key, value in content.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise SvdiffError(f"{path}: {key} is {value!r}; expected a finite number; {self._again('score')}")
        return {key: float(value) for key, value in content.items()}

    @cached_property
    def scores(self) -> Scores:
        """The trained model's scores, picture by picture."""
        return Scores.read(self.folder("score"))

    def check_numbers(self) -> None:
        """Raise SvdiffError for anything in delta or scores that is not a finite number, before any of it is registered."""
        _ = self.delta_metadata, self.metrics, self.scores

    @cached_property
    def scores_sha256(self) -> str:
        """Hash of everything that scoring said, to tell a new scoring from a repeated registration."""
        return sha256_tree(self.folder("score"))

    def _again(self, step: str) -> str:
        return f"{step} again: `dvc repro -f -s {stage_of(self.entry, step)}`"


def read_results(config: Config, concept: str, root: Path = Path()) -> Results:
    """The results of `concept`. Raises SvdiffError for an edit, or naming the missing file and the stage that makes it."""
    entry = config.entry(concept)
    if entry.kind == "edit":
        raise SvdiffError(
            f"'{concept}' is an edit, and edits are not registered; expected a concept or pair of params.yaml"
        )
    results = Results(entry, root.resolve())
    for stage, names in REQUIRED.items():
        for name in names:
            if not (results.folder(stage) / name).is_file():
                path = results.folder(stage).relative_to(results.root) / name
                raise SvdiffError(f"{path} is missing; make it with `dvc repro {stage_of(entry, stage)}`")
    return results


@dataclass(frozen=True)
class Scores:
    """Scores of a version's pictures, a row a picture, and who scored them; without those of the untrained base."""

    table: pd.DataFrame  # by (prompt, seed): identity, text_alignment and whatever else is a number
    evaluators: dict[str, Any] | None
    drift: pd.DataFrame | None = None  # the same of class prompts' pictures, with identity alone

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """Read images.csv, drift.csv and evaluators.json of a `score` folder, or of a copy of one."""
        texts = [path.read_text() if path.is_file() else None for path in (folder / "drift.csv", folder / EVALUATORS)]
        return cls.parse((folder / "images.csv").read_text(), *texts)

    @classmethod
    def parse(cls, images_csv: str, drift_csv: str | None = None, evaluators_json: str | None = None) -> Scores:
        """Scores from the texts of the files. Raises SvdiffError for a missing column or a score that is no number."""
        drift = _scored(drift_csv, "drift.csv", ["identity"]) if drift_csv else None
        return cls(
            _scored(images_csv, "images.csv", ["identity", "text_alignment"]),
            json.loads(evaluators_json) if evaluators_json else None,
            None if drift is None or drift.empty else drift,
        )


def _scored(text: str, name: str, needed: list[str]) -> pd.DataFrame:
    """The trained model's rows of a csv by (prompt, seed), numbers only."""
    import numpy as np
    import pandas as pd

    table = read_table(io.StringIO(text))
    if missing := sorted({"prompt", "seed", *needed} - set(table.columns)):
        raise SvdiffError(f"{name} lacks column {', '.join(missing)}; found {', '.join(table.columns)}; score again")
    if "model" in table:
        table = table[table["model"] == "trained"]
    table = table.set_index(["prompt", "seed"])
    for column in needed:
        table[column] = pd.to_numeric(table[column], errors="coerce")
        if not np.isfinite(table[column]).all():
            prompt, seed = table.index[~np.isfinite(table[column])][0]
            raise SvdiffError(f"{name}: {column} of '{prompt}' at seed {seed} is not a finite number; score again")
    numbers = table.select_dtypes("number").drop(columns="prompt_index", errors="ignore")
    return numbers[~numbers.index.duplicated()]

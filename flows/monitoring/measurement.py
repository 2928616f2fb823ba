"""Samples and scores a registered version: its delta from the registry, on its own base, by the evaluators of today."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.registry.concepts import BrokenVersion, fetch
from flows.registry.conditions import Conditions, conditions
from svdiff.catalogue import Entry
from svdiff.config import BaseModelConfig, ConceptConfig, Config
from svdiff.data.concepts import concept_folder
from svdiff.errors import SvdiffError
from svdiff.peaks import Peaks

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion
    from PIL.Image import Image

    from flows.registry.tracking import Tracking
    from svdiff.evaluation.evaluators import Evaluators
    from svdiff.sampling import Job
    from svdiff.sampling.stage import Switch

BASE_VARIABLE = "SVDIFF_BASE_MODEL"  # as in concept_model.py, which must not depend on this module


@dataclass(frozen=True)
class Measurement:
    """Scores by (prompt, seed), the pictures in the same order, and the scores of class prompts' pictures if asked for."""

    table: pd.DataFrame
    images: list[Image]
    drift: pd.DataFrame | None = None


def entry_of(version: ModelVersion) -> Entry:
    """The concept or pair of a version in its own words, whatever params.yaml says by now."""
    tags = version.tags
    parts = [tags.get(key, default).split(", ") for key, default in (("concepts", version.name), ("class_word", ""))]
    tokens = tags.get("token", "").split(", ")
    concepts = {
        name: ConceptConfig(class_word=word, token=token) for name, word, token in zip(*parts, tokens, strict=True)
    }
    return Entry(version.name, "pair" if len(concepts) > 1 else "concept", concepts)


class VersionScorer:
    """Scores versions one after another; evaluators and base are loaded once, and only when they are needed.

    `peaks` is the most memory that each phase held, of all versions.
    """

    def __init__(self, config: Config, root: Path) -> None:
        self.config, self.root, self.peaks = config, root, Peaks()
        self._loaded: tuple[BaseModelConfig, Switch, str] | None = None

    def conditions(self, version: ModelVersion) -> Conditions:
        """The conditions that scores of `version` would be measured under today."""
        entry = entry_of(version)
        return conditions(
            self.evaluators_described,
            self._shown(entry),
            self.config.sample,
            [self.root / concept_folder(name) for name in entry.concepts],
        )

    def score(self, tracking: Tracking, version: ModelVersion, *, drift: bool = False) -> Measurement:
        """Sample the version's prompts at their seeds, with `drift` also the bare class prompts, and score them.

        Raises:
            BrokenVersion: the delta or its base is not what was registered.
            SvdiffError: the base or the concept's pictures are not here, so nothing can be said.
        """
        from svdiff.evaluation.score import real_pictures
        from svdiff.sampling import Job
        from svdiff.sampling.stage import class_jobs, default_negatives, draw_pictures

        entry = entry_of(version)
        jobs = [Job(prompt, seed) for prompt, seed in self._shown(entry)]
        bare = class_jobs(self.config, entry) if drift else []
        # Read before the work: without them nothing can be said.
        real = real_pictures(entry, self.root)
        with tempfile.TemporaryDirectory() as folder:
            delta, description = fetch(tracking, version, Path(folder))
            with self.peaks.phase("loading"):
                switch = self._switch(version, description)
            with ExitStack() as on:
                try:
                    with self.peaks.phase("decomposition"):
                        on.enter_context(switch.on([(delta, 1.0)]))
                except SvdiffError as error:
                    raise BrokenVersion(str(error)) from error
                negatives = default_negatives(self.config, entry)
                with self.peaks.phase("sampling"):
                    images = draw_pictures(switch.pipe, jobs, self.config.sample, negatives)
                    class_images = draw_pictures(switch.pipe, bare, self.config.sample, negatives) if bare else []
        with self.peaks.phase("scoring"):
            of_class = self._score_drift(bare, class_images, real) if bare else None
            return Measurement(self._score(entry, jobs, images, real), images, of_class)

    def _shown(self, entry: Entry) -> list[tuple[str, int]]:
        """Prompt and seed of every picture."""
        templates = self.config.mix.prompts if entry.kind == "pair" else self.config.sample.prompts
        return [(prompt, seed) for prompt in entry.prompts(templates) for seed in self.config.sample.seeds]

    def _score(self, entry: Entry, jobs: list[Job], images: list[Image], real: dict[str, list[Image]]) -> pd.DataFrame:
        import pandas as pd

        from svdiff.evaluation.score import score_pictures

        table = pd.DataFrame(jobs, columns=["prompt", "seed"])
        scores = score_pictures(entry, table["prompt"].tolist(), images, real, self._evaluators)
        # As many decimals as the files of the stage `score` keep.
        return scores.select_dtypes("number").round(6).set_index(pd.MultiIndex.from_frame(table))

    def _score_drift(self, jobs: list[Job], images: list[Image], real: dict[str, list[Image]]) -> pd.DataFrame:
        import pandas as pd

        from svdiff.evaluation.score import score_drift

        scored = score_drift(pd.DataFrame(jobs, columns=["prompt", "seed"]), images, real, self._evaluators)
        return scored.set_index(["prompt", "seed"])[["identity"]].round(6)

    @cached_property
    def evaluators_described(self) -> Any:
        """Content of evaluators.json for the evaluators of today."""
        from svdiff.evaluation.evaluators import describe_evaluators

        return json.loads(json.dumps(describe_evaluators(self.config.evaluators)))

    @cached_property
    def _evaluators(self) -> Evaluators:
        from svdiff.evaluation.evaluators import load_evaluators

        return load_evaluators(self.config.evaluators)

    def _switch(self, version: ModelVersion, description: dict[str, Any]) -> Switch:
        """The version's base, on which deltas are switched."""
        from svdiff.models import family_of, load_pipeline
        from svdiff.sampling.stage import Switch
        from svdiff.spectral import weights_hash

        base = self._base(description)
        if self._loaded is None or self._loaded[0] != base:
            self._loaded = None  # before the next is loaded: two would not fit everywhere
            pipe = load_pipeline(base)
            self._loaded = (base, Switch(pipe), weights_hash(family_of(pipe).network))
        _, switch, found = self._loaded
        registered = version.tags.get("base_hash")
        if found != registered:
            raise BrokenVersion(
                f"it was trained on a base with weights {str(registered)[:16]}…, {base.model} has {found[:16]}…; bring "
                f"that base back, name its folder in {BASE_VARIABLE}, or train the concept again"
            )
        return switch

    def _base(self, description: dict[str, Any]) -> BaseModelConfig:
        """The base that the version names; this checkout's own where that folder is on another machine."""
        base, named = dict(description["base"]), os.environ.get(BASE_VARIABLE)
        if named is None and description["checkout"] is not None:  # a folder of the checkout
            named = str(self.root / base["model"])
        if named is None and Path(base["model"]).is_absolute() and not Path(base["model"]).exists():
            named = str(self.root / self.config.base.model)
        return BaseModelConfig(**base if named is None else base | {"model": named, "revision": None})

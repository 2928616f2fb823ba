"""The conditions that scores were measured under, and the baseline that a version's later scores are compared with.

Scores compare only where the conditions are the same: evaluators, prompts and seeds, sampler, and the concept's own
pictures. A version's tags name the conditions of its baseline and the run that holds the baseline's scores: first the run of
its training, later that of the first re-evaluation under new conditions.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline.results import Results, Scores
from svdiff.config import Config, SampleConfig
from svdiff.data.concepts import concept_folder
from svdiff.errors import SvdiffError
from svdiff.files import sha256_tree

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from flows.registry.tracking import Tracking

BASELINE, BASELINE_RUN = "baseline", "baseline_run"  # tags of a version
SCORES_FOLDER = "scores"  # artifacts of the run: images.csv and evaluators.json
DIGITS = 16  # of each part's hash

Conditions = dict[str, str]  # `evaluators`, `prompts`, `sampling`, `pictures`: a short hash each


def conditions(
    evaluators: Any, shown: Iterable[tuple[str, int]], settings: SampleConfig, references: Sequence[Path]
) -> Conditions:
    """The conditions of scores.

    Args:
        evaluators: content of evaluators.json.
        shown: prompt and seed of every picture.
        settings: how they were sampled; prompts and seeds count as far as they are `shown`.
        references: folders of the pictures that image alignment is against.
    """
    return {
        "evaluators": _hash(evaluators),
        "prompts": _hash(sorted((prompt, int(seed)) for prompt, seed in shown)),
        "sampling": _hash(settings.model_dump(mode="json", exclude={"prompts", "seeds", "batch_size"})),
        "pictures": _hash([sha256_tree(folder) if folder.exists() else None for folder in references]),
    }


def conditions_of_results(config: Config, results: Results) -> Conditions:
    """The conditions of what the stages `sample` and `score` left."""
    scores = results.scores
    return conditions(
        scores.evaluators,
        scores.table.index,
        config.sample,
        [results.root / concept_folder(name) for name in results.entry.concepts],
    )


def changed(before: Conditions, now: Conditions) -> list[str]:
    """Names of the parts that differ."""
    return [part for part in now if before.get(part) != now[part]]


def baseline_conditions(version: ModelVersion) -> Conditions | None:
    """The conditions of a version's baseline; None for one that was registered without."""
    return json.loads(version.tags[BASELINE]) if BASELINE in version.tags else None


def set_baseline(tracking: Tracking, version: ModelVersion, now: Conditions, run_id: str) -> None:
    """Scores of the run `run_id`, measured under `now`, are the version's baseline from here on."""
    client, name, number = tracking.client, version.name, str(version.version)
    client.set_model_version_tag(name, number, BASELINE_RUN, run_id)
    client.set_model_version_tag(name, number, BASELINE, json.dumps(now))


def baseline_scores(tracking: Tracking, version: ModelVersion) -> Scores:
    """Scores of the version's baseline. Raises what the artifact store raises, SvdiffError without a run."""
    run_id = version.tags.get(BASELINE_RUN) or version.run_id
    if not run_id:
        raise SvdiffError("it has no run")
    with tempfile.TemporaryDirectory() as folder:
        return Scores.read(Path(tracking.client.download_artifacts(run_id, SCORES_FOLDER, folder)))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]

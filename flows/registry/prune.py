"""Finding and removing what nothing refers to any more.

- Resume states of trainings that are finished: their delta lies in out/train, in an experiment, or in the registry.
- Decompositions of bases that no trained or registered delta is of, and that nobody used for a week.
- Clones of reproductions that were killed a day ago or longer.
- MLflow's deleted runs with their artifacts, and stored models that no version refers to, a day old or older; never
  what a registered version refers to.
- Objects in DVC's cache that neither the workspace, nor anything that git can find again, nor a registered version refers
  to. The remote is never touched.

Every part can be asked for by itself; a part that cannot be looked at says why and removes nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline.cache import remove_unused_objects, unused_objects
from flows.registry.concepts import RegisteredConcept, model_id, read_concepts
from flows.registry.conditions import BASELINE_RUN
from flows.registry.runs import read_lineage
from flows.registry.storage import usage
from flows.registry.tracking import all_pages, local_path
from svdiff.errors import SvdiffError
from svdiff.models import scratch
from svdiff.spectral.cache import delete_cached, list_cache

if TYPE_CHECKING:
    from flows.registry.tracking import Tracking

DAY = 86_400.0
WEEK = 7 * DAY
KEY_DIGITS = 24  # of a training's key, in the name of its resume state


@dataclass(frozen=True)
class Removable:
    """Something that nothing refers to."""

    what: str
    where: str
    bytes: int


@dataclass(frozen=True)
class Part:
    """What one part found, and how to remove just that; `problem` says why it could not look."""

    name: str
    found: list[Removable]
    remove: Callable[[], None]
    problem: str = ""


def find_unused(tracking: Tracking, root: Path) -> Iterator[Part]:
    """Every part with what it found. Nothing is removed before `Part.remove` is called."""
    concepts = read_concepts(tracking)
    home = root / scratch()
    for name, find in {
        "resume states": lambda: _folders(
            _finished_states(root, home, concepts), "resume state of a finished training"
        ),
        "decompositions": lambda: _folders(
            _unused_bases(root, home, concepts), "decomposition of an unused base", delete_cached
        ),
        "reproductions": lambda: _folders(_old(home / "reproduce"), "clone of a reproduction"),
        "MLflow": lambda: _mlflow(tracking, concepts),
        "DVC": lambda: _dvc(tracking, root, concepts),
    }.items():
        try:
            yield Part(name, *find())
        except (SvdiffError, OSError) as error:
            yield Part(name, [], lambda: None, problem=str(error))


Found = tuple[list[Removable], Callable[[], None]]


def _folders(folders: list[Path], what: str, delete: Callable[[Path], Any] = shutil.rmtree) -> Found:
    found = [Removable(what, str(folder), usage(what, folder).bytes) for folder in folders]

    def remove() -> None:
        for folder in folders:
            with suppress(FileNotFoundError):
                delete(folder)

    return found, remove


def _finished_states(root: Path, home: Path, concepts: list[RegisteredConcept]) -> list[Path]:
    """States that no training would take up: it would find its delta there."""
    records = [*root.glob("out/**/train.json"), *home.glob("experiments/**/train.json")]
    keys = {str(json.loads(record.read_text()).get("train_key", "")) for record in records}
    keys |= {version.tags.get("train_key", "") for concept in concepts for version in concept.versions.values()}
    finished = {key[:KEY_DIGITS] for key in keys if key}
    return sorted(folder for folder in home.glob("state/*") if folder.name.rpartition("-")[2] in finished)


def _unused_bases(root: Path, home: Path, concepts: list[RegisteredConcept]) -> list[Path]:
    cached = [base for base in list_cache(home / "bases") if time.time() - base.used > WEEK]
    if not cached:
        return []
    used = {v for c in concepts for version in c.versions.values() for v in _base_hashes(version.tags)}
    for delta in [*root.glob("out/**/delta.safetensors"), *home.glob("experiments/**/delta.safetensors")]:
        used |= _base_hashes(_metadata(delta))
    return [home / "bases" / base.base_hash for base in cached if base.base_hash not in used]


def _base_hashes(values: dict[str, str]) -> set[str]:
    return {value for key, value in values.items() if key.endswith("base_hash")}


def _metadata(delta: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(delta), "np") as stream:
            return dict(stream.metadata() or {})
    except SafetensorError as error:
        raise SvdiffError(f"{delta} cannot be read, so that its base is not known: {error}") from None


def _old(folder: Path) -> list[Path]:
    """Folders in `folder` that nobody touched for a day."""
    return sorted(f for f in folder.glob("*") if f.is_dir() and time.time() - f.stat().st_mtime > DAY)


def _mlflow(tracking: Tracking, concepts: list[RegisteredConcept]) -> Found:
    """Deleted runs, and models that were stored but belong to no version: what a kill or a deletion leaves."""
    if tracking.uri.startswith("http"):
        raise SvdiffError(f"{tracking.uri} is a server; run `mlflow gc` where its database is")
    versions = [version for concept in concepts for version in concept.versions.values()]
    referred = {run for v in versions for run in (v.run_id, v.tags.get(BASELINE_RUN)) if run}
    runs = _deleted_runs(tracking)
    if wanted := referred & {run.info.run_id for run in runs}:
        raise SvdiffError(
            f"deleted runs belong to registered versions: {', '.join(sorted(wanted))}; restore them with `mlflow runs "
            "restore --run-id …`, or delete the versions as well"
        )
    models = _orphaned_models(tracking, {model_id(version) for version in versions})
    found = [_removable("deleted run", run.info.run_id, run.info.artifact_uri) for run in runs]
    found += [_removable("stored model of no version", m.model_id, m.artifact_location) for m in models]

    def remove() -> None:
        for model in models:
            tracking.client.delete_logged_model(model.model_id)
        # By environment: arguments can be read by everybody on the machine, and the address may hold a password.
        store = {"MLFLOW_BACKEND_STORE_URI": tracking.uri, "MLFLOW_TRACKING_URI": tracking.uri}
        command = ["gc"]
        if runs:
            command += ["--run-ids", ",".join(run.info.run_id for run in runs)]
        if models:
            command += ["--logged-model-ids", ",".join(model.model_id for model in models)]
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", *command], env=os.environ | store, capture_output=True, text=True
        )
        if done.returncode:
            raise SvdiffError(f"`mlflow gc` failed: {done.stderr.strip()[-2000:]}")

    return found, remove


def _dvc(tracking: Tracking, root: Path, concepts: list[RegisteredConcept]) -> Found:
    # A version's own record of its inputs: its dvc.lock may never have been committed.
    versions = [version for concept in concepts for version in concept.versions.values()]
    recorded = [json.dumps(read_lineage(tracking, version)["stages"]) for version in versions]
    unused = unused_objects(root, recorded)
    found = [Removable("object that nothing refers to", str(path), path.lstat().st_size) for path in unused]
    return found, lambda: remove_unused_objects(root, recorded) if unused else None


def _deleted_runs(tracking: Tracking) -> list[Any]:
    """Deleted runs of all experiments, deleted or not."""
    from mlflow.entities import ViewType

    ids = [str(e.experiment_id) for e in tracking.client.search_experiments(view_type=ViewType.ALL)]
    return all_pages(tracking.client.search_runs, ids, run_view_type=ViewType.DELETED_ONLY)


def _orphaned_models(tracking: Tracking, used: set[str]) -> list[Any]:
    found = all_pages(tracking.client.search_logged_models, [tracking.experiment_id])
    before = (time.time() - DAY) * 1000  # younger ones may be about to be registered
    return [model for model in found if model.model_id not in used and model.creation_timestamp < before]


def _removable(what: str, name: str, uri: str) -> Removable:
    path = local_path(uri)
    size = usage(what, path).bytes if path is not None and path.exists() else 0
    return Removable(what, name, size)

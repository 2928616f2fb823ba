"""How much disk resume states, decompositions and other scratch, DVC's cache and remote, MLflow and Prefect take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.pipeline.cache import dvc_places
from flows.registry.tracking import SQLITE, local_path
from svdiff.models import scratch

if TYPE_CHECKING:
    from flows.registry.tracking import Tracking

# Folders of the scratch folder by what they hold; others are shown by their names.
SCRATCH = {
    "state": "resume states of trainings",
    "bases": "decompositions of bases",
    "prior": "prior images by base and prompt",
    "experiments": "trainings and pictures of experiments",
    "base": "training of the embedded base",
    "reproduce": "reproductions",
}


@dataclass(frozen=True)
class Usage:
    """One consumer: bytes of its files, each counted once however many names it has."""

    what: str
    where: str
    bytes: int
    files: int


def disk_usage(tracking: Tracking, root: Path) -> list[Usage]:
    """What each store takes, largest first; stores on other machines are not asked."""
    places = list(_places(tracking, root))
    return sorted((usage(what, path) for what, path in places if path.exists()), key=lambda u: -u.bytes)


def usage(what: str, path: Path) -> Usage:
    """Size of a file or of all files below a folder."""
    sizes = {}
    for file in [path] if path.is_file() else files_below(path):
        status = file.lstat()
        sizes[(status.st_dev, status.st_ino)] = status.st_size
    return Usage(what, str(path), sum(sizes.values()), len(sizes))


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder; links to folders are not followed, and what vanishes meanwhile is left out."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if os.path.lexists(path := Path(parent, name)):
                yield path


def _places(tracking: Tracking, root: Path) -> Iterator[tuple[str, Path]]:
    home = root / scratch()
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        yield SCRATCH.get(folder.name, f"scratch: {folder.name}"), folder
    yield from dvc_places(root)
    if tracking.uri.startswith(SQLITE):
        yield "MLflow database", Path(tracking.uri.removeprefix(SQLITE))
    artifacts = local_path(tracking.client.get_experiment(tracking.experiment_id).artifact_location)
    if artifacts is not None:
        yield "MLflow artifacts", artifacts
    yield "Prefect: database, logs, services", root / ".prefect"


def human(size: int) -> str:
    """Bytes for people, in powers of 1000."""
    value, unit = float(size), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"

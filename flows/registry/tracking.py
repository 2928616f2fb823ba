"""The connection to MLflow: database and experiment, made where they are missing, also by several processes at once."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdiff.config import TrackingConfig
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` against this machine's other processes; the kernel frees it when a holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def all_pages(search: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """Everything that a search of MLflow's client finds, which gives it page by page."""
    found, token = [], None
    while True:
        page = search(*arguments, **options, page_token=token)
        found += page
        if not (token := page.token):
            return found


@dataclass(frozen=True)
class Tracking:
    """An initialised MLflow store: its client, and the id of the project's experiment."""

    uri: str
    experiment: str
    root: Path

    @property
    def database(self) -> Path | None:
        """The SQLite file, if the store is one."""
        return Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None

    @cached_property
    def client(self) -> MlflowClient:
        """A client bound to this store, whatever the process-wide tracking URI says."""
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @cached_property
    def experiment_id(self) -> str:
        """Id of the experiment, which `connect` has made."""
        found = self.client.get_experiment_by_name(self.experiment)
        assert found is not None
        return str(found.experiment_id)

    @property
    def locks(self) -> Path:
        """Folder of the lock files."""
        return self.root / ".svdiff" / "locks"

    def run_url(self, run_id: str) -> str:
        """Address of a run in the MLflow UI; MLFLOW_UI_URL says where that is if the store is a file."""
        served = self.uri.startswith("http")
        ui = self.uri if served else os.environ.get("MLFLOW_UI_URL", "http://127.0.0.1:5000")
        return f"{ui.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"


def connect(config: TrackingConfig, root: Path = Path()) -> Tracking:
    """Make database and experiment where they are missing, and point MLflow's global functions at them.

    The environment variable MLFLOW_TRACKING_URI overrides `config.uri`. A SQLite file is created in WAL mode, so
    that readers and writers do not wait for each other, and under a lock: of two first connections at once
    MLflow itself fails one. Raises SvdiffError if the store cannot be reached or the experiment was deleted.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    root = root.resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
    if uri.startswith(SQLITE):  # absolute: MLflow keeps one store a URI, wherever the process goes
        uri = f"{SQLITE}{(root / uri.removeprefix(SQLITE)).resolve()}"
    tracking = Tracking(uri, config.experiment, root)
    mlflow.set_tracking_uri(tracking.uri)
    mlflow.set_registry_uri(tracking.uri)
    try:
        with locked(tracking.locks / "mlflow-init"):
            artifacts = None
            if tracking.database:
                artifacts = _prepare_sqlite(tracking.database)
            _ensure_experiment(tracking, artifacts)
    except (MlflowException, OSError, sqlite3.Error) as error:
        raise SvdiffError(f"MLflow at {tracking.uri} cannot be used: {error}") from error
    return tracking


def _prepare_sqlite(database: Path) -> str:
    """Make the folder and the WAL mode of `database`; return where its artifacts go. MLflow makes the tables."""
    database.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(database, timeout=60)
    try:
        # WAL is a property of the file: set once, every later connection has it.
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
    return (database.parent / "artifacts").resolve().as_uri()


def _ensure_experiment(tracking: Tracking, artifacts: str | None) -> None:
    from mlflow.exceptions import MlflowException

    found = tracking.client.get_experiment_by_name(tracking.experiment)
    if found is None:
        try:
            tracking.client.create_experiment(tracking.experiment, artifact_location=artifacts)
        except MlflowException as error:  # another machine was faster
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    elif found.lifecycle_stage != "active":
        raise SvdiffError(
            f"MLflow experiment '{tracking.experiment}' at {tracking.uri} is deleted; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or set another tracking.experiment"
        )

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
from urllib.parse import unquote, urlsplit

from svdiff.config import TrackingConfig
from svdiff.errors import DISK, SvdiffError
from svdiff.secrets import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
ARTIFACTS = "artifacts"  # folder beside the database


# Where MLflow's database has places of files.
PLACES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def workspace(root: Path) -> Path:
    """The checkout itself. DVC runs queued and temporary experiments in a copy below .dvc/tmp/exps, which it deletes."""
    for folder in root.parents:
        if folder.parts[-3:] == (".dvc", "tmp", "exps"):
            return folder.parents[2]
    return root


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
        return f"{redacted(ui).rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"


def connect(config: TrackingConfig, root: Path = Path()) -> Tracking:
    """Make database and experiment where they are missing, and point MLflow's global functions at them.

    The environment variable MLFLOW_TRACKING_URI overrides `config.uri`. A SQLite file is created in WAL mode, so
    that readers and writers do not wait for each other, and under a lock: of two first connections at once
    MLflow itself fails one. Raises SvdiffError if the store cannot be reached or the experiment was deleted.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    root = workspace(root.resolve())
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri
    if uri.startswith(SQLITE):  # absolute: MLflow keeps one store a URI, wherever the process goes
        uri = f"{SQLITE}{(root / uri.removeprefix(SQLITE)).resolve()}"
    tracking = Tracking(uri, config.experiment, root)
    named = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking.uri)
    mlflow.set_registry_uri(tracking.uri)
    if named is None:  # MLflow sets it, and every later checkout and child process would take this one's store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        with locked(tracking.locks / "mlflow-init"):
            artifacts = None
            if tracking.database:
                artifacts = _prepare_sqlite(tracking.database)
            _ensure_experiment(tracking, artifacts)
    except (MlflowException, OSError, sqlite3.Error) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise
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
        _follow_move(connection, database.parent)
        connection.commit()
    finally:
        connection.close()
    return (database.parent / ARTIFACTS).as_uri()


def _follow_move(connection: sqlite3.Connection, folder: Path) -> None:
    """Point a store that was moved or copied with its checkout at the files beside it.

    MLflow writes absolute paths and has no command that changes them, so a moved registry would be lost, and a copied one would
    write into the original. Experiments whose artifacts lie elsewhere on purpose stay as they are.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "experiments" not in tables or not (folder / ARTIFACTS).is_dir():
        return
    recorded = [uri for (uri,) in connection.execute("SELECT DISTINCT artifact_location FROM experiments") if uri]
    homes = {path.parent for uri in recorded if (path := local_path(uri)) is not None and path.name == ARTIFACTS}
    for old in homes - {folder}:
        for before, after in ((old.as_uri(), folder.as_uri()), (str(old), str(folder))):
            for table in tables & PLACES.keys():
                columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
                for column in columns.intersection(PLACES[table]):
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                        (f"{after}/", len(before) + 2, len(before) + 1, f"{before}/"),
                    )


def local_path(uri: str) -> Path | None:
    """The folder behind a URI or path of this machine, None for another store."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        return None
    return Path(unquote(parts.path) if parts.scheme else uri)


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

"""The catalogue straight from MLflow's SQLite file, in hundredths of a second: loading MLflow alone takes seconds.

For listings and plans, which only read. The tables are those of one revision of MLflow's schema, which every MLflow
database names itself; of another revision, or another kind of store, nothing is read here, and MLflow does it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

REVISIONS = {"dc11669786a5"}  # of MLflow 3.17's schema
DELETED = "Deleted_Internal"  # stage of a version that was deleted
PROMPT = "mlflow.prompt.is_prompt"  # tag of what is registered beside models


@dataclass(frozen=True)
class Version:
    """A version as far as a catalogue needs it; attributes as MLflow's own."""

    name: str
    version: int
    run_id: str | None
    source: str
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A registered model with its aliases, tags and versions."""

    name: str
    aliases: dict[str, int] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    versions: dict[int, Version] = field(default_factory=dict)


def read(database: Path) -> dict[str, Model] | None:
    """All registered models by name; None if `database` is not there or not of a schema that is known here."""
    if not database.is_file():
        return None
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=60)) as connection:
            return _read(connection)
    except sqlite3.Error:
        return None


def _read(connection: sqlite3.Connection) -> dict[str, Model] | None:
    connection.execute("BEGIN")  # one state of the registry, whoever writes meanwhile
    if {row[0] for row in connection.execute("SELECT version_num FROM alembic_version")} - REVISIONS:
        return None
    models = {name: Model(name) for (name,) in connection.execute("SELECT name FROM registered_models ORDER BY name")}
    for name, alias, number in connection.execute("SELECT name, alias, version FROM registered_model_aliases"):
        models[name].aliases[alias] = number
    for name, key, value in connection.execute("SELECT name, key, value FROM registered_model_tags"):
        models[name].tags[key] = value
    rows = connection.execute("SELECT name, version, run_id, source, current_stage FROM model_versions")
    for name, number, run_id, source, stage in rows:
        if stage != DELETED:
            models[name].versions[number] = Version(name, number, run_id, source)
    for name, number, key, value in connection.execute("SELECT name, version, key, value FROM model_version_tags"):
        if number in models[name].versions:
            models[name].versions[number].tags[key] = value
    return {name: model for name, model in models.items() if PROMPT not in model.tags}

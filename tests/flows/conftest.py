"""A miniature project around a real MLflow store."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from miniature import Project, make_dvc_project, write_params
from team import UP, Team, bring_flows, postgres

from flows.registry.tracking import connect
from svdiff.config import TrackingConfig


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An initialised MLflow database of nothing: making one takes seconds, copying it none."""
    root = tmp_path_factory.mktemp("store")
    connect(TrackingConfig(uri=f"sqlite:///{root}/mlflow.db", experiment="other"), root)
    connection = sqlite3.connect(root / "mlflow.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return (root / "mlflow.db").read_bytes()


@pytest.fixture
def project(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with concepts `dog` and `dog2`, nothing registered; the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns" / "mlflow.db").write_bytes(empty_store)
    write_params(tmp_path, "dog", "dog2")
    return Project(tmp_path)


@pytest.fixture
def dvc_project(tmp_path: Path, empty_store: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project with concepts `dog` and `dog2`, nothing run; the current folder."""
    root = make_dvc_project(tmp_path / "project", "dog", "dog2")
    (root / "mlruns").mkdir()
    (root / "mlruns" / "mlflow.db").write_bytes(empty_store)
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return root


@pytest.fixture
def tiny_evaluators(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip and lpips, small and random, whatever the configuration names."""
    sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
    from evaluation_parts import TinyClip, TinyLpips

    import svdiff.evaluation.evaluators as module

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip, lpips = TinyClip(), TinyLpips()
    monkeypatch.setattr(module, "load_clip", lambda _: (clip.encode_images, clip.encode_texts))
    monkeypatch.setattr(module, "load_lpips", lambda _: lpips)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A Prefect server for flows that run in this process: one, since the client sends all events to the first it knew."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=600):  # a limit: a busy machine takes minutes
        yield


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Prefect's server on PostgreSQL with pool, automations, limit and deployments, and an MLflow server."""
    folder = tmp_path_factory.mktemp("team")
    with postgres() as database:
        team = Team(folder, database)
        bring_flows(team.office)
        try:
            report = team.run(team.office, *UP)
            assert "automation 'svdiff: a crashed run is tried again' made" in report
            assert "2 at once" in report
            yield team
        finally:
            team.run(team.office, "flows", "down")
            team.close()


@pytest.fixture
def team(servers: Team, tmp_path: Path) -> Iterator[Team]:
    """The servers, and no worker of an earlier test."""
    servers.folder = tmp_path
    yield servers
    for worker in servers.workers:
        worker.kill()
    servers.workers.clear()

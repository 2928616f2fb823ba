"""A checkout that is moved or copied keeps its registry, and a copy leaves the original alone; experiments register as well."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from miniature import Project, registered, write_results

from flows.registry import prune
from flows.registry.concepts import fetch, find, list_concepts
from flows.registry.prune import find_unused
from flows.registry.register import register
from flows.registry.runs import read_lineage
from flows.registry.storage import disk_usage
from flows.registry.tracking import PLACES, connect, workspace

NAMES = ["elsewhere", "with spaces", "Größe 100 %", "日本 #1"]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, to see whether anybody wrote there."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def works(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """List, load, lineage, storage, prune, and a new registration, all with files of this checkout alone."""
    monkeypatch.chdir(project.root)
    tracking = project.tracking
    assert [(entry.concept, entry.champion) for entry in list_concepts(tracking)] == [("dog", 1)]
    version = find(tracking, "dog")
    fetched = fetch(tracking, version, project.root / "fetched")[0]
    assert fetched.read_bytes() == project.results(identity=0.5).delta.read_bytes()
    assert read_lineage(tracking, version)["concept"] == "dog"
    used = {usage.what: usage for usage in disk_usage(tracking, project.root)}
    assert used["MLflow artifacts"].where == str(project.root / "mlruns" / "artifacts")
    assert used["MLflow artifacts"].bytes > 0
    monkeypatch.setattr(prune, "DAY", -1.0)
    [part] = [p for p in find_unused(tracking, project.root) if p.name == "MLflow"]
    assert part.found == []
    assert not part.problem
    again = project.register(value=2, identity=0.7)
    assert (again.version, again.role) == (2, "champion")
    assert "better" in again.decision.reason  # so the scores of version 1 were read
    for number in ("1", "2"):
        model = tracking.client.get_model_version("dog", number)
        assert fetch(tracking, model, project.root / f"fetched-{number}")[0].is_file()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "100" in name else pytest.mark.slow) for name in NAMES]
)
def test_a_moved_checkout_keeps_its_registry(project: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    project.register(value=0.1, identity=0.5)
    moved = project.root.parent / f"{project.root.name}-moved" / name
    moved.parent.mkdir()
    monkeypatch.chdir("/")
    shutil.move(project.root, moved)
    works(Project(moved), monkeypatch)
    assert not project.root.exists()


@pytest.mark.slow
def test_moved_twice_and_back(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.register(value=0.1, identity=0.5)
    first, second = project.root, project.root.parent / f"{project.root.name} second"
    monkeypatch.chdir("/")
    for start, end in ((first, second), (second, first), (first, second)):
        shutil.move(start, end)
        Project(end)
    works(Project(second), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_a_copy_writes_nothing_into_the_original(project: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    project.register(value=0.1, identity=0.5)
    before = tree(project.root / "mlruns" / "artifacts")
    copy = project.root.parent / f"{project.root.name}-copy" / name
    shutil.copytree(project.root, copy)
    works(Project(copy), monkeypatch)
    assert tree(project.root / "mlruns" / "artifacts") == before
    assert registered(project.root, "dog") == [1]
    monkeypatch.chdir(project.root)
    assert Project(project.root).register(value=3, identity=0.3).version == 2
    assert registered(copy, "dog") == [1, 2]


def test_no_place_in_the_database_names_the_old_folder(project: Project) -> None:
    """Whatever columns this release of MLflow has: those that the code does not know would show here."""
    project.register(value=0.1, identity=0.5)
    moved = project.root.parent / "another place"
    shutil.copytree(project.root, moved)
    Project(moved)
    with sqlite3.connect(moved / "mlruns" / "mlflow.db") as connection:
        dump = "\n".join(connection.iterdump())
    assert str(project.root) not in dump
    assert all(f"{table}" in dump for table in PLACES)


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(project: Project, tmp_path_factory) -> None:
    away = tmp_path_factory.mktemp("disk") / "pictures"
    project.tracking.client.create_experiment("pictures", artifact_location=away.as_uri())
    moved = project.root.parent / "third place"
    shutil.copytree(project.root, moved)
    found = Project(moved).tracking.client.get_experiment_by_name("pictures")
    assert found.artifact_location == away.as_uri()


def test_an_experiment_in_a_temporary_workspace_registers_into_the_checkout(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC deletes the workspace afterwards; what was registered is whole."""
    temporary = project.root / ".dvc" / "tmp" / "exps" / "tmpabc"
    temporary.mkdir(parents=True)
    shutil.copy(project.root / "params.yaml", temporary)
    assert workspace(temporary) == project.root
    monkeypatch.chdir(temporary)
    experiment = Project(temporary)
    done = experiment.register(value=7, identity=0.6)
    assert not (temporary / "mlruns").exists()
    monkeypatch.chdir(project.root)
    shutil.rmtree(temporary)
    assert registered(project.root, "dog") == [done.version]
    version = find(connect(project.config.tracking, project.root), "dog")
    assert fetch(project.tracking, version, project.root / "fetched")[0].is_file()
    write_results(project.root, "dog", value=7, identity=0.6)
    assert not register(project.tracking, project.config, project.results("dog", value=7, identity=0.6)).new


GIT = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
CHANGED = ["-S", "concepts.dog.token=olis", "register@dog"]
WAYS = {
    "temporary": [["exp", "run", "--temp", *CHANGED]],
    "queued": [["exp", "run", "--queue", *CHANGED], ["exp", "run", "--run-all"]],
    "queued for a worker": [["exp", "run", "--queue", *CHANGED], ["queue", "start"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_dvc_runs_in_a_workspace_of_its_own_registers_into_the_checkout(dvc_project: Path, way: str) -> None:
    """By DVC's own commands; the workspace is gone afterwards, and the checkout is as it was."""
    root = dvc_project
    before = (root / "params.yaml").read_text()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in WAYS[way]:
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command],
            cwd=root,
            env=os.environ | GIT | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    end = time.monotonic() + 600
    while list((root / ".dvc/tmp/exps").glob("tmp*")) or not registered(root, "dog"):  # a worker goes on by itself
        assert time.monotonic() < end, "the experiment does not end"
        time.sleep(0.5)
    assert registered(root, "dog") == [1]
    assert not [folder for folder in (root / ".dvc/tmp/exps").glob("*") if (folder / "mlruns").exists()]
    assert (root / "params.yaml").read_text() == before
    assert not (root / "out/register").exists()
    project = Project(root)
    version = find(project.tracking, "dog")
    assert fetch(project.tracking, version, root / "fetched")[0].is_file()

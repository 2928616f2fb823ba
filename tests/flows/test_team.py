"""A team: Prefect on PostgreSQL, an MLflow server, workers in clones that share one DVC remote. And what may fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from miniature import make_dvc_project
from team import REPOSITORY, Team, postgres, ran, said, until

pytestmark = pytest.mark.slow
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def commit(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "add", "."], check=True)
    subprocess.run(["git", "-C", str(root), *IDENTITY, "commit", "--quiet", "-m", "for the team"], check=True)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """Prefect's server on PostgreSQL with pool, automations, limit and deployments, and an MLflow server."""
    folder = tmp_path_factory.mktemp("team")
    with postgres() as database:
        team = Team(folder, database)
        office = folder / "office"
        office.mkdir()
        for name in ("prefect.yaml", "prefect.toml"):
            shutil.copy(REPOSITORY / name, office / name)
        shutil.copytree(REPOSITORY / "flows", office / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        try:
            report = team.run(office, "flows", "up", "--workers", "0", "--gpus", "2")
            assert "automation 'svdiff: a crashed run is tried again' made" in report
            assert "2 at once" in report
            yield team
        finally:
            team.run(office, "flows", "down")
            team.close()


@pytest.fixture
def team(servers: Team, tmp_path: Path) -> Iterator[Team]:
    """The servers, and no worker of an earlier test."""
    servers.folder = tmp_path
    yield servers
    for worker in servers.workers:
        worker.kill()
    servers.workers.clear()


@pytest.fixture
def names() -> list[str]:
    """Concepts of one test: the servers, and what is registered there, outlive it."""
    test = uuid.uuid4().hex[:6]
    return [f"dog-{test}-{number}" for number in range(4)]


@pytest.fixture
def origin(team: Team, tmp_path: Path, names: list[str]) -> Path:
    """The team's repository: small stages, real registration, one DVC remote for all clones."""
    root = make_dvc_project(tmp_path / "origin", *names)
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    values = yaml.safe_load((root / "params.yaml").read_text())
    values["tracking"] = {"uri": team.tracking, "experiment": tmp_path.name}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    subprocess.run(
        [sys.executable, "-m", "dvc", "remote", "add", "--default", "store", str(tmp_path / "remote")],
        cwd=root,
        check=True,
    )
    with open(root / ".gitignore", "a") as stream:
        stream.write("/.prefect\n")
    commit(root)
    return root


def trained(*roots: Path) -> list[str]:
    return sorted(stage for stage in ran(*roots) if stage.startswith(("train@", "prior@")))


def test_two_workers_train_four_concepts_once_and_a_third_clone_nothing(
    team: Team, origin: Path, names: list[str]
) -> None:
    clones = [team.clone(origin, name) for name in ("one", "two")]
    for clone in clones:
        team.worker(clone)
    runs = {concept: team.start("train-concept", concept=concept) for concept in names}
    for run in runs.values():
        team.completed(run)

    # The prior images, too, were made once, though four runs on two machines needed them.
    assert trained(*clones) == sorted(["prior@dog", *(f"train@{concept}" for concept in names)])
    assert all(any(stage.startswith("train@") for stage in ran(clone)) for clone in clones)
    for concept, run in runs.items():
        (version,) = team.registered(concept)
        assert version.tags["delta_sha256"]
        lines = [line for clone in clones for line in said(clone) if line["flow_run"] == run]
        assert {line["concept"] for line in lines} == {concept, "dog"}  # itself, and the class of the prior images
        assert {"train", "sample", "score", "register"} <= {line["stage"] for line in lines}

    # A clone from before: everything comes from the remote. What it knows then makes plain `dvc pull` enough for others.
    third = team.clone(origin, "three")
    restores_everything(team.run(third, "dvc", "repro", "--pull"), len(names))
    team.run(third, "dvc", "push")  # its analyses
    commit(third)
    fourth = team.clone(third, "four")
    team.run(fourth, "dvc", "pull", "--run-cache")
    restores_everything(team.run(fourth, "dvc", "repro"), len(names))
    assert all(len(team.registered(concept)) == 1 for concept in names)


def restores_everything(output: str, concepts: int) -> None:
    """No training, sampling, scoring or prior image, in what `dvc repro` says."""
    begun = [line for line in output.splitlines() if line.startswith(("train of", "sample of", "score of", "prior of"))]
    assert begun == []
    assert output.count("is cached - skipping run") + output.count("didn't change, skipping") >= 1 + 3 * concepts


def test_train_all_hands_its_parts_to_all_workers(team: Team, origin: Path, names: list[str]) -> None:
    clones = [team.clone(origin, name) for name in ("one", "two")]
    team.worker(clones[0], limit=2)
    team.worker(clones[1])
    team.completed(team.start("train-all", where="workers"))
    assert trained(*clones) == sorted(["prior@dog", *(f"train@{concept}" for concept in names)])
    finished = [clone for clone in clones if (clone / "out/report/done.txt").exists()]
    assert len(finished) == 1
    assert all((finished[0] / "out/score" / concept / "metrics.json").exists() for concept in names)


def hold(clone: Path, stage: str) -> Callable[[], None]:
    """Make `stage` wait in `clone`; what ends that."""
    mark = clone / ".marks" / f"{stage}-wait"
    mark.parent.mkdir(exist_ok=True)
    mark.touch()
    return mark.unlink


def begun(clone: Path, stage: str) -> Callable[[], bool]:
    return lambda: stage in ran(clone)


def test_a_worker_that_dies_is_noticed_and_its_run_is_finished_elsewhere(
    team: Team, origin: Path, names: list[str]
) -> None:
    dog = names[0]
    first, second = (team.clone(origin, name) for name in ("one", "two"))
    hold(first, f"train-{dog}")
    victim = team.worker(first)
    run = team.start("train-concept", concept=dog)
    until(begun(first, f"train@{dog}"))
    victim.kill()
    assert not victim.alive
    team.worker(second)
    team.completed(run)
    states = team.states(run)
    assert states.count("Crashed") == 1
    assert states.count("AwaitingRetry") == 1
    assert states.count("Running") == 2
    assert ran(first) == ["prior@dog", f"train@{dog}"]
    assert ran(second) == [
        f"train@{dog}",
        f"sample@{dog}",
        f"score@{dog}",
        f"register@{dog}",
    ]  # prior images came from the remote
    assert len(team.registered(dog)) == 1


def test_mlflow_stopped_in_the_middle_is_waited_for(team: Team, origin: Path, names: list[str]) -> None:
    dog, clone = names[0], team.clone(origin, "one")
    go_on = hold(clone, f"score-{dog}")
    team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(begun(clone, f"score@{dog}"))
    team.mlflow.kill()
    go_on()
    until(lambda: any("cannot reach MLflow; it is tried again" in line for line in team.messages(run)))
    assert any(f"MLflow at {team.tracking} cannot be used" in line for line in team.messages(run))
    assert team.state(run) == "Running"
    team.mlflow.start()
    team.completed(run)
    assert Counter(ran(clone)) == Counter(
        ["prior@dog", f"train@{dog}", f"sample@{dog}", f"score@{dog}"]
        + [f"register@{dog}"] * ran(clone).count(f"register@{dog}")
    )
    assert len(team.registered(dog)) == 1


def test_a_remote_that_cannot_be_written_costs_nothing(team: Team, origin: Path, names: list[str]) -> None:
    dog, clone, remote = names[0], team.clone(origin, "one"), origin.parent / "remote"
    go_on = hold(clone, f"train-{dog}")
    team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(begun(clone, f"train@{dog}"))
    remote.rename(remote.with_name("away"))
    remote.write_text("no folder")
    go_on()
    until(lambda: any("cannot push to the DVC remote" in line for line in team.messages(run)))
    assert team.state(run) == "Running"
    remote.unlink()
    remote.with_name("away").rename(remote)
    team.completed(run)
    assert ran(clone) == ["prior@dog", f"train@{dog}", f"sample@{dog}", f"score@{dog}", f"register@{dog}"]
    other = team.clone(origin, "two")
    assert "train of" not in team.run(other, "dvc", "repro", "--pull", f"train@{dog}")

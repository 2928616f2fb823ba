"""A team: Prefect on PostgreSQL, an MLflow server, workers in clones that share one DVC remote. And what may fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from miniature import make_dvc_project
from team import Team, alive, bring_flows, ran, said, until

from flows.orchestration import automations

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@example.org"]


def commit(root: Path) -> None:
    subprocess.run(["git", "-C", str(root), "add", "."], check=True)
    subprocess.run(["git", "-C", str(root), *IDENTITY, "commit", "--quiet", "-m", "for the team"], check=True)


@pytest.fixture
def names() -> list[str]:
    """Concepts of one test: the servers, and what is registered there, outlive it."""
    test = uuid.uuid4().hex[:6]
    return [f"dog-{test}-{number}" for number in range(4)]


@pytest.fixture
def origin(team: Team, tmp_path: Path, names: list[str]) -> Path:
    """The team's repository: small stages, real registration, one DVC remote for all clones."""
    root = make_dvc_project(tmp_path / "origin", *names)
    bring_flows(root)
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
        assert team.client.get_model_version_by_alias(concept, "champion").version == version.version
        assert team.client.get_run(version.run_id).data.tags["prefect.flow_run_id"] == run
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
    team.post("/concurrency_limits/", tag="gpu", concurrency_limit=1)  # a dead stage must not keep it
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
    assert ran(first) == ["check", "prior@dog", f"train@{dog}"]
    assert ran(second) == [
        f"train@{dog}",
        f"sample@{dog}",
        f"score@{dog}",
        f"register@{dog}",
    ]  # prior images came from the remote
    assert len(team.registered(dog)) == 1


@pytest.fixture
def impatience(team: Team, origin: Path) -> Iterator[None]:
    """Runs that nobody starts are given to another worker after half a minute instead of ten."""

    def install(stuck: int) -> None:
        code = f"from flows.orchestration import automations; automations.STUCK = {stuck}; print(automations.install(None))"
        subprocess.run([sys.executable, "-c", code], cwd=origin, env=team.env, check=True)

    install(30)
    yield
    install(automations.STUCK)


def start_slowly(clone: Path) -> None:
    """Let the engines of a worker in `clone` take a minute before their first line."""
    wait = "import sys, time; time.sleep(60 if 'prefect.engine' in ' '.join(sys.orig_argv) else 0)\n"
    (clone / "sitecustomize.py").write_text(wait)


@pytest.mark.usefixtures("impatience")
def test_a_worker_that_dies_before_its_run_begins_is_replaced(team: Team, origin: Path, names: list[str]) -> None:
    dog = names[0]
    first, second = (team.clone(origin, name) for name in ("one", "two"))
    start_slowly(first)
    victim = team.worker(first)
    run = team.start("train-concept", concept=dog)
    until(lambda: "Pending" in team.states(run))
    victim.kill()
    team.worker(second)
    team.completed(run)
    states = team.states(run)
    assert states.index("AwaitingRetry") < states.index("Running")
    assert ran(first) == []
    assert len(team.registered(dog)) == 1


STEPS = 300  # of the training that is killed; a few hundredths of a second each


def train_really(origin: Path, tiny_base: Path) -> None:
    """Let the stage `train` of the team's repository be the real one, on a tiny base."""
    shutil.copytree(tiny_base, origin / "models/base")
    stages = (origin / "dvc.yaml").read_text()
    (origin / "dvc.yaml").write_text(stages.replace("python stage.py train ${key}", "svdiff train ${key}"))
    values = yaml.safe_load((origin / "params.yaml").read_text())
    values["base"] = {"model": "models/base"}
    values["train"] = {"steps": STEPS, "validate_every": STEPS, "save_every": 5, "prior_weight": 0.0}
    (origin / "params.yaml").write_text(yaml.safe_dump(values))
    commit(origin)


def steps_saved(clone: Path) -> list[float]:
    """Seconds of each step in the resume state."""
    import torch

    found = [torch.load(state, weights_only=True) for state in clone.glob(".svdiff/state/*/state.pt")]
    return [row["seconds"] for state in found for row in state["rows"]]


def test_a_training_goes_on_where_it_was_once_its_worker_is_back(
    team: Team, origin: Path, names: list[str], tiny_base: Path
) -> None:
    train_really(origin, tiny_base)
    dog, clone = names[0], team.clone(origin, "one")
    victim = team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(lambda: steps_saved(clone))
    victim.kill()
    done = steps_saved(clone)
    assert 0 < len(done) < STEPS
    team.worker(clone)
    team.completed(run)
    assert team.states(run).count("Crashed") == 1
    curve = pd.read_csv(clone / f"out/train/{dog}/curve.csv")
    assert len(curve) == STEPS
    assert list(curve["seconds"])[: len(done)] == pytest.approx(done)  # these were not run again
    (version,) = team.registered(dog)
    # The live curve of both attempts is one run, and it is the version's.
    assert [r.info.run_id for r in runs_of(team, origin, dog)] == [version.run_id]


def runs_of(team: Team, origin: Path, concept: str) -> list[Any]:
    """All MLflow runs of a concept."""
    experiment = team.client.get_experiment_by_name(origin.parent.name)
    return list(team.client.search_runs([experiment.experiment_id], f"tags.`svdiff.concept` = '{concept}'"))


def test_an_engine_that_is_killed_takes_its_stage_along_and_its_run_begins_anew(
    team: Team, origin: Path, names: list[str]
) -> None:
    dog, clone = names[0], team.clone(origin, "one")
    go_on = hold(clone, f"train-{dog}")
    worker = team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(begun(clone, f"train@{dog}"))
    processes = {process: process.cmdline() for process in worker.tree()}
    (engine,) = [process for process, line in processes.items() if "prefect.engine" in line]
    stages = [process for process, line in processes.items() if "stage.py" in line or "dvc" in line]
    assert len(stages) >= 2
    engine.kill()
    until(lambda: not any(map(alive, stages)), 120, "the stage outlives the engine")
    go_on()
    team.completed(run)
    assert team.states(run).count("Crashed") == 1
    assert ran(clone).count(f"train@{dog}") == 2
    assert len(team.registered(dog)) == 1


def test_a_server_that_is_away_for_minutes_costs_nothing(team: Team, origin: Path, names: list[str]) -> None:
    dog, cat, clone = names[0], names[1], team.clone(origin, "one")
    go_on = hold(clone, f"train-{dog}")
    team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(begun(clone, f"train@{dog}"))
    with team.away():
        time.sleep(200)  # longer than a run may be silent
    go_on()
    team.completed(run)
    team.completed(team.start("train-concept", concept=cat))
    assert trained(clone) == ["prior@dog", f"train@{dog}", f"train@{cat}"]
    assert len(team.registered(dog)) == 1


def test_a_worker_that_ends_by_itself_is_started_again(team: Team, origin: Path, names: list[str]) -> None:
    dog, clone = names[0], team.clone(origin, "one")
    go_on = hold(clone, f"train-{dog}")
    supervisor = team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(begun(clone, f"train@{dog}"))
    (worker,) = [process for process in supervisor.tree() if process.cmdline()[1:4] == ["-m", "prefect", "worker"]]
    worker.kill()
    go_on()
    team.completed(run)
    assert supervisor.alive
    assert len(team.registered(dog)) == 1


def test_mlflow_stopped_in_the_middle_of_a_training_costs_nothing(
    team: Team, origin: Path, names: list[str], tiny_base: Path
) -> None:
    train_really(origin, tiny_base)
    dog, clone = names[0], team.clone(origin, "one")
    team.worker(clone)
    run = team.start("train-concept", concept=dog)
    until(lambda: steps_saved(clone))
    team.mlflow.kill()
    waits = f"stage register@{dog} cannot reach MLflow (the MLflow server does not answer); it is tried again"
    try:
        until(lambda: waits in team.messages(run))
        lines = team.messages(run)
        assert any("live curve off, training goes on" in line for line in lines)
        assert any(f"MLflow at {team.tracking} cannot be used" in line for line in lines)
        assert team.state(run) == "Running"
    finally:
        team.mlflow.start()
    team.completed(run)
    again = [f"register@{dog}"] * ran(clone).count(f"register@{dog}")
    assert ran(clone) == ["check", "prior@dog", f"train@{dog}", f"sample@{dog}", f"score@{dog}", *again]
    (version,) = team.registered(dog)
    assert [r.info.run_id for r in runs_of(team, origin, dog)] == [version.run_id]
    points = [point.step for point in team.client.get_metric_history(version.run_id, "loss")]
    assert len(points) == len(set(points))
    assert max(points) == STEPS


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
    assert ran(clone) == ["check", "prior@dog", f"train@{dog}", f"sample@{dog}", f"score@{dog}", f"register@{dog}"]
    other = team.clone(origin, "two")
    assert "train of" not in team.run(other, "dvc", "repro", "--pull", f"train@{dog}")

"""The flows themselves, on a real Prefect server, DVC project and MLflow store."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest
from miniature import mlflow_client, registered, write_params
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import ParameterTypeError
from team import until

from flows.orchestration.train import train_all, train_concept
from svdiff.errors import SvdiffError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


def dvc_status(root: Path) -> str:
    command = [sys.executable, "-m", "dvc", "status", "--json"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def messages(fragment: str) -> list[str]:
    with get_client(sync_client=True) as client:
        newest = client.read_logs(limit=200, sort=LogSort.TIMESTAMP_DESC)
    return [log.message for log in newest if fragment in log.message]


def test_train_concept_from_pictures_to_registry(dvc_project: Path) -> None:
    outcomes = train_concept("dog")
    assert outcomes == dict.fromkeys(
        ["check", "prior@dog", *(f"{s}@dog" for s in ("train", "sample", "score", "register"))], "ran"
    )
    assert registered(dvc_project, "dog") == [1]
    stale = dvc_status(dvc_project)
    assert "train@dog2" in stale
    assert not [stage for stage in outcomes if f'"{stage}"' in stale]

    record = json.loads((dvc_project / "out/register/dog.json").read_text())
    client = mlflow_client(dvc_project)
    with get_client(sync_client=True) as prefect:
        linked = prefect.read_flow_run(client.get_run(record["run_id"]).data.tags["prefect.flow_run_id"])
        assert linked.name == "train-dog"
        of_this_run = FlowRunFilter(id=FlowRunFilterId(any_=[linked.id]))
        tasks = {run.name for run in prefect.read_task_runs(flow_run_filter=of_this_run)}
        assert {"prior@dog", "train@dog", "register@dog"} <= tasks
        artifacts = {artifact.key: artifact for artifact in prefect.read_artifacts()}
    assert record["run_url"] in artifacts["concept-dog"].data
    assert str(artifacts["samples-dog"].data).startswith("data:image/jpeg;base64,")
    assert client.get_model_version("dog", "1").tags["data_hash"].startswith("md5:")
    assert client.get_model_version("dog", "1").tags["git_dirty"] == "false"

    again = train_concept("dog")
    assert set(again.values()) == {"unchanged"}
    assert registered(dvc_project, "dog") == [1]


def test_unknown_concept_and_bad_pictures_fail_before_any_work(dvc_project: Path) -> None:
    with pytest.raises(SvdiffError, match="no concept 'cow'"):
        train_concept("cow")
    (dvc_project / "data/concepts/dog/0.png").write_text("this is no picture")
    with pytest.raises(SvdiffError, match=r"0\.png"):
        train_concept("dog")
    assert not (dvc_project / "out").exists()


def test_one_failing_concept_does_not_stop_the_others(dvc_project: Path) -> None:
    (dvc_project / ".marks/train-dog-fail").touch()
    with pytest.raises(RuntimeError) as caught:
        train_all(limit=2)
    assert "dog failed" in str(caught.value)
    assert "the moon is wrong" in str(caught.value)
    assert "dog2 failed" not in str(caught.value)
    assert registered(dvc_project, "dog2") == [1]
    assert registered(dvc_project, "dog") == []
    (dvc_project / ".marks/train-dog-fail").unlink()
    train_all(limit=2)
    assert registered(dvc_project, "dog") == [1]
    assert registered(dvc_project, "dog2") == [1]
    assert json.loads(dvc_status(dvc_project)) == {}
    assert (dvc_project / "out/report/done.txt").exists()


def test_limit_and_names_are_checked(dvc_project: Path) -> None:
    with pytest.raises(ParameterTypeError, match="limit"):
        train_all(limit=0)
    with pytest.raises(SvdiffError, match="no concept 'cow'"):
        train_all(names=["dog", "cow"])
    write_params(dvc_project, "dog", train={"steps": -1})
    with pytest.raises(SvdiffError, match=r"train\.steps"):
        train_concept("dog")


def test_a_busy_stage_is_waited_for(dvc_project: Path) -> None:
    """The same concept asked for by hand and by a deployment: the second waits, then finds it done."""
    (dvc_project / ".marks/prior-dog-hang").touch()
    command = [sys.executable, "-m", "dvc", "repro", "-s", "prior@dog"]
    first = subprocess.Popen(command, cwd=dvc_project)
    while not (dvc_project / ".marks/pids").exists():
        threading.Event().wait(0.1)
    (dvc_project / ".marks/prior-dog-hang").unlink()

    def free() -> None:
        for pid in (dvc_project / ".marks/pids").read_text().split():
            subprocess.run(["kill", "-9", pid], check=False)
        first.wait()

    timer = threading.Timer(8, free)
    timer.start()
    outcomes = train_concept("dog")
    timer.join()
    assert outcomes["prior@dog"] == "ran"
    assert any("is busy" in message for message in messages("busy"))


def test_concepts_in_work_at_once_each_have_a_gpu_of_their_own(
    dvc_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = {f"GPU-{uuid.uuid4()}" for _ in range(2)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(gpus))
    marks = [dvc_project / f".marks/train-{name}-wait" for name in ("dog", "dog2")]
    for mark in marks:
        mark.touch()

    def seen() -> dict[str, str]:
        return dict(line.split() for line in (dvc_project / ".marks/gpus").read_text().splitlines())

    def release() -> None:
        until(lambda: (dvc_project / ".marks/gpus").exists() and {"train@dog", "train@dog2"} <= seen().keys(), 600)
        for mark in marks:
            mark.unlink()

    releasing = threading.Thread(target=release)
    releasing.start()
    train_all(limit=2, analyses=False)
    releasing.join()
    assert {seen()["train@dog"], seen()["train@dog2"]} == gpus
    assert seen()["score@dog"] in gpus

"""The local Prefect as a user meets it: one command up, runs from another shell, cancel, one command down."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from miniature import registered
from team import alive, bring_flows, free_port, until

from flows.services.supervision import answers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class Shell:
    """Commands in a checkout, as another shell would give them: nothing in the environment but the API's address."""

    def __init__(self, root: Path) -> None:
        self.root, self.api = root, f"http://127.0.0.1:{free_port()}/api"
        others = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "SVDIFF"))}
        self.environment = others | {"PREFECT_API_URL": self.api}

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deployment(self, name: str) -> Any:
        answer = httpx.get(f"{self.api}/deployments/name/{name}/{name}", timeout=60)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture
def shell(dvc_project: Path) -> Iterator[Shell]:
    bring_flows(dvc_project)
    shell = Shell(dvc_project)
    yield shell
    subprocess.run([sys.executable, "-m", "flows", "down"], cwd=dvc_project, env=shell.environment, check=False)


def stage_processes(root: Path) -> list[psutil.Process]:
    marks = root / ".marks/pids"
    pids = [int(pid) for pid in marks.read_text().split()] if marks.exists() else []
    return [process for process in map(psutil.Process, filter(psutil.pid_exists, pids)) if alive(process)]


def test_up_run_cancel_down(shell: Shell) -> None:
    said = shell("flows", "up")
    assert "Prefect server started" in said
    assert "worker" in said
    nightly = shell.deployment("reevaluate")
    assert [schedule["active"] for schedule in nightly["schedules"]] == [True]
    schedule = f"{shell.api}/deployments/{nightly['id']}/schedules/{nightly['schedules'][0]['id']}"
    httpx.patch(schedule, json={"active": False}, timeout=60).raise_for_status()
    again = shell("flows", "up")
    assert "answers at" in again
    assert "running already" in again
    assert "schedules of reevaluate stay as they are" in again
    (paused,) = shell.deployment("reevaluate")["schedules"]
    assert paused == nightly["schedules"][0] | {"active": False, "updated": paused["updated"]}
    assert not shell.deployment("reevaluate")["paused"]

    run = ("prefect", "--no-prompt", "deployment", "run")
    shell(*run, "train-concept/train-concept", "--param", "concept=dog", "--watch")
    assert registered(shell.root, "dog") == [1]

    # Cancelled in the middle of a stage: the whole tree ends, dvc and the stage's own children too.
    (shell.root / ".marks/train-dog2-hang").touch()
    started = shell(*run, "train-concept/train-concept", "--param", "concept=dog2", "--flow-run-name", "to-cancel")
    assert "to-cancel" in started
    until(lambda: len(stage_processes(shell.root)) == 2)
    flow_run = next(line for line in started.splitlines() if "UUID" in line).split()[-1]
    shell("prefect", "--no-prompt", "flow-run", "cancel", flow_run)
    until(lambda: not stage_processes(shell.root))

    # Taken down in the middle of a stage: the same.
    (shell.root / ".marks/pids").unlink()
    shell(*run, "train-concept/train-concept", "--param", "concept=dog2")
    until(lambda: len(stage_processes(shell.root)) == 2)
    assert "worker stopped" in shell("flows", "down")
    assert not stage_processes(shell.root)
    assert not answers(f"{shell.api}/health")
    assert "was not running" in shell("flows", "down")

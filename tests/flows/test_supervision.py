"""supervisord as the services use it: starts, starts again, stops all processes, says why something does not answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from team import alive, free_port, until

from flows.services.supervision import Supervisor, answers
from svdiff.errors import SvdiffError

# A program that leaves a process in a session of its own, as Prefect's worker does with the engines of its runs.
LEAVES_ONE = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open("pids", "a") as pids:
    pids.write(f"{child.pid}\\n")
time.sleep(600)
"""


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    (tmp_path / "leaves_one.py").write_text(LEAVES_ONE)
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.shut_down()


def children(supervisor: Supervisor) -> list[psutil.Process]:
    """The processes that the first program left so far."""
    pids = supervisor.root / "pids"
    found = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
    return [psutil.Process(pid) for pid in found if psutil.pid_exists(pid)]


def test_a_server_answers_is_there_already_and_is_stopped(supervisor: Supervisor) -> None:
    port = free_port()
    url, command = f"http://127.0.0.1:{port}", ["http.server", str(port), "--bind", "127.0.0.1"]
    assert supervisor.start("server", command, {})
    supervisor.wait_for("server", url)
    assert not supervisor.start("server", command, {})
    assert set(supervisor.running()) == {"server"}
    supervisor.shut_down()
    assert not answers(url)
    assert supervisor.running() == {}


@pytest.mark.slow
def test_what_dies_is_started_again_and_leaves_nothing_behind(supervisor: Supervisor) -> None:
    supervisor.start("worker", ["leaves_one"], {})
    (first,) = until(lambda: children(supervisor), 60)
    parent = first.parent()
    assert parent is not None
    parent.kill()
    second = until(lambda: next((c for c in children(supervisor) if c != first and alive(c)), None), 60)
    until(lambda: not alive(first), 60)
    supervisor.shut_down()
    assert not alive(second)


def test_a_supervisor_that_is_killed_takes_its_programs_along(supervisor: Supervisor) -> None:
    supervisor.start("worker", ["leaves_one"], {})
    (child,) = until(lambda: children(supervisor), 60)
    psutil.Process(int((supervisor.home / "supervisord.pid").read_text())).kill()
    until(lambda: not alive(child), 60)
    supervisor.start("worker", ["leaves_one"], {})  # and its socket is in nobody's way
    assert set(supervisor.running()) == {"worker"}


def test_the_log_says_why_a_program_does_not_answer(supervisor: Supervisor) -> None:
    supervisor.start("server", ["no_such_module"], {})
    with pytest.raises(SvdiffError, match=r"(?s)server does not answer at .*No module named no_such_module"):
        supervisor.wait_for("server", f"http://127.0.0.1:{free_port()}")


def test_an_environment_may_hold_any_characters(supervisor: Supervisor, tmp_path: Path) -> None:
    value = "postgresql://user:100%secret,'x'=1@host/db"
    (tmp_path / "says.py").write_text(
        "import os, time; print('it is', os.environ['PREFECT_X'], flush=True); time.sleep(600)"
    )
    supervisor.start("server", ["says"], {"PREFECT_X": value})
    until(lambda: f"it is {value}" in supervisor.log("server").read_text(), 60)
    assert supervisor.configuration.stat().st_mode & 0o777 == 0o600


def test_a_worker_of_another_server_is_not_started_with_services_of_this_machine(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: None)
    monkeypatch.setattr(os, "chdir", lambda _: None)
    supervisor.become("worker", ["leaves_one"], {"PREFECT_API_URL": "http://a-team.example.org/api"})
    supervisor.start("server", ["http.server", str(free_port()), "--bind", "127.0.0.1"], {})
    assert set(supervisor.running()) == {"server"}
    assert supervisor.start("worker", ["leaves_one"], {})

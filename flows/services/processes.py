"""Processes known by a mark in their environment: a tree stays whole even when parents die before their children.

`python -m flows.services.processes MARK` is the guard of a tree: it kills what carries the mark once its own input ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

VARIABLE = "SVDIFF_PROCESS_MARK"


def new_mark() -> str:
    """A mark that no other process carries."""
    return uuid.uuid4().hex


def marked(mark: str) -> dict[str, str]:
    """Environment for a child that shall carry `mark`, beside the marks of this process."""
    return {VARIABLE: f"{os.environ.get(VARIABLE, '')}:{mark}"}


def bearers(mark: str) -> set[psutil.Process]:
    """Living processes that carry `mark`: the child and all that it started, whoever their parent is by now."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if mark in process.environ().get(VARIABLE, "") and alive(process):
                found.add(process)
    return found


def kill(mark: str, patience: float = 10) -> None:
    """Kill all bearers: stop everything first, so that nothing starts anew while the rest is ended."""
    stopped: set[psutil.Process] = set()
    while fresh := bearers(mark) - stopped:
        for process in fresh:
            _signal(process, "suspend")
        stopped |= fresh
    for process in stopped:
        _signal(process, "kill")
    wait_gone(mark, patience)


@contextmanager
def guarded(mark: str) -> Iterator[None]:
    """Kill all bearers at the end, and should this process be killed before: an orphan would run on unrecorded.

    The guard reads from a pipe that only this process writes to, so the kernel tells it of any death.
    """
    guard = subprocess.Popen(
        [sys.executable, "-m", "flows.services.processes", mark],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def wait_gone(mark: str, patience: float) -> bool:
    """Whether no bearer is left within `patience` seconds."""
    until = time.monotonic() + patience
    while bearers(mark):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie, which only its new parent can bury, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(process: psutil.Process, what: str) -> None:
    with suppress(psutil.NoSuchProcess):
        getattr(process, what)()


if __name__ == "__main__":
    sys.stdin.read()
    kill(sys.argv[1])

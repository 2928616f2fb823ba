"""Runs one DVC stage as a child process: output streamed, time limited, all its processes ended with it.

DVC decides what is stale and records results. Where several clones work together, inputs come from the DVC remote and
outputs go there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flows.pipeline.mend import mend_checkout
from flows.pipeline.process_tree import running, stop
from svdiff.secrets import redacted

SHARE = "SVDIFF_SHARE"  # set where a worker has a clone of its own: its stages go through the DVC remote
TAIL = 30  # lines that a failure carries
PROGRESS_EVERY = 10.0  # seconds between progress bars passed on
BEGUN = re.compile(r"Running stage '")  # from here on the stage itself speaks
UNREADABLE = re.compile(r"RWLock-file|dvc\.lock' (is invalid|validation failed)|\.dvc' (is invalid|validation failed)")


class StageFailed(RuntimeError):
    """A stage ended badly; carries its name, what went wrong, and its last lines."""

    def __init__(self, stage: str, problem: str, tail: list[str]) -> None:
        self.stage, self.problem, self.tail = stage, problem, tail
        super().__init__("\n".join([f"stage {stage} {problem}; its last lines:", *(f"  {line}" for line in tail)]))


class StageTimeout(StageFailed, TimeoutError):
    """The stage ran longer than allowed and was ended."""


class StageWaits(StageFailed):
    """Something that the stage needs is not to be had now: wait and try again. Nothing finished is lost."""

    reason = "something that it needs is not there"


class StageBusy(StageWaits):
    """Another DVC command is at work on the same files."""

    reason = "what it needs is busy: another DVC command is at work on it"
    signs = re.compile(r"is busy, it is being blocked by|Unable to acquire lock|lock is held by", re.IGNORECASE)


class TrackingAway(StageWaits):
    """The MLflow server does not answer."""

    reason = "the MLflow server does not answer"
    signs = re.compile(r"MLflow at http\S+ cannot be used|API request to http\S+ failed with exception")


class RemoteAway(StageWaits):
    """The DVC remote does not answer, or cannot be written."""

    reason = "the DVC remote does not answer, or cannot be written"
    signs = re.compile(r"remote|connect|timed? ?out|permission|forbidden|\[Errno", re.IGNORECASE)


@dataclass(frozen=True)
class StageRun:
    """A stage that is up to date now."""

    stage: str
    outcome: str  # `ran`, `restored` (from the run cache) or `unchanged`
    seconds: float


def run_stage(
    stage: str,
    *,
    root: Path,
    on_line: Callable[[str], None],
    on_progress: Callable[[str], None] | None = None,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    pull: bool = False,
) -> StageRun:
    """Bring `stage` of the project at `root` up to date: `dvc --wait-for-lock repro --single-item <stage>`.

    What is upstream is not looked at: the caller runs stages in order. Returning, failing, running out of `timeout`
    (seconds) or being interrupted, it leaves no process of the stage behind, not even if dvc itself was killed.

    Args:
        stage: name in dvc.yaml, e.g. `train@teapot`.
        root: the checkout.
        on_line: called with each line of output.
        on_progress: called with a progress bar every PROGRESS_EVERY seconds; default `on_line`.
        timeout: seconds the stage may take.
        environment: variables for the stage, over those of this process.
        pull: take missing inputs, and outputs that another clone has made, from the DVC remote.

    Raises:
        StageBusy: other DVC commands use the same files; nothing was done.
        TrackingAway, RemoteAway: a server that the stage needs does not answer.
        StageTimeout: it took too long.
        StageFailed: anything else.
    """
    started, outcome = time.monotonic(), "restored"

    def note(line: str) -> None:
        nonlocal outcome
        if BEGUN.match(line):
            outcome = "ran"
        elif outcome != "ran" and "didn't change, skipping" in line:
            outcome = "unchanged"
        on_line(line)

    try:
        _run_dvc(
            ["repro", "--single-item", *(["--pull"] if pull else []), stage],
            stage,
            root=root,
            on_line=note,
            on_progress=on_progress or note,
            timeout=timeout,
            environment=environment or {},
        )
    except (StageWaits, StageTimeout):
        raise
    except StageFailed as error:
        said = "\n".join(error.tail)
        if outcome != "ran" and UNREADABLE.search(said) and (mended := mend_checkout(root)):
            for line in mended:
                on_line(line)
            return run_stage(
                stage,
                root=root,
                on_line=on_line,
                on_progress=on_progress,
                timeout=timeout,
                environment=environment,
                pull=pull,
            )
        if outcome == "ran" and TrackingAway.signs.search(said):
            raise TrackingAway(stage, "cannot reach MLflow", error.tail) from None
        if outcome != "ran" and pull and RemoteAway.signs.search(said):
            raise RemoteAway(stage, "cannot read the DVC remote", error.tail) from None
        raise
    return StageRun(stage, outcome, time.monotonic() - started)


def push_stage(stage: str, *, root: Path, on_line: Callable[[str], None]) -> None:
    """Copy the outputs of `stage` and the run cache to the DVC remote, whichever of them it lacks.

    Raises:
        StageBusy: other DVC commands use the same files.
        RemoteAway: it could not be done; the outputs stay in this clone's cache, and pushing again completes it.
    """
    try:
        _run_dvc(["push", "--run-cache", stage], stage, root=root, on_line=on_line, on_progress=on_line)
    except StageWaits:
        raise
    except StageFailed as error:
        problem = "cannot push to the DVC remote; what it made is safe in this clone and is pushed when it runs again"
        raise RemoteAway(stage, problem, error.tail) from None


def changed(stages: Sequence[str], *, root: Path) -> list[str]:
    """Those of `stages` that read something else than when they were last run; not those whose outputs are merely missing.

    Raises StageFailed if DVC cannot say.
    """
    lines: list[str] = []
    _run_dvc(["status", "--json", *stages], "status", root=root, on_line=lines.append, on_progress=lines.append)
    found: dict[str, list[Any]] = json.loads("".join(line for line in lines if line.startswith("{")) or "{}")
    return [stage for stage in stages if any("changed deps" in why for why in found.get(stage, []))]


def train_together(
    names: Sequence[str],
    *,
    root: Path,
    on_line: Callable[[str], None],
    on_progress: Callable[[str], None] | None = None,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Train entries as one batch, as `run_stage` runs a stage; the stage of each then finds its training finished.

    Raises:
        StageTimeout: it took too long.
        StageFailed: anything else; those that are through are finished all the same.
    """
    command = [sys.executable, "-m", "svdiff.cli", "train", *names]
    _run(command, f"train {', '.join(names)}", root, on_line, on_progress or on_line, timeout, environment or {})


def _run_dvc(
    command: list[str],
    stage: str,
    *,
    root: Path,
    on_line: Callable[[str], None],
    on_progress: Callable[[str], None],
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run a DVC command to its end and pass on what it says. Raises StageBusy, StageTimeout or StageFailed."""
    whole = [sys.executable, "-m", "dvc", "--wait-for-lock", *command]
    _run(whole, stage, root, on_line, on_progress, timeout, environment or {})


def _run(
    command: list[str],
    stage: str,
    root: Path,
    on_line: Callable[[str], None],
    on_progress: Callable[[str], None],
    timeout: float | None,
    environment: Mapping[str, str],
) -> None:
    tail, shown, timed_out = deque[str](maxlen=TAIL), 0.0, threading.Event()
    with (
        running(
            command,
            cwd=root,
            env=_environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process,
        _limited(process, timeout, timed_out),
    ):
        for line, is_progress in _lines(process.stdout):
            if not is_progress:
                tail.append(line)
                on_line(line)
            elif time.monotonic() - shown >= PROGRESS_EVERY:
                shown = time.monotonic()
                on_progress(line)
        status = process.wait()
    if timed_out.is_set():
        raise StageTimeout(stage, f"took longer than {timeout:g} s and was ended", list(tail))
    if status:
        busy = any(StageBusy.signs.search(line) for line in tail)
        raise (StageBusy if busy else StageFailed)(stage, _ending(status), list(tail))


@contextmanager
def _limited(process: subprocess.Popen[bytes], seconds: float | None, timed_out: threading.Event) -> Iterator[None]:
    """Stop the process after `seconds`, if there is such a limit, and say so in `timed_out`."""

    def expire() -> None:
        timed_out.set()
        stop(process)

    timer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Stages are commands such as `svdiff` and `python`: those of this very environment come first."""
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "1", **extra}


def _ending(code: int) -> str:
    return f"was killed by signal {-code}" if code < 0 else f"failed with status {code}"


def _lines(stream: IO[bytes] | None) -> Iterator[tuple[str, bool]]:
    """Lines as they come, and whether each is a progress bar: one that ends by going back to its start."""
    assert stream is not None
    buffer = b""
    while chunk := os.read(stream.fileno(), 65536):
        *parts, buffer = re.split(rb"(\r\n|\n|\r)", buffer + chunk)
        for text, end in zip(parts[::2], parts[1::2], strict=True):
            if line := _clean(text):
                yield line, end == b"\r"
    if line := _clean(buffer):
        yield line, False


def _clean(text: bytes) -> str:
    """Text without colours, cursor movements and secrets: it goes to logs, to Prefect and into errors."""
    return redacted(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode(errors="replace")).rstrip())

"""Runs a command so that no process of it stays behind: neither when it ends, nor when whoever started it dies.

Between the caller and the command stands a small parent, this file as a program. It adopts orphans (on Linux) and kills
everything that the command started as soon as the command ends or the parent's own input does. That input is a pipe which
the kernel closes when the caller dies, however it dies. SIGINT and SIGTERM are passed on to the command, which has
PATIENCE seconds to heed them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil

PATIENCE = 30.0
ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl


def contained(command: Sequence[str]) -> list[str]:
    """`command` below a parent that leaves none of its processes behind; the input must be a pipe."""
    return [sys.executable, "-P", __file__, *command]  # -P: the modules beside this file are not to be imported


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start `command` with the options of Popen; at the end, or after `stop`, none of its processes is left."""
    # A session of its own: a signal to the caller's process group must not end the parent before the command.
    process = subprocess.Popen(contained(command), stdin=subprocess.PIPE, start_new_session=True, **options)
    try:
        yield process
    finally:
        stop(process)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def stop(process: subprocess.Popen[Any]) -> None:
    """Tell the parent to kill everything; it then ends as the command did."""
    assert process.stdin is not None
    process.stdin.close()


def _kill_descendants() -> None:
    """Kill until nothing is left: a process may start others while it is looked at, and orphans come to this one."""
    while living := [p for p in psutil.Process().children(recursive=True) if _alive(p)]:
        for process in living:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill_at_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    _kill_descendants()


def _heed_signals() -> None:
    """A background job of a shell ignores SIGINT and would hand that down, and so would a blocked signal."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


def _run(command: Sequence[str]) -> NoReturn:
    """Be the parent of `command`, and end as it does: with its exit status, or by its signal."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(ADOPT_ORPHANS, 1, 0, 0, 0)
    wanted = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)  # until there is a child to pass them on to
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_heed_signals)

    def pass_on(number: int, _: Any) -> None:
        child.send_signal(number)
        timer = threading.Timer(PATIENCE, _kill_descendants)
        timer.daemon = True
        timer.start()

    for number in wanted:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)
    threading.Thread(target=_kill_at_end_of_input, daemon=True).start()
    status = child.wait()
    _kill_descendants()
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)  # at once: the thread is still reading


if __name__ == "__main__":
    _run(sys.argv[1:])

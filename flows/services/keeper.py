"""Keeps a worker at work: `python -m flows.services.keeper prefect worker start …` starts it again whenever it ends by itself.

Prefect's worker gives up once its server was away for some minutes, and dies of a run that it is given back while it still
holds it. Its runs are tried again by then (flows/orchestration/automations.py), so all they need is a worker.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

from flows.services.processes import guarded, kill, marked, new_mark

PAUSE = 10.0  # seconds before the next start


def keep(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `python -m command…` until it is asked to stop (SIGINT, SIGTERM) or ends with status 0.

    What a worker leaves behind is killed before the next one starts: a run has one engine. Killed itself, it takes all along.
    """
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    mark = new_mark()
    with guarded(mark):
        while not asked:
            # A session of its own: a terminal's Ctrl-C would reach it twice, and the second one means at once.
            child = subprocess.Popen(
                [sys.executable, "-m", *command], env=os.environ | environment | marked(mark), start_new_session=True
            )
            if asked:  # between the look at it and the start
                child.send_signal(asked[-1])
            status = child.wait()
            if asked or status == 0:
                break
            kill(mark)
            print(f"the worker ended with status {status}; it is started again in {PAUSE:g} s", flush=True)
            until = time.monotonic() + PAUSE
            while not asked and time.monotonic() < until:
                time.sleep(0.2)


if __name__ == "__main__":
    keep(sys.argv[1:], {})

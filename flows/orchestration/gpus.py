"""GPUs of this machine: each stage that needs one has one of its own while it runs."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

VISIBLE = "CUDA_VISIBLE_DEVICES"
POLL = 1.0  # seconds


def visible() -> list[str]:
    """The GPUs that stages here may use, as CUDA_VISIBLE_DEVICES names them; none on a machine without."""
    if VISIBLE in os.environ:
        return [gpu for gpu in map(str.strip, os.environ[VISIBLE].split(",")) if gpu not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return re.findall(r"^GPU .*\(UUID: (\S+)\)$", listed, re.MULTILINE)


@contextmanager
def own_gpu() -> Iterator[dict[str, str]]:
    """The variable that gives a process one GPU, which no other run on this machine has; waits until one is free.

    Empty where there is none. The system frees the GPU of whoever dies.
    """
    locks = {gpu: FileLock(Path(tempfile.gettempdir()) / f"svdiff-{os.getuid()}-gpu-{gpu}.lock") for gpu in visible()}
    if not locks:
        yield {}
        return
    while not (mine := next((gpu for gpu, lock in locks.items() if _taken(lock)), None)):
        time.sleep(POLL)
    try:
        yield {VISIBLE: mine}
    finally:
        locks[mine].release()


def _taken(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True

"""Each run has a GPU of its own: what processes see in CUDA_VISIBLE_DEVICES. No GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.orchestration import gpus
from flows.orchestration.gpus import VISIBLE, own_gpu, visible


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of two GPUs that only this test knows."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    monkeypatch.setenv(VISIBLE, ",".join(names))
    monkeypatch.setattr(gpus, "POLL", 0.05)
    return names


def test_runs_at_once_have_different_gpus_and_a_third_waits(two: list[str]) -> None:
    with ExitStack() as first, ExitStack() as second, ThreadPoolExecutor() as pool:
        seen = [run.enter_context(own_gpu())[VISIBLE] for run in (first, second)]
        assert sorted(seen) == sorted(two)

        def third() -> str:
            with own_gpu() as gpu:
                return gpu[VISIBLE]

        waits = pool.submit(third)
        with pytest.raises(TimeoutError):
            waits.result(timeout=0.3)
        second.close()
        assert waits.result(timeout=60) == seen[1]


HOLD = "from flows.orchestration.gpus import *\nwith own_gpu() as gpu: print(gpu[VISIBLE], flush=True); input()"


def test_processes_share_them_and_the_gpu_of_one_that_dies_is_free(two: list[str]) -> None:
    command = [sys.executable, "-c", HOLD]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in two]
    seen = [holder.stdout.readline().strip() for holder in holders if holder.stdout]
    assert sorted(seen) == sorted(two)
    holders[0].kill()
    with own_gpu() as gpu:
        assert gpu == {VISIBLE: seen[0]}
    holders[1].kill()
    for holder in holders:
        holder.communicate()


@pytest.mark.parametrize(("value", "found"), [("0,1", ["0", "1"]), (" 3 , 5", ["3", "5"]), ("", []), ("-1", [])])
def test_what_the_worker_may_use_is_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, value: str, found: list[str]
) -> None:
    monkeypatch.setenv(VISIBLE, value)
    assert visible() == found


def test_all_of_the_machine_are_used_where_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "nvidia-smi"
    lines = ["GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)", "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-bbbb)"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    assert visible() == ["GPU-aaaa", "GPU-bbbb"]
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert visible() == []
    with own_gpu() as gpu:
        assert gpu == {}

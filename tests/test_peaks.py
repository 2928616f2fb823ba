"""The most memory of each phase, as measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from svdiff import peaks
from svdiff.peaks import Peaks

MEGABYTE = 1 << 20


# In a process of its own: in the tests' one, what other tests left comes and goes meanwhile.
PHASES = """
import json, sys
import numpy as np
from svdiff import peaks
from svdiff.peaks import Peaks

peaks._on_gpu = lambda: False  # which takes torch to tell
found = Peaks()
with found.phase("large"):
    np.ones(64 << 20, np.uint8)
for megabytes in (32, 1):
    with found.phase("small"):
        np.ones(megabytes << 20, np.uint8)
with found.phase("none"):
    pass
found.say()
json.dump(found.bytes, sys.stdout)
"""


@pytest.mark.skipif(not (Path("/proc/self/clear_refs")).exists(), reason="the peak of a process is Linux's to tell")
def test_each_phase_has_its_own_peak_and_the_highest_of_its_stretches() -> None:
    ran = subprocess.run([sys.executable, "-c", PHASES], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    over = {name: held - found["none"] for name, held in found.items()}
    assert over["large"] == pytest.approx(64 * MEGABYTE, rel=0.1)
    assert over["small"] == pytest.approx(32 * MEGABYTE, rel=0.1)
    assert ran.stderr.startswith("most memory of the process: large ")
    assert f"small {found['small'] / 2**30:.2f} GiB" in ran.stderr


def test_on_a_gpu_its_tensors_are_counted_from_the_start_of_a_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(peaks, "_on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: asked.append("read") or 3 << 30)
    found = Peaks()
    with found.phase("training"):
        asked.append("work")
    assert asked == ["reset", "work", "read"]
    assert str(found) == "most memory of the GPU: training 3.00 GiB"


def test_where_nobody_counts_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peaks, "PROCESS", tmp_path / "none")
    found = Peaks()
    with found.phase("training"):
        pass
    found.say()
    assert capsys.readouterr().err == ""

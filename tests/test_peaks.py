"""The most memory of each phase, as measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from svdiff import peaks
from svdiff.peaks import Peaks

MEGABYTE = 1 << 20


@pytest.mark.skipif(not (Path("/proc/self/clear_refs")).exists(), reason="the peak of a process is Linux's to tell")
def test_each_phase_has_its_own_peak_and_the_highest_of_its_stretches(capsys: pytest.CaptureFixture[str]) -> None:
    found = Peaks()
    with found.phase("large"):
        np.ones(64 * MEGABYTE, np.uint8)
    for megabytes in (32, 1):
        with found.phase("small"):
            np.ones(megabytes * MEGABYTE, np.uint8)
    with found.phase("none"):
        pass
    over = {name: held - found.bytes["none"] for name, held in found.bytes.items()}
    assert over["large"] == pytest.approx(64 * MEGABYTE, rel=0.1)
    assert over["small"] == pytest.approx(32 * MEGABYTE, rel=0.1)
    found.say()
    said = capsys.readouterr().err
    assert said.startswith("most memory of the process: large ")
    assert f"small {found.bytes['small'] / 2**30:.2f} GiB" in said


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

"""What the allocator keeps is given back: at attaching, and now and then while a step keeps tensors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from svdiff.spectral import Basis, attach, cpu


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


@pytest.fixture
def trims(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by one at each trim."""
    seen: list[str] = []
    monkeypatch.setattr(cpu, "trim", lambda: seen.append("note"))
    monkeypatch.setattr("svdiff.spectral.shifts.trim", lambda: seen.append("attach"))
    monkeypatch.setattr(cpu, "_saved", 0)
    return seen


@pytest.mark.skipif(cpu._malloc_trim() is None or sys.platform != "linux", reason="glibc alone has malloc_trim")
def test_trimming_gives_the_pages_of_holes_back() -> None:
    blocks = [torch.ones(250_000) for _ in range(300)]  # 1 MB each
    del blocks[::2]  # holes between what is still in use
    before = resident_mb()
    cpu.trim()
    assert before - resident_mb() > 100
    assert all(bool((block == 1).all()) for block in blocks)


def test_a_system_without_glibc_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_malloc_trim", lambda: None)
    cpu.trim()


def test_attaching_gives_the_weights_memory_back(unet: nn.Module, basis: Basis, trims: list[str]) -> None:
    attach(unet, basis)
    assert trims == ["attach"]


def test_a_training_step_trims_once_in_so_many_kept_bytes(
    unet: nn.Module, basis: Basis, call, trims: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attach(unet, basis)
    trims.clear()
    monkeypatch.setattr(cpu, "_TRIM_EVERY", 10_000)
    with torch.no_grad():
        call()
    assert trims == [], "nothing is kept without a backward pass"
    loss = call().square().mean()
    first = len(trims)
    assert first > 1
    loss.backward()
    assert len(trims) == first, "the backward pass frees what was kept"
    monkeypatch.setattr(cpu, "_TRIM_EVERY", 10**9)
    call()
    assert len(trims) == first


def test_the_memory_of_other_devices_is_not_counted(trims: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_TRIM_EVERY", 1)
    cpu.note_saved(torch.empty(1000, device="meta"))
    assert trims == []
    cpu.note_saved(torch.empty(1000))
    assert trims == ["note"]

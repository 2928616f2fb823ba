"""The benchmark for graphics cards, on tiny networks and the CPU: it runs, and where only a few packages are installed."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import benchmarks.gpu as gpu

REPOSITORY = Path(gpu.__file__).parents[1]


def few_packages(folder: Path) -> None:
    """Links to torch, diffusers, PEFT and what they cannot be imported without: what a borrowed machine may have."""
    site, wanted, found = Path(sysconfig.get_path("purelib")), ["torch", "diffusers", "peft"], {"pydantic"}
    while wanted:
        name = re.split(r"[^A-Za-z0-9_.-]", wanted.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        wanted += [line for line in distribution.requires or [] if not re.search(r"extra *==", line)]
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / part).exists():
                (folder / part).symlink_to(site / part)


@pytest.mark.slow
def test_the_gpu_benchmark_runs_where_only_torch_diffusers_and_peft_are_installed(tmp_path: Path) -> None:
    packages, out = tmp_path / "packages", tmp_path / "out.json"
    packages.mkdir()
    few_packages(packages)
    options = ["--json", str(out), "--device", "cpu", "--tiny", "--only", "rounding sd3.5"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.gpu", *options],
        env=os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (result,) = json.loads(out.read_text())["cases"].values()
    assert "error" not in result, result
    assert result["delta_0_against_plain"]["float32"] < 1e-5
    assert result["delta_0_against_plain"]["bf16"] < 0.05
    assert result["shifted_against_plain"] > 0.01


@pytest.mark.slow
def test_a_case_that_fails_is_written_down_and_leaves_the_next_one_alone() -> None:
    machine = gpu.Machine("cpu", True)
    failed = gpu.attempted(machine, lambda machine: {"never": 1 / 0})
    assert failed["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in failed["traceback"]
    assert set(gpu.attempted(machine, lambda machine: gpu.decomposition(machine, 1280, 1280))) == {"whole", "leading"}

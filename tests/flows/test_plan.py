"""What `svdiff plan` says would run, against what DVC then runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from svdiff import plan
from svdiff.config import load_config
from svdiff.models.memory import SHARE, training_memory
from svdiff.models.sizes import build
from svdiff.models.stable_diffusion import StableDiffusion
from svdiff.plan import estimate, memory, stages_to_run

ROOT = Path(__file__).parents[2]


def repro(root: Path, *arguments: str) -> list[str]:
    """Stages whose commands `dvc repro` ran."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


@pytest.mark.slow
def test_stages_that_wait_for_others_run_only_if_those_change(dvc_project: Path) -> None:
    planned = stages_to_run()
    assert not any(planned.values())  # nothing was ever made
    assert sorted(repro(dvc_project)) == sorted(planned)
    assert stages_to_run() == {}

    picture = next((dvc_project / "data/concepts/dog2").glob("*.png"))
    picture.write_bytes(picture.read_bytes() + b"changed")
    planned = stages_to_run()
    assert planned["train@dog2"] == []
    assert planned["sample@dog2"] == ["train@dog2"]
    assert not any("@dog" in stage and "@dog2" not in stage for stage in planned)
    surely = {stage for stage, causes in planned.items() if not causes}
    assert surely <= set(repro(dvc_project)) <= set(planned)
    assert stages_to_run() == {}


def test_every_stage_of_the_default_pipeline_has_an_estimate() -> None:
    """Of pairs and edits, too, which draw other prompts than concepts do."""
    config = load_config(ROOT / "params.yaml")
    entries = {"concept": config.concepts, "pair": config.pairs, "edit": config.edits}
    assert all(entries.values()), "nothing of that kind to estimate"
    for kind, names in entries.items():
        suffix = "" if kind == "concept" else f"-{kind}"
        for name in names:
            assert estimate(config, f"train{suffix}@{name}", 0.01) > estimate(config, f"train{suffix}@{name}", 0.001)


def test_a_picture_takes_the_time_of_the_network_at_its_fastest(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches of eight; the first calls of a process are slow."""
    config = load_config(ROOT / "params.yaml")
    config = config.model_copy(update={"base": config.base.replaced({"model": str(tiny_base)})})
    predict, clock, durations = StableDiffusion.predict, [0.0], iter([9.0, 2.0, 0.8, 1.0])

    def timed(family: StableDiffusion, noisy: torch.Tensor, *arguments: Any) -> Any:
        assert len(noisy) == 8
        clock[0] += next(durations)
        return predict(family, noisy, *arguments)

    monkeypatch.setattr(StableDiffusion, "predict", timed)
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert plan.seconds_per_picture(config) == pytest.approx(0.1)


def test_a_gpu_that_is_here_is_said_to_fit_or_which_rank_would(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(ROOT / "params.yaml")
    config = config.model_copy(update={"base": config.base.replaced({"model": str(tiny_base)})})

    def said(gib: float, **settings: Any) -> list[str]:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=gib * 2**30))
        return memory(config.model_copy(update={"train": config.train.replaced(settings)}))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert len(said(24)) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert said(24)[1] == "memory: on this GPU of 24 GB it fits"
    assert said(1e-9)[1].endswith("it does not fit at any rank")
    network = build(str(tiny_base))
    between = (training_memory(network, rank=3).total + training_memory(network, rank=4).total) / 2
    assert training_memory(network).total > between, "the whole decomposition would fit as well"
    assert said(between / SHARE / 2**30)[1].endswith("it does not fit; set train.rank: 3")
    assert said(between / SHARE / 2**30, rank=3)[1].endswith("it fits")
    assert said(between / SHARE / 2**30, rank=4)[1].endswith("it does not fit; set train.rank: 3")

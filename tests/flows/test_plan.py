"""What `svdiff plan` says would run, against what DVC then runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from svdiff.config import load_config
from svdiff.plan import estimate, stages_to_run

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

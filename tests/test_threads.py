"""Commands compute with the threads that params.yaml says, not with as many as the machine happens to have."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

READ = "from svdiff.cli.arguments import read; from pathlib import Path; read(Path('params.yaml'))"
THREADS = "import torch; print(torch.get_num_threads())"
PARAMS = "classes: [dog]\nconcepts: {rex: {class_word: dog}}\nsample: {prompts: ['a {subject}']}\n"


BASE = Path(__file__).parents[1] / "models/base"  # large enough for its products to be split among threads


@pytest.mark.parametrize(
    ("program", "written", "threads"),
    [
        pytest.param(f"{READ}; {THREADS}", "threads: 3\n", "3", id="before, set", marks=pytest.mark.slow),
        pytest.param(f"{READ}; {THREADS}", "", "2", id="before, default", marks=pytest.mark.slow),
        pytest.param(f"import torch; {READ}; {THREADS}", "threads: 3\n", "3", id="after, set", marks=pytest.mark.slow),
        pytest.param(f"import torch; {READ}; {THREADS}", "", "2", id="after, default"),
    ],
)
def test_threads_of_params_are_used_whenever_torch_is_imported(
    tmp_path: Path, program: str, written: str, threads: str
) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS + written)
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    environment.pop("MKL_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == threads


def on_one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@pytest.mark.slow
def test_the_same_is_trained_and_drawn_whatever_cores_and_variables_there_are(tmp_path: Path) -> None:
    def made(name: str, variables: dict[str, str], prepare: Callable[[], None] | None = None) -> dict[str, bytes]:
        folder = tmp_path / name
        (folder / "data/concepts/rex").mkdir(parents=True)
        for i in range(2):
            noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"data/concepts/rex/{i}.png")
        params = yaml.safe_load(PARAMS) | {
            "base": {"model": str(BASE)},
            "threads": 2,
            "train": {"steps": 2, "prior_weight": 0.0, "validate_every": 2, "validation_seeds": [0]},
            "sample": {"prompts": ["a {subject}"], "seeds": [0], "steps": 2},
            "tracking": {"live": "none"},
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
        environment |= {"SVDIFF_HOME": "scratch", **variables}
        for command in ("train", "sample"):
            program = [sys.executable, "-c", "from svdiff.cli import main; main()", command, "rex"]
            subprocess.run(program, cwd=folder, env=environment, preexec_fn=prepare, check=True, capture_output=True)
        files = [*folder.glob("out/**/delta.safetensors"), *folder.glob("out/**/*.png")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    plain = made("plain", {})
    assert len(plain) > 1
    assert made("one-core", {"OMP_NUM_THREADS": "1"}, on_one_core) == plain
    assert made("seven", {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "PASSIVE"}) == plain

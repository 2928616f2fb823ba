"""A registered concept in a fresh process: pictures from prompts, on the right base only."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import Project, write_params
from PIL import Image

from flows.pipeline.results import read_results
from flows.registry.register import register
from svdiff.spectral import attach, load_basis

pytestmark = pytest.mark.slow

PREDICT = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri("sqlite:///mlruns/mlflow.db")
model = mlflow.pyfunc.load_model("models:/dog@champion")
few = {"steps": 2, "guidance": 2.0}
def show(frame):
    return [[row.prompt, int(row.seed), row.image.hex()] for row in frame.itertuples()]
prompts = ["a sks dog", "a {subject} on a red background"]
print("RESULT" + json.dumps({
    "list": show(model.predict(prompts, params=few)),
    "frame": show(model.predict(pd.DataFrame({"prompt": prompts}), params=few)),
    "seeds": show(model.predict(prompts, params=few | {"seeds": [1, 0]})),
    "base": show(model.predict(prompts, params=few | {"scale": 0.0})),
    "later": show(model.predict(prompts[1:], params=few | {"seed": 1})),
}))
"""


@pytest.fixture
def tiny_project(project: Project, tiny_base: Path, tiny_pipe) -> Project:
    """A registered concept with a real delta on the tiny base."""
    write_params(project.root, "dog", base={"model": str(tiny_base)})
    project = Project(project.root)
    results = project.results("dog")
    unet = tiny_pipe.unet
    shifts = attach(unet, load_basis(unet, cache=None, progress=False))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in [*shifts.parameters_spectral(), *shifts.parameters_1d()]:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    shifts.delta(concept="dog").save(results.delta)
    register(project.tracking, project.config, read_results(project.config, "dog", project.root))
    return project


def predict(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | environment
    return subprocess.run(
        [sys.executable, "-c", PREDICT], cwd=root, env=variables, capture_output=True, text=True, check=False
    )


def test_pictures_in_a_fresh_process(tiny_project: Project) -> None:
    done = predict(tiny_project.root)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.split("RESULT")[1])
    assert answers["list"] == answers["frame"]
    assert [row[:2] for row in answers["list"]] == [["a sks dog", 0], ["a sks dog on a red background", 1]]
    assert [row[1] for row in answers["seeds"]] == [1, 0]
    # A picture depends on its own prompt and seed only, whatever stands beside it.
    assert answers["later"][0] == answers["list"][1]
    first, base = (
        np.asarray(Image.open(io.BytesIO(bytes.fromhex(answers[key][0][2]))), dtype=int) for key in ("list", "base")
    )
    assert first.shape == (16, 16, 3)
    assert np.abs(first - base).max() > 0


def test_another_base_is_refused_by_name(tiny_project: Project, tiny_pipe, tmp_path: Path) -> None:
    """The same network with one weight changed by a hair is another base."""
    with torch.no_grad():
        next(tiny_pipe.unet.parameters()).view(-1)[0] += 1e-3
    tiny_pipe.save_pretrained(tmp_path / "other")
    done = predict(tiny_project.root, SVDIFF_BASE_MODEL=str(tmp_path / "other"))
    assert done.returncode != 0
    assert "does not fit the base model" in done.stderr
    assert "set SVDIFF_BASE_MODEL to the folder" in done.stderr
    gone = predict(tiny_project.root, SVDIFF_BASE_MODEL="/nowhere/base")
    assert "is not at /nowhere/base" in gone.stderr


def test_the_example_draws_with_the_champion(tiny_project: Project) -> None:
    example = Path(__file__).parents[2] / "examples" / "champion.py"
    command = [sys.executable, str(example), "dog", "a {subject}", "--seed", "3"]
    done = subprocess.run(command, cwd=tiny_project.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pictures/dog-0.png: a sks dog, seed 3" in done.stdout
    assert Image.open(tiny_project.root / "pictures/dog-0.png").size == (16, 16)

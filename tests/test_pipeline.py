"""The whole workflow on the embedded base, in a clone of this checkout, shortened to seconds a stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


class Checkout:
    """A clone in which stages can be run."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=self.root, env=ENV, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return done

    def change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.root / "params.yaml"
        values = yaml.safe_load(path.read_text())
        change(values)
        path.write_text(yaml.safe_dump(values, sort_keys=False))

    def stale(self) -> set[str]:
        """Stages that are out of date by themselves, not only through others."""
        return set(json.loads(self.run("dvc", "status", "--json").stdout))

    def delta(self, concept: str) -> Path:
        return self.root / "out/train" / concept / "delta.safetensors"


def shorten(values: dict[str, Any]) -> None:
    values["concepts"] = {name: values["concepts"][name] for name in list(values["concepts"])[:2]}
    values["classes"] = list(dict.fromkeys(concept["class_word"] for concept in values["concepts"].values()))
    values["prior"] |= {"images": 4, "steps": 2}
    values["train"] |= {"steps": 12, "validate_every": 6, "save_every": 1, "validation_seeds": [0]}
    values["sample"] |= {"prompts": values["sample"]["prompts"][:2], "seeds": [0], "steps": 2, "drift_pictures": 2}
    values["mix"] |= {"mixes": 4, "prompts": values["mix"]["prompts"][:1]}
    values["mix"]["train"] |= {"steps": 12}
    values["score"] |= {"bootstrap": 200}
    values["edit"] |= {"train": {"steps": 4, "validate_every": 4}, "seeds": [0], "steps": 2}
    values["rank"] |= {"concepts": list(values["concepts"])[:1], "ranks": [1], "steps": 2, "seeds": [0]}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A clone with data and base pulled, and the default pipeline run once on short settings."""
    root = tmp_path_factory.mktemp("clone") / "svdiff"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    # What is not committed yet belongs to the test as well.
    for name in ("svdiff", "flows", "dvc.yaml"):
        source, target = ROOT / name, root / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    clone = Checkout(root)
    clone.run(sys.executable, "-m", "flows", "sync")
    clone.change(shorten)
    clone.run("dvc", "repro")
    return clone


def test_everything_is_there_and_a_second_run_does_nothing(checkout: Checkout) -> None:
    names = list(yaml.safe_load((checkout.root / "params.yaml").read_text())["concepts"])
    for name in names:
        assert checkout.delta(name).is_file()
        assert (checkout.root / "out/register" / f"{name}.json").is_file()
        for folder in ("", "drift"):
            for model in ("trained", "base"):
                assert len(list((checkout.root / "out/sample" / name / folder / model).glob("*.png"))) == 2
    for name in yaml.safe_load((checkout.root / "params.yaml").read_text())["edits"]:
        assert (checkout.root / "out/edit" / name / "sheet.png").is_file()
    page = (checkout.root / "out/report/index.html").read_text()
    assert all(name in page for name in names)
    assert checkout.stale() == set()
    assert "up to date" in checkout.run("dvc", "status").stdout


WITHOUT_US = """
import sys
import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("models/base")
for scheduler in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    picture = pipe("a dog on a blue background", num_inference_steps=12).images[0]
    red, _, blue = np.asarray(picture)[[0, -1]].mean((0, 1))
    assert picture.size == (64, 64) and blue > red + 40, (scheduler, red, blue)
changed = StableDiffusionImg2ImgPipeline.from_pretrained("models/base")("a cat", image=picture, num_inference_steps=4)
assert changed.images[0].size == (64, 64)
assert "svdiff" not in sys.modules
"""


def test_the_base_draws_without_this_package(checkout: Checkout) -> None:
    """With diffusers' own pipelines and schedulers, loaded as anybody would."""
    subprocess.run([sys.executable, "-c", WITHOUT_US], cwd=checkout.root, env=ENV, check=True)


def test_a_concepts_own_rate_reruns_that_concept_alone(checkout: Checkout) -> None:
    before = (checkout.root / "params.yaml").read_text()
    first, second = yaml.safe_load(before)["concepts"]
    checkout.change(lambda values: values["concepts"][second].update(train={"lr": 0.5}))
    stale = checkout.stale()
    (checkout.root / "params.yaml").write_text(before)
    assert f"train@{second}" in stale
    assert not [stage for stage in stale if stage.endswith(f"@{first}") or stage.startswith("prior@")]


def test_adding_and_reordering_rerun_no_other_concept(checkout: Checkout) -> None:
    before = (checkout.root / "params.yaml").read_text()
    names = list(yaml.safe_load(before)["concepts"])

    def reorder(values: dict[str, Any]) -> None:
        values["concepts"] = dict(reversed(values["concepts"].items()))
        values["classes"].reverse()

    def add(values: dict[str, Any]) -> None:
        values["concepts"]["another"] = dict(values["concepts"][names[0]])

    checkout.change(reorder)
    reordered = checkout.stale()
    checkout.change(add)
    shutil.copytree(checkout.root / "data/concepts" / names[0], checkout.root / "data/concepts/another")
    added = checkout.stale()
    (checkout.root / "params.yaml").write_text(before)
    shutil.rmtree(checkout.root / "data/concepts/another")
    assert reordered <= {"check"}  # which looks at all of params.yaml, and whose output stays the same
    assert {"train@another", "register@another"} <= added
    assert not [stage for stage in added if stage.endswith(tuple(f"@{name}" for name in names))]


def test_a_training_killed_in_the_middle_resumes_to_the_same_bits(checkout: Checkout) -> None:
    concept = next(iter(yaml.safe_load((checkout.root / "params.yaml").read_text())["concepts"]))
    straight = load_file(checkout.delta(concept))
    shutil.rmtree(checkout.root / ".svdiff/state")
    checkout.delta(concept).unlink()
    stage = subprocess.Popen(
        ["dvc", "repro", "--single-item", "--force", "--no-run-cache", f"train@{concept}"],
        cwd=checkout.root,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(checkout.root.glob(".svdiff/state/train-*/state.pt")):
        assert stage.poll() is None, "the stage ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in [*psutil.Process(stage.pid).children(recursive=True), stage]:
        os.kill(process.pid, signal.SIGKILL)
    stage.wait()
    assert not checkout.delta(concept).exists()
    # As `make repro` does: a dvc that is killed while it writes leaves half a file.
    checkout.run(sys.executable, "-m", "flows", "sync")
    checkout.run("dvc", "repro", "--single-item", "--no-run-cache", f"train@{concept}")
    resumed = load_file(checkout.delta(concept))
    assert straight.keys() == resumed.keys()
    assert all(straight[name].equal(resumed[name]) for name in straight)


def test_bad_pictures_are_refused_before_any_work(checkout: Checkout) -> None:
    concept = next(iter(yaml.safe_load((checkout.root / "params.yaml").read_text())["concepts"]))
    bad = checkout.root / "data/concepts" / concept / "notes.png"
    bad.write_text("not a picture")
    try:
        done = checkout.run("svdiff", "train", concept, check=False)
    finally:
        bad.unlink()
    assert done.returncode == 2
    assert "notes.png" in done.stderr
    assert "Traceback" not in done.stderr

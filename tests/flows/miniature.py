"""A project in miniature: stages that write what the contract says, a real git, DVC and MLflow around them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.numpy import save_file

from flows.pipeline.results import Results, read_results
from flows.registry.tracking import Tracking, connect
from svdiff.config import Config, ScoreConfig, load_config
from svdiff.evaluation.score import summarise, summarise_drift
from svdiff.files import sort_safetensors_metadata

if TYPE_CHECKING:
    from mlflow import MlflowClient

BASE_HASH = "b" * 64
PROMPTS = ["a sks dog on a blue background", "a sks dog on a red background"]
SEEDS = [0, 1, 2, 3]


def write_params(root: Path, *concepts: str, **sections: dict) -> Path:
    """params.yaml of a project with dogs called `concepts`."""
    values = {
        "classes": ["dog"],
        "concepts": {name: {"class_word": "dog", "token": "sks"} for name in concepts},
        "sample": {"prompts": ["a {subject} on a blue background"], "seeds": SEEDS},
        "rank": {"concepts": [concepts[0]]},
    }
    path = root / "params.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return path


def write_train(
    root: Path, concept: str, *, value: float, base_hash: str = BASE_HASH, train_key: str | None = None
) -> None:
    """What `train` leaves: a delta full of `value`, a curve of 20 steps, one validation picture."""
    folder = root / "out" / "train" / concept
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    metadata = {"format_version": "1", "base_hash": base_hash, "basis_id": "x", "subset": "UNet"}
    save_file({"unet.conv_in.weight": np.full(4, value, np.float32)}, folder / "delta.safetensors", metadata)
    sort_safetensors_metadata(folder / "delta.safetensors")
    curve = {"step": np.arange(1, 21), "loss": 1 / np.arange(1, 21), "seconds": 0.5}
    pd.DataFrame(curve | {"fixed_noise_loss": [np.nan] * 19 + [0.2]}).to_csv(folder / "curve.csv", index=False)
    summary = {"train_key": train_key or f"key-{concept}-{value}", "config": {"lr": 0.001, "steps": 20}}
    (folder / "train.json").write_text(json.dumps(summary))
    Image.new("RGB", (16, 16), "red").save(folder / "validation" / "step-00000.png")


def write_sample(root: Path, concept: str) -> None:
    """What `sample` leaves: a picture for each model, prompt and seed."""
    folder, rows = root / "out" / "sample" / concept, []
    for model in ("trained", "base"):
        (folder / model).mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(PROMPTS):
            for seed in SEEDS:
                file = f"{model}/p{index:02d}-s{seed:04d}.png"
                Image.new("RGB", (16, 16), (40 * index, 40 * seed, 90)).save(folder / file)
                rows.append({"file": file, "model": model, "prompt": prompt, "prompt_index": index, "seed": seed})
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)


def write_score(
    root: Path,
    concept: str,
    *,
    identity: float = 0.5,
    text: float = 0.3,
    drift: float = 0.2,
    evaluators: str = "clip-1",
) -> None:
    """What `score` leaves: scores around the three numbers, further apart within a version than between versions.

    The untrained base has identity 0.2, text alignment 0.3 and drift 0.2.
    """
    folder = root / "out" / "score" / concept
    folder.mkdir(parents=True, exist_ok=True)
    table = pd.read_csv(root / "out" / "sample" / concept / "images.csv")
    base = table["model"] == "base"
    table["identity"] = np.where(base, 0.2, identity) + 0.1 * table["seed"]
    table["image_alignment"] = table["identity"]
    table["text_alignment"] = np.where(base, 0.3, text) - 0.1 * table["prompt_index"]
    table.to_csv(folder / "images.csv", index=False)
    rows = [
        {"model": model, "prompt": "a dog", "prompt_index": 0, "seed": seed, "identity": value + 0.1 * seed}
        for model, value in (("trained", drift), ("base", 0.2))
        for seed in range(8)
    ]
    bare = pd.DataFrame(rows)
    bare.to_csv(folder / "drift.csv", index=False)
    settings = ScoreConfig(bootstrap=100)
    metrics = summarise(table, settings, ("identity", "image_alignment", "text_alignment"))
    embedding = [np.eye(2)[seed % 2] for seed in bare["seed"]]
    metrics |= summarise_drift(bare.assign(embedding=embedding), settings)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "evaluators.json").write_text(json.dumps({"clip": {"model": evaluators}}))


def write_results(
    root: Path,
    concept: str,
    *,
    value: float = 0.1,
    identity: float = 0.5,
    text: float = 0.3,
    drift: float = 0.2,
    base_hash: str = BASE_HASH,
    evaluators: str = "clip-1",
    train_key: str | None = None,
) -> None:
    """What `train`, `sample` and `score` leave."""
    write_train(root, concept, value=value, base_hash=base_hash, train_key=train_key)
    write_sample(root, concept)
    write_score(root, concept, identity=identity, text=text, drift=drift, evaluators=evaluators)


def mlflow_client(root: Path) -> MlflowClient:
    """The store of the project at `root`. Without its name the registry would be the one this process used last."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{root}/mlruns/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def registered(root: Path, concept: str) -> list[int]:
    """Version numbers of `concept` in the project's registry."""
    found = mlflow_client(root).search_model_versions(f"name = '{concept}'")
    return sorted(int(version.version) for version in found)


class Project:
    """A folder with params.yaml, results of concepts and an MLflow store of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config: Config = load_config(root / "params.yaml")
        self.tracking: Tracking = connect(self.config.tracking, root)

    def results(self, concept: str = "dog", **values: object) -> Results:
        """Write results (see `write_results`) and read them back."""
        write_results(self.root, concept, **values)  # type: ignore[arg-type]
        return read_results(self.config, concept, self.root)

    def register(self, concept: str = "dog", **values: object):
        """Write results and register them."""
        from flows.registry.register import register

        return register(self.tracking, self.config, self.results(concept, **values))


DVC_YAML = """
stages:
  check:
    cmd: python stage.py check all
    deps: [params.yaml]
    outs: [out/check]
  prior:
    foreach: ${classes}
    do:
      cmd: python stage.py prior ${item}
      deps: [stage.py]
      outs: ["out/prior/${item}"]
  train:
    foreach: ${concepts}
    do:
      cmd: python stage.py train ${key}
      deps: ["data/concepts/${key}", "out/prior/${item.class_word}"]
      params: ["concepts.${key}"]
      outs: ["out/train/${key}"]
  sample:
    foreach: ${concepts}
    do:
      cmd: python stage.py sample ${key}
      deps: ["out/train/${key}"]
      outs: ["out/sample/${key}"]
  score:
    foreach: ${concepts}
    do:
      cmd: python stage.py score ${key}
      deps: ["out/sample/${key}"]
      outs: ["out/score/${key}"]
  register:
    foreach: ${concepts}
    do:
      cmd: python -m flows register ${key}
      deps: ["out/score/${key}", "out/train/${key}"]
      outs:
        - out/register/${key}.json:
            cache: false
  correlate:
    cmd: python stage.py correlate all
    deps: [out/train]
    outs: [out/correlate]
  rank:
    foreach: ${rank.concepts}
    do:
      cmd: python stage.py rank ${item}
      deps: [stage.py]
      outs: ["out/rank/${item}"]
  report:
    cmd: python stage.py report all
    deps: [out/correlate, out/score]
    outs: [out/report]
"""

# Marks make a stage fail, wait until the mark is taken away, or hang with a child of its own.
STAGE_PY = """
import os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
stage, name = sys.argv[1:]
print(f"{{stage}} of {{name}} begins", flush=True)
marks = Path(".marks")
marks.mkdir(exist_ok=True)
with open(marks / "gpus", "a") as gpus:
    gpus.write(f"{{stage}}@{{name}} {{os.environ.get('CUDA_VISIBLE_DEVICES')}}\\n")
if (marks / f"{{stage}}-{{name}}-fail").exists():
    print(f"cannot {{stage}} {{name}}: the moon is wrong")
    sys.exit(3)
while (marks / f"{{stage}}-{{name}}-wait").exists():
    time.sleep(0.1)
if (marks / f"{{stage}}-{{name}}-hang").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (marks / "pids").write_text(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(600)
if stage in ("train", "sample", "score"):
    import miniature
    root = Path.cwd()
    if stage == "train":
        pictures = sorted(Path("data/concepts", name).iterdir())
        miniature.write_train(root, name, value=sum(p.stat().st_size for p in pictures) / 1000)
    elif stage == "sample":
        miniature.write_sample(root, name)
    else:
        miniature.write_score(root, name)
else:
    folder = Path("out", stage, *([] if name == "all" else [name]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.txt").write_text(stage)
"""


def make_dvc_project(root: Path, *concepts: str) -> Path:
    """A git and DVC project whose stages are small and whose registration is the real one."""
    from dvc.repo import Repo

    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    repo = Repo.init(str(root))
    repo.close()
    write_params(root, *concepts)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "stage.py").write_text(STAGE_PY.format(here=str(Path(__file__).parent)))
    (root / ".gitignore").write_text("/out\n/mlruns\n/.svdiff\n/.marks\n__pycache__/\n")
    (root / ".marks").mkdir()
    for number, concept in enumerate(concepts):
        folder = root / "data" / "concepts" / concept
        folder.mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((64 + 8 * number, 64), 40 + index).convert("RGB").save(folder / f"{index}.png")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(root), "add", "."], check=True)
    subprocess.run(["git", "-C", str(root), *identity, "commit", "--quiet", "-m", "project"], check=True)
    return root

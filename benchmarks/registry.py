"""A registry of hundreds of concepts: how long listing, promotion and the plan of a re-evaluation take.

The catalogue goes through the real registration path (runs, curves, pictures, stored models, promotion), with deltas of a few
numbers. It is kept in --folder, and a build that was interrupted goes on.

python -m benchmarks.registry                                     # 200 concepts, 1,000 runs
python -m benchmarks.registry --concepts 10 --versions 2 --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from PIL import Image

from benchmarks.common import median, seconds, table
from flows.registry.concepts import list_concepts, read_concepts
from flows.registry.tracking import Tracking, connect
from svdiff.config import Config, ScoreConfig, load_config
from svdiff.evaluation.score import summarise

BASE_HASH = "b" * 64
SEEDS = [0, 1, 2, 3]  # with two prompts as many pairs of pictures as the rule wants
PROMPTS = ["a {subject} on a blue background", "a big {subject}"]


def project(root: Path, concepts: int) -> Config:
    """params.yaml and pictures of `concepts` concepts below `root`."""
    names = [f"concept-{number:04d}" for number in range(concepts)]
    values = {
        "classes": ["dog"],
        "concepts": {name: {"class_word": "dog"} for name in names},
        "evaluators": {"clip_model": "ViT-B-32", "clip_pretrained": "laion2b_s34b_b79k", "lpips_weights": None},
        "sample": {"prompts": PROMPTS, "seeds": SEEDS},
        "rank": {"concepts": names[:1]},
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    for index, name in enumerate(names):
        folder = root / "data/concepts" / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for number in range(3):
                Image.effect_noise((64, 64), index % 97 + number).save(folder / f"{number}.png")
    return load_config(root / "params.yaml")


def stages(root: Path, name: str, version: int) -> None:
    """What `train`, `sample` and `score` leave; every second version is better than all before it."""
    from safetensors.numpy import save_file

    from svdiff.files import sort_safetensors_metadata

    train, sample, score = (root / "out" / stage / name for stage in ("train", "sample", "score"))
    for folder in (train / "validation", sample / "trained", sample / "base", score):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format_version": "1", "base_hash": BASE_HASH, "subset": "UNet", "concept": name}
    save_file({"unet.conv_in.weight": np.full(4, version, np.float32)}, train / "delta.safetensors", metadata)
    sort_safetensors_metadata(train / "delta.safetensors")
    steps = np.arange(10, 410, 10)
    pd.DataFrame({"step": steps, "loss": 1 / steps, "seconds": 0.1}).to_csv(train / "curve.csv", index=False)
    (train / "train.json").write_text(json.dumps({"train_key": f"{name}-{version}", "config": {"steps": 400}}))
    picture = Image.new("RGB", (64, 64), (version * 20 % 255, 90, 90))
    picture.save(train / "validation" / "step-00000.png")
    rows = []
    for model in ("trained", "base"):
        for index, prompt in enumerate(PROMPTS):
            for seed in SEEDS:
                file = f"{model}/p{index:02d}-s{seed:04d}.png"
                picture.save(sample / file)
                text = prompt.format(subject="sks dog")
                rows.append({"file": file, "model": model, "prompt": text, "prompt_index": index, "seed": seed})
    image = 0.4 + 0.01 * version * (1 if version % 2 else -1)
    scored = pd.DataFrame(rows)
    scored.to_csv(sample / "images.csv", index=False)
    identity = np.where(scored["model"] == "base", 0.2, image)
    scored = scored.assign(identity=identity, image_alignment=image, text_alignment=0.3)
    scored.to_csv(score / "images.csv", index=False)
    measures = ("identity", "image_alignment", "text_alignment")
    (score / "metrics.json").write_text(json.dumps(summarise(scored, ScoreConfig(bootstrap=100), measures)))
    (score / "evaluators.json").write_text(json.dumps({"clip": "ViT-B-32"}))


def build(tracking: Tracking, config: Config, root: Path, versions: int) -> list[float]:
    """Register what is missing, version after version; seconds of each registration."""
    from tqdm import tqdm

    from flows.pipeline.results import read_results
    from flows.registry.register import register

    known = {concept.name: len(concept.versions) for concept in read_concepts(tracking)}
    missing = [(n, v) for v in range(1, versions + 1) for n in config.concepts if known.get(n, 0) < v]
    times = []
    for name, version in tqdm(missing, "registering", unit="version", mininterval=10):
        stages(root, name, version)
        start = time.perf_counter()
        register(tracking, config, read_results(config, name, root))
        times.append(time.perf_counter() - start)
    return times


def night(tracking: Tracking) -> None:
    """What a night's re-evaluation leaves: only then has a plan anything to compare."""
    from flows.monitoring.round import VERDICT, WHEN, WHY
    from flows.monitoring.rule import Verdict
    from flows.registry.promotion import now

    for version in filter(None, (concept.champion for concept in read_concepts(tracking))):
        if WHEN not in version.tags:
            for key, value in {VERDICT: str(Verdict.UNCHANGED), WHY: "benchmark", WHEN: now()}.items():
                tracking.client.set_model_version_tag(version.name, str(version.version), key, value)


def measure(tracking: Tracking, config: Config, root: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each operation in a process that has MLflow loaded, as flows and servers have."""
    from flows.monitoring.round import Round
    from flows.registry.concepts import find
    from flows.registry.overrides import promote_manually, rollback
    from flows.registry.promotion import decide_again
    from flows.registry.runs import read_lineage

    names, challenged = list(config.concepts), challenged_concept(tracking)
    operations: dict[str, Callable[[], object]] = {
        "list": lambda: list_concepts(tracking),
        "plan of a re-evaluation": lambda: Round(tracking, config, root).plan(),
        "promotion by the rule": lambda: decide_again(tracking, config, challenged),
        "lineage": lambda: read_lineage(tracking, find(tracking, names[-1])),
    }
    times = {name: seconds(run, repeats) for name, run in operations.items()}
    times["promotion by hand"], times["rollback"] = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        promote_manually(tracking, challenged, None, "benchmark")
        middle = time.perf_counter()
        was, _ = rollback(tracking, challenged, "benchmark")
        times["rollback"].append(time.perf_counter() - middle)
        times["promotion by hand"].append(middle - start)
        tracking.client.set_registered_model_alias(challenged, "challenger", str(was))
    return times


def challenged_concept(tracking: Tracking) -> str:
    """The first concept with a challenger."""
    return next(concept.name for concept in read_concepts(tracking) if "challenger" in concept.aliases)


def commands(tracking: Tracking, root: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of whole commands, most of which is importing MLflow."""
    from flows.registry.overrides import rollback

    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    environment.pop("MLFLOW_TRACKING_URI", None)

    def run(*arguments: str) -> Callable[[], object]:
        command = [sys.executable, "-m", "flows", *arguments]
        return lambda: subprocess.run(command, cwd=root, env=environment, check=True, stdout=subprocess.DEVNULL)

    challenged = challenged_concept(tracking)
    times = {
        "command: list": seconds(run("list"), repeats),
        "command: reevaluate --plan": seconds(run("reevaluate", "--plan"), repeats),
        "command: promote": [],
    }
    for _ in range(repeats):
        times["command: promote"] += seconds(run("promote", challenged, "--reason", "benchmark"), 1, warmup=0)
        was, _ = rollback(tracking, challenged, "benchmark")
        tracking.client.set_registered_model_alias(challenged, "challenger", str(was))
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=200)
    parser.add_argument("--versions", type=int, default=5, help="of each concept; a run each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/registry"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = options.folder.resolve()
    config = project(root, options.concepts)
    tracking = connect(config.tracking, root)
    registered = build(tracking, config, root, options.versions)
    night(tracking)
    times = measure(tracking, config, root, options.repeats) | commands(tracking, root, options.repeats)
    if registered:
        times["registration"] = registered
    result: dict[str, Any] = {
        "concepts": len(read_concepts(tracking)),
        "versions": sum(len(concept.versions) for concept in read_concepts(tracking)),
        "seconds": {name: {"median": median(values), "max": max(values)} for name, values in times.items()},
    }
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['concepts']} concepts, {result['versions']} versions")
    rows = [[name, f"{s['median']:.3f}", f"{s['max']:.3f}"] for name, s in result["seconds"].items()]
    print(table(["operation", "median s", "max s"], rows))


if __name__ == "__main__":
    main()

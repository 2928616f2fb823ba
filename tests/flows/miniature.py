"""A project in miniature: stages that write what the contract says, a real git, DVC and MLflow around them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from PIL import Image
from safetensors.numpy import save_file

from flows.results import Results, read_results
from flows.tracking import Tracking, connect
from svdiff.config import Config, load_config
from svdiff.files import sort_safetensors_metadata

BASE_HASH = "b" * 64
PROMPTS = ["a sks dog on a blue background", "a sks dog on a red background"]
SEEDS = [0, 1, 2]


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


def write_results(
    root: Path,
    concept: str,
    *,
    value: float = 0.1,
    image: float = 0.5,
    text: float = 0.3,
    base_hash: str = BASE_HASH,
    evaluators: str = "clip-1",
    train_key: str | None = None,
) -> None:
    """What `train`, `sample` and `score` leave: a delta full of `value`, alignments around `image` and `text`."""
    train, sample, score = (root / "out" / stage / concept for stage in ("train", "sample", "score"))
    for folder in (train / "validation", sample / "trained", sample / "base", score):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format_version": "1", "base_hash": base_hash, "basis_id": "x", "subset": "UNet"}
    save_file({"unet.conv_in.weight": np.full(4, value, np.float32)}, train / "delta.safetensors", metadata)
    sort_safetensors_metadata(train / "delta.safetensors")
    steps = np.arange(1, 21)
    pd.DataFrame(
        {"step": steps, "loss": 1 / steps, "lr": 0.001, "seconds": 0.5, "fixed_noise_loss": [np.nan] * 19 + [0.2]}
    ).to_csv(train / "curve.csv", index=False)
    key = train_key or f"key-{concept}-{value}"
    (train / "train.json").write_text(json.dumps({"train_key": key, "config": {"lr": 0.001, "steps": 20}}))
    Image.new("RGB", (16, 16), "red").save(train / "validation" / "step-00000.png")
    rows = []
    for index, prompt in enumerate(PROMPTS):
        for seed in SEEDS:
            for model in ("trained", "base"):
                file = f"{model}/p{index:02d}-s{seed:04d}.png"
                Image.new("RGB", (16, 16), (40 * index, 40 * seed, 90)).save(sample / file)
                rows.append(
                    {"file": file, "model": model, "prompt": prompt, "prompt_index": index, "seed": seed}
                    # Differences between pictures are larger than those between versions, as in real life.
                    | {"image_alignment": image + 0.1 * seed, "text_alignment": text - 0.1 * index}
                )
    table = pd.DataFrame(rows)
    table[["file", "model", "prompt", "prompt_index", "seed"]].to_csv(sample / "images.csv", index=False)
    table.to_csv(score / "images.csv", index=False)
    means = table[table["model"] == "trained"][["image_alignment", "text_alignment"]].mean().to_dict()
    (score / "metrics.json").write_text(json.dumps(means | {"pairs": len(PROMPTS) * len(SEEDS)}))
    (score / "evaluators.json").write_text(json.dumps({"clip": {"model": evaluators}}))


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
        from flows.registry import register

        return register(self.tracking, self.config, self.results(concept, **values))

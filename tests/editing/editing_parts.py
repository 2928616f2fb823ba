"""What a test of edits works on: a checkout with one edit, and small networks and pictures for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageDraw

CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class Checkout:
    """A folder with params.yaml and one picture to edit; the current folder of the test."""

    def __init__(self, root: Path, base: Path, evaluators: dict[str, Any], world: Path) -> None:
        self.root = root
        self.values: dict[str, Any] = {
            "base": {"model": str(base)},
            "evaluators": evaluators,
            "classes": ["dog"],
            "concepts": {"pet": {"class_word": "dog"}},
            "edits": {
                "on-red": {
                    "image": "photo.png",
                    "prompt": "a dog on a blue background",
                    "targets": ["a dog on a red background", "a cat on a blue background"],
                }
            },
            "train": {"lr": 1e-2, "lr_1d": 1e-3, "save_every": 2, "validate_every": 3, "validation_seeds": [0]},
            "edit": {"train": {"steps": 6}, "steps": 3, "seeds": [0, 1]},
            "sample": {"prompts": ["a {subject}"], "steps": 2},
            "rank": {"concepts": ["pet"]},
            "tracking": {"live": "none"},
            "base_training": {"world": {"folder": str(world)}},
        }
        image = Image.new("RGB", (64, 48), "royalblue")
        ImageDraw.Draw(image).ellipse((16, 8, 48, 40), fill="orange")
        image.save(root / "photo.png")
        self.write()

    def write(self) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(self.values))

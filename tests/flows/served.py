"""A registry of real deltas on the tests' tiny base, and what the library draws with them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniature import Project, write_params
from PIL import Image

from flows.pipeline.results import read_results
from flows.registry.register import register
from svdiff.sampling import Job, sample_images
from svdiff.spectral import SpectralDelta, SpectralPipeline, attach, load_basis

STEPS, GUIDANCE = 2, 2.0


class Served(Project):
    """Concepts on the tiny base, of which `train` registers versions."""

    def __init__(self, root: Path, base: Path, pipe: Any, *concepts: str) -> None:
        sample = {
            "prompts": ["a {subject} on a blue background"],
            "seeds": [0, 1, 2, 3],
            "steps": STEPS,
            "guidance": GUIDANCE,
        }
        write_params(root, *concepts, base={"model": str(base)}, sample=sample)
        super().__init__(root)
        self.pipe, self.deltas = pipe, dict[str, SpectralDelta]()

    def train(self, name: str, seed: int, identity: float = 0.5) -> int:
        """Register a version with random shifts; one that is better in `identity` becomes champion. Its number."""
        results = self.results(name, value=float(seed), identity=identity)
        shifts = attach(self.pipe.unet, load_basis(self.pipe.unet, cache=None, progress=False))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in [*shifts.parameters_spectral(), *shifts.parameters_1d()]:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        delta = shifts.delta(concept=name)
        shifts.detach()
        delta.save(results.delta)
        done = register(self.tracking, self.config, read_results(self.config, name, self.root))
        self.deltas[f"{name}@{done.version}"] = delta
        return done.version

    def drawn(self, prompt: str, seed: int, mix: dict[str, float], steps: int = STEPS, guidance: float = GUIDANCE):
        """The library's own picture: one, under these versions and weights."""
        personal = SpectralPipeline(self.pipe, progress=False)
        for name in mix:
            personal.load_delta(self.deltas[name], name)
        personal.set_deltas(mix)
        (image,) = sample_images(self.pipe, [Job(prompt, seed)], steps=steps, guidance=guidance)
        personal.unload()
        return np.asarray(image, dtype=int)


def make_served(root: Path, empty_store: bytes, base: Path) -> Served:
    """A project in `root` with concepts `dog` and `dog2`, nothing registered."""
    from svdiff.config import BaseModelConfig
    from svdiff.models import load_pipeline

    (root / "mlruns").mkdir()
    (root / "mlruns" / "mlflow.db").write_bytes(empty_store)
    return Served(root, base, load_pipeline(BaseModelConfig(model=str(base))), "dog", "dog2")


def pixels(png: bytes) -> np.ndarray:
    """A picture of the server."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=int)


def same(png: bytes, wanted: np.ndarray) -> bool:
    """Whether it is that picture, but for the last bit: sums of batches of other sizes round otherwise."""
    return int(np.abs(pixels(png) - wanted).max()) <= 1

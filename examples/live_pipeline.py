"""Several concepts on one live pipeline: load, switch, mix, fuse, and the base again.

In a checkout with two or more deltas:

    python examples/live_pipeline.py "a sks cat" out/train/scarf-cat/delta.safetensors out/train/bow-cat/delta.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from svdiff.config import load_config
from svdiff.models import load_pipeline, scratch
from svdiff.spectral import SpectralPipeline
from svdiff.threads import use_threads


def main() -> None:
    """Draw the prompt with each delta, with all of them, and with none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("deltas", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()

    config = load_config()
    use_threads(config.threads)
    concepts = SpectralPipeline(load_pipeline(config.base), cache=scratch() / "bases")
    names = [f"delta-{number}" for number in range(len(asked.deltas))]
    for name, path in zip(names, asked.deltas, strict=True):
        concepts.load_delta(path, name)

    asked.output.mkdir(parents=True, exist_ok=True)

    def draw(title: str) -> None:
        generator = torch.Generator().manual_seed(0)
        image = concepts.pipe(asked.prompt, num_inference_steps=config.sample.steps, generator=generator).images[0]
        image.save(asked.output / f"{title}.png")
        print(asked.output / f"{title}.png")

    for name in names:
        started = time.perf_counter()
        concepts.set_deltas(name)
        print(f"switched to {name} in {1000 * (time.perf_counter() - started):.1f} ms")
        draw(name)
    concepts.set_deltas(dict.fromkeys(names, 1 / len(names)))  # Eq. 5
    draw("mean")
    concepts.fuse()  # plain weights
    draw("mean-fused")
    concepts.unfuse()
    concepts.unload()  # bit for bit
    draw("base")


if __name__ == "__main__":
    main()

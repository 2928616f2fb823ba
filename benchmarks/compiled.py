"""What `train.compile` gains: steps of the trainer compiled and not, in turn, and the seconds that compilation takes.

    python -m benchmarks.compiled                                # the first concept of params.yaml, with its settings
    python -m benchmarks.compiled --settings subset=UNet-CA train_token=false --json

Two trainers share one network and its shifts: pictures are noise, steps are real. Compiled code is kept in an empty
folder, so that the first compilation finds nothing; the second is that of a later training, which finds the first's.
`python -m benchmarks.gpu --only compiled` measures the same at the size of SD 1.5 on a graphics card.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from typing import Any

import torch

from benchmarks.catalogue import in_turn, ratio
from benchmarks.common import machine, median

TRAINING = 400  # steps, of which the share that compilation takes is said


def measure(base: str, given: list[str], rounds: int) -> dict[str, Any]:
    """Seconds and ratios; `given` are settings of `train` as `key=value`."""
    import numpy as np
    import yaml
    from accelerate import Accelerator
    from PIL import Image

    from svdiff.config import BaseModelConfig, load_config
    from svdiff.models import family_of, load_pipeline
    from svdiff.models.compatibility import check_compile
    from svdiff.training.batches import Dataset, Examples, LatentImages, Shown
    from svdiff.training.loop import Trainer
    from svdiff.training.methods import apply_method

    config = load_config()
    entry = config.entry(next(iter(config.concepts)))
    overrides = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in given)}
    settings = config.train_config(entry.name, overrides | {"compile": False})
    accelerator = Accelerator(mixed_precision=settings.precision)
    compiling = settings.model_copy(update={"compile": True})
    check_compile(compiling, accelerator.device)
    pipe = load_pipeline(BaseModelConfig(model=base), accelerator.device)
    family, random = family_of(pipe), np.random.default_rng(0)
    side = family.image_size
    pictures = [Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(2)]
    latents = LatentImages.encode(family, pictures)
    [(token, word)] = [(concept.token, concept.class_word) for concept in entry.concepts.values()]
    prior = Examples.alike(latents, f"a {word}") if settings.prior_weight else None
    shown = Examples.alike(latents, f"a {token} {word}", Shown(token, word))
    dataset = Dataset(shown, prior, lambda sample: (sample % 2, sample % 2), [0])

    method = apply_method(pipe, settings, entry.tokens)
    trainers = {
        name: Trainer(pipe, method, one, dataset, accelerator)
        for name, one in (("plain", settings), ("compiled", compiling))
    }
    steps = {name: trainer.run().__next__ for name, trainer in trainers.items()}

    def first() -> float:
        start = time.perf_counter()
        steps["compiled"]()
        return time.perf_counter() - start

    steps["plain"]()  # encodes the prompts
    cold = first()
    times = in_turn(steps, rounds)
    torch.compiler.reset()
    again = first()
    step = {name: median(values) for name, values in times.items()}
    saved = step["plain"] - step["compiled"]
    return {
        "compiled_over_plain": ratio(times, "compiled", "plain"),
        "plain_step_s": step["plain"],
        "compiled_step_s": step["compiled"],
        "compiling_s": cold - step["compiled"],
        "compiling_again_s": again - step["compiled"],
        f"compiling_over_{TRAINING}_plain_steps": (cold - step["compiled"]) / (TRAINING * step["plain"]),
        "pays_after_steps": (cold - step["compiled"]) / saved if saved > 0 else None,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="models/base", help="a folder in diffusers' layout")
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of `train`, as in params.yaml")
    parser.add_argument("--rounds", type=int, default=30, help="pairs of timed steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        result = measure(options.base, options.settings, options.rounds)
    if options.json:
        print(json.dumps({"base": options.base, "settings": options.settings, **machine(), **result}, indent=1))
        return
    print(f"{options.base}, {machine()['threads']} threads")
    for name, value in result.items():
        print(f"{name:<34} {'never' if value is None else format(value, '.3f')}")


if __name__ == "__main__":
    main()

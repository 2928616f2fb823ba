"""What the attention recorder costs: a training step of a UNet that never had one, after one has left it, and within one.

python -m benchmarks.attention --latents 32
python -m benchmarks.attention --model models/base --latents 8 --pairs 40 --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from benchmarks.common import machine, make_inputs, make_unet, median, seconds, table
from svdiff.training.attention import AttentionRecorder


def measure(model: str, latents: int, pairs: int) -> dict[str, list[float]]:
    """Seconds of forward and backward passes, taken in turn: `plain`, recorder `off` and `on`."""
    plain: Any = make_unet(model)
    watched: Any = make_unet(model)
    inputs = make_inputs(plain, latents)

    def step(unet: Any, recorder: AttentionRecorder | None = None) -> Callable[[], None]:
        def run() -> None:
            with recorder or nullcontext():
                loss = unet(*inputs).sample.square().mean()
                if recorder is not None:
                    loss = loss + sum(map_.square().mean() for map_ in recorder.maps.values())
                loss.backward()

        return run

    # `off` runs on the UNet that `on` has just left.
    steps = {"plain": step(plain), "on": step(watched, AttentionRecorder(watched)), "off": step(watched)}
    for run in steps.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(pairs):
        for name in list(steps) if number % 2 else reversed(list(steps)):
            times[name] += seconds(steps[name], 1, warmup=0)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="`sd15`, `tiny` or a diffusers folder")
    parser.add_argument("--latents", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    times = measure(arguments.model, arguments.latents, arguments.pairs)
    ratios = {name: median([a / b for a, b in zip(own, times["plain"], strict=True)]) for name, own in times.items()}
    if arguments.json:
        print(json.dumps({"machine": machine(), "seconds": times, "ratios": ratios}))
        return
    rows = [[name, f"{1e3 * median(own):.0f} ms", f"{ratios[name]:.3f}"] for name, own in times.items()]
    print(table(["recorder", "step", "ratio"], rows))


if __name__ == "__main__":
    main()

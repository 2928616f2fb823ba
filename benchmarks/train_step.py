"""Time and memory of one training step: frozen floor, spectral shifts, LoRA, full weights, svdiff-pytorch's layers.

    python -m benchmarks.train_step --latents 32 64            # the SD-1.5 shape, random weights, a table
    python -m benchmarks.train_step --model models/base --json

A step is forward, backward and AdamW at batch 1. Each method runs in a process of its own; peak memory is
resident memory during the timed steps, mapped files included. `--rounds` repeats the whole comparison in turn, so that a
drift of the machine falls on all methods alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    in_child,
    machine,
    make_inputs,
    make_unet,
    median,
    memory_gb,
    reset_peak_memory,
    seconds,
    table,
)
from benchmarks.methods import METHODS


def measure(method: str, model: str, latents: int, repeats: int, cache: str) -> dict[str, Any]:
    """One method, in this process."""
    unet: Any = make_unet(model)
    trained = METHODS[method](unet, Path(cache))
    sample, step, text = make_inputs(unet, latents)
    noise = torch.randn_like(sample)
    sample.requires_grad_(not trained)
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def train_step() -> None:
        loss = torch.nn.functional.mse_loss(unet(sample, step, text).sample, noise)
        loss.backward()
        sample.grad = None
        if optimiser:
            optimiser.step()
            optimiser.zero_grad()

    train_step()
    reset_peak_memory()
    times = seconds(train_step, repeats, warmup=0)
    trainable = sum(p.numel() for p in trained)
    return {"times": times, "peak_gb": memory_gb(), "trainable": trainable}


def compare(model: str, latents: int, methods: list[str], repeats: int, rounds: int, cache: str) -> dict[str, Any]:
    """All methods at one size, and their ratios."""
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for method in methods:
            few = max(1, repeats // 3) if method in ("existing", "full") else repeats
            one = in_child(
                "benchmarks.train_step", method=method, model=model, latents=latents, repeats=few, cache=cache
            )
            if "error" in one:
                found[method] = one
                continue
            past = found.get(method, {"times": [], "peak_gb": 0.0})
            times = past["times"] + one["times"]
            peak = max(past["peak_gb"], one["peak_gb"])
            found[method] = {"seconds": median(times), "peak_gb": peak, "trainable": one["trainable"], "times": times}
    time_of = {m: r["seconds"] for m, r in found.items() if "seconds" in r}
    peak_of = {m: r["peak_gb"] for m, r in found.items() if "seconds" in r}
    pairs = [
        ("spectral", "floor"),
        ("lora", "floor"),
        ("full", "floor"),
        ("existing", "floor"),
        ("existing", "spectral"),
    ]
    ratios = {f"{a}/{b}": time_of[a] / time_of[b] for a, b in pairs if a in time_of and b in time_of}
    if "lora" in peak_of and "spectral" in peak_of:
        ratios["memory spectral/lora"] = peak_of["spectral"] / peak_of["lora"]
    return {"methods": found, "ratios": ratios}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, tiny, or a diffusers folder")
    parser.add_argument(
        "--latents", type=int, nargs="+", help="side of the latents [default: 32 and 64; the model's own]"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3, help="timed steps (a third of them for existing and full)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache", default=".svdiff/bases", help="where decompositions are kept")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(**json.loads(options.child))))
        return
    sizes = options.latents or (
        [32, 64] if options.model == "sd15" else [make_unet(options.model, "meta").config.sample_size]
    )
    result = {
        str(size): compare(options.model, size, options.methods, options.repeats, options.rounds, options.cache)
        for size in sizes
    }
    if options.json:
        print(json.dumps({"model": options.model, **machine(), "latents": result}, indent=1))
        return
    for size, part in result.items():
        rows = []
        for method, r in part["methods"].items():
            if "error" in r:
                rows.append([method, r["error"], "", "", ""])
                continue
            ratio = r["seconds"] / part["methods"].get("floor", {}).get("seconds", float("nan"))
            rows.append([method, f"{r['seconds']:.3f}", f"{ratio:.3f}", f"{r['peak_gb']:.2f}", f"{r['trainable']:,}"])
        print(f"\n{options.model}, {size} x {size} latents, {machine()['threads']} threads")
        print(table(["method", "seconds", "x floor", "peak GB", "trained"], rows))
        print("  ".join(f"{name} {value:.3f}" for name, value in part["ratios"].items()))


if __name__ == "__main__":
    main()

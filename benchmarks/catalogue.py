"""Many concepts at once against one after the other: drawing, switching, training.

    python -m benchmarks.catalogue --model models/base --json
    python -m benchmarks.catalogue                       # the shape of SD 1.5, random weights and factors

- `mixed_over_plain`: guided denoising steps of 8 pictures of 8 concepts over those of 8 pictures of one concept;
- `singles_over_mixed`: the same steps picture by picture with a switch before each, over those mixed: the gain;
- `together_over_alone`: `svdiff train` of 8 concepts as one batch over the same one after the other, from pictures to deltas, with
  `--train-steps` steps and a validation at either end; `cpu_` is the same of processor time;
- `memory_together_over_one`: peak memory of the process that trains 8 over that of a process that trains one;
- `switch_p99_ms`: switching between resident concepts, text encoder included.

Batches run in turn in one process, trainings (`benchmarks/together.py`) in a process each, which take turns on small bases. Of `sd15` the base is written to build/sd15
and decomposed once, 12 GB in all; a step of a concept is one picture there. The tiny UNet has no pipeline to train.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.common import machine, make_inputs, make_unet, median, table
from benchmarks.together import measure
from svdiff.models.sizes import build
from svdiff.spectral import Basis, SpectralDelta, SpectralPipeline, load_basis
from svdiff.spectral.basis import Factors, matrix_weights
from svdiff.spectral.delta import identity
from svdiff.spectral.subsets import shift_sizes

CONCEPTS = 8


def make_text_encoder(model: str) -> nn.Module | None:
    """That of the base, or of SD 1.5; the tiny UNet has none."""
    if model in ("sd15", "tiny"):
        return build("sd15", "text_encoder", "cpu") if model == "sd15" else None
    from transformers import CLIPTextModel

    found: nn.Module = CLIPTextModel.from_pretrained(Path(model) / "text_encoder")
    return found


def make_basis(model: str, module: nn.Module, cache: str) -> Basis:
    """The decomposition of a base; of random weights made-up factors, which cost the same at every call."""
    if model != "sd15":
        return load_basis(module, cache, progress=False)
    factors = {}
    for name, (_, weight) in matrix_weights(module).items():
        m, n = weight.flatten(1).shape
        k = min(m, n)
        u, vh = torch.randn(m, k).div_(m**0.5), torch.randn(k, n).div_(n**0.5)
        factors[name] = Factors(u, torch.rand(k), vh, weight.shape, weight.detach(), 0.0, name)
    return Basis(factors, "random weights")


def random_delta(parts: dict[str, nn.Module], bases: dict[str, Basis], seed: int) -> SpectralDelta:
    """A concept that shifts every weight of every part."""
    generator, metadata = torch.Generator().manual_seed(seed), {}
    tensors, norms = {}, []
    for prefix, module in parts.items():
        sizes = shift_sizes(module, "UNet")
        metadata |= identity(bases[prefix], prefix, sizes)
        norms += [f"{prefix}.{name}" for name in sizes if name not in bases[prefix]]
        tensors |= {f"{prefix}.{n}": 0.01 * torch.randn(size, generator=generator) for n, size in sizes.items()}
    return SpectralDelta(tensors, metadata | {"norms": json.dumps(norms)})


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Median of the ratios of one round each."""
    return median([a / b for a, b in zip(times[over], times[under], strict=True)])


@torch.no_grad()
def draw(personal: SpectralPipeline, names: list[str], latents: int, rounds: int, steps: int) -> dict[str, float]:
    """Guided steps of a batch of one concept, of a mixed one, and of single pictures; shifts are set once before them."""
    unet = personal.pipe.unet
    inputs = {size: make_inputs(unet, latents, size) for size in (1, CONCEPTS)}

    def step(size: int) -> None:
        sample, timesteps, text = inputs[size]
        text = torch.cat([text] * 2)  # once a picture, as pipelines do
        for _ in range(steps):
            unet(torch.cat([sample] * 2), torch.cat([timesteps] * 2), text)

    def plain() -> None:
        personal.set_deltas(names[0])
        step(CONCEPTS)

    def mixed() -> None:
        with personal.concepts(names):
            step(CONCEPTS)

    def singles() -> None:
        for name in names:
            personal.set_deltas(name)
            step(1)

    times = in_turn({"plain": plain, "mixed": mixed, "singles": singles}, rounds)
    return {
        "mixed_over_plain": ratio(times, "mixed", "plain"),
        "singles_over_mixed": ratio(times, "singles", "mixed"),
        "plain_step_s": median(times["plain"]) / steps,
    }


def switch(personal: SpectralPipeline, resident: int) -> dict[str, float]:
    """Milliseconds of a switch between `resident` concepts, at the median and at p99."""
    for number in range(resident - len(personal.deltas)):
        rows = personal._rows[personal.deltas[0]]
        personal._rows[f"resident {number}"] = {prefix: torch.randn_like(row) for prefix, row in rows.items()}
    names, times = personal.deltas, []
    for place in range(1000):
        name = names[place * 7919 % len(names)]
        start = time.perf_counter()
        personal.set_deltas(name)
        times.append(1e3 * (time.perf_counter() - start))
    times.sort()
    return {"resident": len(names), "switch_p50_ms": median(times), "switch_p99_ms": times[989]}


def batches(options: argparse.Namespace, rounds: int) -> dict[str, Any]:
    """What is measured on one pipeline in this process."""
    large = options.model == "sd15"
    unet: Any = make_unet(options.model).eval()
    latents = options.latents or (32 if large else unet.config.sample_size)
    encoder = make_text_encoder(options.model)
    parts = {"unet": unet} | ({} if encoder is None else {"text_encoder": encoder})
    bases = {prefix: make_basis(options.model, module, options.cache) for prefix, module in parts.items()}
    personal = SpectralPipeline(SimpleNamespace(**parts), bases=bases, progress=False)
    names = [f"concept {number}" for number in range(CONCEPTS)]
    for seed, name in enumerate(names):
        personal.load_delta(random_delta(parts, bases, seed), name)
    result: dict[str, Any] = {"latents": latents}
    if "draw" in options.only:
        result |= draw(personal, names, latents, rounds, options.steps or (1 if large else 25))
    if "switch" in options.only:
        result |= switch(personal, options.resident)
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, tiny, or a diffusers folder")
    parser.add_argument("--latents", type=int, help="side of the latents [default: 32; the model's own]")
    parser.add_argument("--rounds", type=int, help="times that each is timed [default: 3; 5 for small models]")
    parser.add_argument("--steps", type=int, help="denoising steps of a picture [default: 1; 25 for small models]")
    parser.add_argument("--resident", type=int, default=1000, help="concepts in memory while switching")
    parser.add_argument("--only", nargs="+", choices=["draw", "switch", "train"], default=["draw", "switch", "train"])
    parser.add_argument("--cache", default=".svdiff/bases", help="where decompositions are stored")
    parser.add_argument(
        "--train-steps", type=int, help="optimiser steps of each training [default: 3; 100 for small models]"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    large = options.model == "sd15"
    rounds = options.rounds or (3 if large else 5)

    result: dict[str, Any] = {"model": options.model, "concepts": CONCEPTS}
    if "train" in options.only and options.model != "tiny":  # first, while this process holds no network
        result |= measure(options.model, CONCEPTS, options.train_steps or (3 if large else 100), options.cache)
    if {"draw", "switch"} & set(options.only):
        result |= batches(options, rounds)
    if options.json:
        print(json.dumps({**machine(), **result}, indent=1))
        return
    print(table(["measure", "value"], [[n, f"{v:.3f}" if isinstance(v, float) else str(v)] for n, v in result.items()]))


if __name__ == "__main__":
    main()

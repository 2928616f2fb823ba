"""Load, swap and fuse against one guided denoising step (a batch of two through the UNet).

python -m benchmarks.swap --latents 32 64
python -m benchmarks.swap --model models/base --json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.common import machine, make_inputs, make_unet, median, seconds, table
from svdiff.spectral import SpectralDelta, SpectralPipeline
from svdiff.spectral.layers import SpectralLayer
from svdiff.spectral.subsets import shift_sizes


def once(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    return seconds(run, 1, warmup=0)[0]


def measure(model: str, sizes: list[int], pairs: int, cache: str) -> dict[str, Any]:
    """Everything in this process."""
    plain: Any = make_unet(model).eval()
    unet: Any = make_unet(model).eval()
    concepts = SpectralPipeline(SimpleNamespace(unet=unet), cache=cache)
    basis = concepts.basis("unet")
    deltas = [_random_delta(unet, basis, seed) for seed in range(2)]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        deltas[0].save(path)
        found["load_first_ms"] = 1e3 * once(lambda: concepts.load_delta(path, "a"))
        found["load_second_ms"] = 1e3 * once(lambda: concepts.load_delta(deltas[1], "b"))
    swaps = [once(lambda name=name: concepts.set_deltas(name)) for name in ["a", "b"] * 10]
    found["swap_ms"] = 1e3 * median(swaps)

    def step_of(network: Any, size: int) -> Callable[[], object]:
        sample, step, text = make_inputs(network, size, batch=2)
        return lambda: network(sample, step, text).sample

    with torch.no_grad():
        unfused = {size: median(seconds(step_of(unet, size), 2)) for size in sizes}
        found["fuse_s"] = once(concepts.fuse)
        assert not any(isinstance(layer, SpectralLayer) for layer in unet.modules())
        found["unfuse_s"] = once(concepts.unfuse)
        found["fuse_again_s"] = once(concepts.fuse)
        found["steps"] = {}
        for size in sizes:
            run, other = step_of(plain, size), step_of(unet, size)
            run(), other()
            times: list[tuple[float, float]] = []
            for i in range(pairs):  # in turn, and in either order
                if i % 2:
                    times.append((once(run), once(other)))
                else:
                    second = once(other)
                    times.append((once(run), second))
            base = median([a for a, _ in times])
            found["steps"][str(size)] = {
                "base_s": base,
                "fused_ratio": median([b / a for a, b in times]),
                "unfused_ratio": unfused[size] / base,
                "swap_ratio": found["swap_ms"] / 1e3 / base,
                "fuse_ratio": found["fuse_s"] / base,
            }
    start = time.perf_counter()
    concepts.unload()
    found["unload_s"] = time.perf_counter() - start
    return found


def _random_delta(unet: Any, basis: Any, seed: int) -> SpectralDelta:
    from svdiff.spectral.delta import identity

    sizes = shift_sizes(unet, "UNet")
    norms = [name for name in sizes if name not in basis]
    generator = torch.Generator().manual_seed(seed)
    delta = SpectralDelta.zeros(sizes, norms, **identity(basis, "unet", sizes))
    return delta.map(lambda name, v: 0.01 * torch.randn(v.shape, generator=generator))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, tiny, or a diffusers folder")
    parser.add_argument("--latents", type=int, nargs="+", help="[default: 32 and 64; the model's own]")
    parser.add_argument("--pairs", type=int, default=5, help="alternating steps of the base and the fused model")
    parser.add_argument("--cache", default=".svdiff/bases")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes = options.latents or (
        [32, 64] if options.model == "sd15" else [make_unet(options.model, "meta").config.sample_size]
    )
    result = measure(options.model, sizes, options.pairs, options.cache)
    if options.json:
        print(json.dumps({"model": options.model, **machine(), **result}, indent=1))
        return
    print(
        "load (file) {load_first_ms:.0f} ms, load (memory) {load_second_ms:.0f} ms, swap {swap_ms:.1f} ms, "
        "fuse {fuse_s:.2f} s, unfuse {unfuse_s:.2f} s, fuse again {fuse_again_s:.2f} s, unload {unload_s:.2f} s".format(
            **result
        )
    )
    rows = [
        [
            size, f"{r['base_s']:.3f}", f"{100 * r['swap_ratio']:.2f} %", f"{r['fuse_ratio']:.2f}",
            f"{r['unfused_ratio']:.3f}", f"{r['fused_ratio']:.3f}",
        ]
        for size, r in result["steps"].items()
    ]  # fmt: skip
    print(table(["latents", "guided step s", "swap/step", "fuse/step", "unfused/base", "fused/base"], rows))


if __name__ == "__main__":
    main()

"""Where a training step's time goes, layer kind by layer kind: each distinct layer alone, times how often it is used.

    python -m benchmarks.layers --latents 32 64

For each shape: forward and backward of the frozen layer with the gradient to its input, and of the spectral layer
with the gradient to its shifts as well (and none to inputs that need none, such as the text's).
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from benchmarks.common import machine, make_inputs, make_unet, seconds, table
from svdiff.spectral.basis import Factors
from svdiff.spectral.layers import make_layer

Key = tuple[Any, ...]


def layers_in_use(model: str, latents: int) -> dict[Key, tuple[str, nn.Module, tuple[int, ...], int]]:
    """Distinct layers with their inputs' shapes, found by a pass on the meta device."""
    unet: Any = make_unet(model, "meta")
    found: dict[Key, tuple[str, nn.Module, tuple[int, ...], int]] = {}

    def note(path: str, layer: nn.Module, inputs: Any) -> None:
        shape = tuple(inputs[0].shape)
        weight: Any = layer.weight
        key = (type(layer).__name__, tuple(weight.shape), shape, str(getattr(layer, "stride", "")))
        found[key] = (kind(path, layer), layer, shape, found[key][3] + 1 if key in found else 1)

    for path, layer in unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            layer.register_forward_pre_hook(lambda layer, inputs, path=path: note(path, layer, inputs))
    sample, _, text = make_inputs(unet, latents)
    unet(sample.to("meta"), 500, text.to("meta"))
    return found


def kind(path: str, layer: nn.Module) -> str:
    """The rows of the table."""
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        return "norms"
    if isinstance(layer, nn.Conv2d):
        return "conv 1x1" if layer.kernel_size == (1, 1) else "conv 3x3"
    if "attn2.to_k" in path or "attn2.to_v" in path:
        return "text keys and values"
    if ".ff." in path:
        return "feed-forward"
    return "attention" if "attn" in path else "time embedding"


def pair(layer: nn.Module, shape: tuple[int, ...], repeats: int, needs_input: bool) -> tuple[float, float]:
    """Best seconds of the frozen layer and of the spectral one."""
    real = type(layer).__new__(type(layer))
    real.__dict__.update(layer.__dict__, _forward_pre_hooks=OrderedDict())
    real._parameters = {
        name: None if p is None else nn.Parameter(0.02 * torch.randn(p.shape), requires_grad=False)
        for name, p in layer._parameters.items()
    }
    weight: Any = real.weight
    factors = None
    if weight.ndim > 1:
        m, n = weight.flatten(1).shape
        k = min(m, n)
        factors = Factors(
            torch.randn(m, k) / m**0.5, torch.rand(k), torch.randn(k, n) / n**0.5, weight.shape, weight, 0.0, ""
        )
    spectral = make_layer("layer", real, factors, None)
    x = torch.randn(shape, requires_grad=needs_input)
    with torch.no_grad():
        gradient = torch.randn_like(real(x))

    def frozen() -> None:
        y = real(x)
        if needs_input:
            torch.autograd.grad(y, x, gradient)

    def shifted() -> None:
        torch.autograd.grad(spectral(x), [x, spectral.delta] if needs_input else [spectral.delta], gradient)

    theirs, ours = [], []
    for _ in range(repeats):
        theirs += seconds(frozen, 1, warmup=not theirs)
        ours += seconds(shifted, 1, warmup=not ours)
    return min(theirs), min(ours)


def measure(model: str, latents: int, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by kind, of a whole step."""
    total: dict[str, dict[str, float]] = {}
    for name, layer, shape, count in layers_in_use(model, latents).values():
        needs_input = name not in ("text keys and values", "time embedding")
        theirs, ours = pair(layer, shape, repeats, needs_input)
        row = total.setdefault(name, {"layers": 0, "frozen": 0.0, "spectral": 0.0})
        row["layers"] += count
        row["frozen"] += count * theirs
        row["spectral"] += count * ours
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, tiny, or a diffusers folder")
    parser.add_argument("--latents", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = {str(size): measure(options.model, size, options.repeats) for size in options.latents}
    if options.json:
        print(json.dumps({"model": options.model, **machine(), "latents": result}, indent=1))
        return
    for size, kinds in result.items():
        rows = [
            [
                name,
                str(int(r["layers"])),
                f"{r['frozen']:.3f}",
                f"{r['spectral']:.3f}",
                f"{r['spectral'] / r['frozen']:.2f}",
            ]
            for name, r in sorted(kinds.items(), key=lambda item: -item[1]["frozen"])
        ]
        frozen, spectral = (sum(r[which] for r in kinds.values()) for which in ("frozen", "spectral"))
        rows.append(["all", "", f"{frozen:.3f}", f"{spectral:.3f}", f"{spectral / frozen:.2f}"])
        print(f"\n{options.model}, {size} x {size} latents")
        print(table(["layers", "count", "frozen s", "spectral s", "ratio"], rows))


if __name__ == "__main__":
    main()

"""Our decomposition against `torch.linalg.svd(full_matrices=False)`, with the same threads, and its accuracy.

    python -m benchmarks.decomposition                 # every distinct shape of the SD-1.5 UNet once, times its count
    python -m benchmarks.decomposition --model models/base --json

Accuracy is checked on the model's own weights and on rank-deficient ones of the same shapes: orthonormality of U
and V, singular values against float64 `svdvals` (for weights of at most `--exact` numbers), reconstruction.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import machine, make_unet, table
from svdiff.spectral import load_basis
from svdiff.spectral.basis import TRANSPOSED, matrix_weights
from svdiff.spectral.decompose import as_matrix, svd


def library(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What people use."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def clock(run: Callable[[], Any], budget: float) -> tuple[float, Any]:
    """Best time of as many runs as fit into `budget` seconds, one at least, and the last result."""
    best, spent, result = float("inf"), 0.0, None
    while spent == 0 or spent + best < budget:
        start = time.perf_counter()
        result = run()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return best, result


def errors(matrix: Tensor, factors: tuple[Tensor, Tensor, Tensor], exact: bool) -> dict[str, float]:
    """The largest deviations, after rounding to float32 as they are stored."""
    u, s, vh = (part.float() for part in factors)
    eye = torch.eye(len(s))
    found = {
        "U orthonormal": float((u.T @ u - eye).abs().max()),
        "V orthonormal": float((vh @ vh.T - eye).abs().max()),
        "reconstruction": float((matrix - (u * s) @ vh).norm() / matrix.norm().clamp_min(1e-30)),
    }
    if exact:
        true = torch.linalg.svdvals(matrix.double())
        found["sigma"] = float((s.double() - true).abs().max() / true[0].clamp_min(1e-30))
    return found


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The largest of each."""
    return {key: max(row[key] for row in rows if key in row) for key in {k for row in rows for k in row}}


def measure(model: str, budget: float, exact: int, skip_library: bool) -> dict[str, Any]:
    """Every distinct shape once."""
    shapes: dict[tuple[int, ...], list[Tensor]] = {}
    for owner, weight in matrix_weights(make_unet(model)).values():
        matrix = as_matrix(weight.detach(), transposed=isinstance(owner, TRANSPOSED))
        shapes.setdefault(tuple(matrix.shape), []).append(matrix)
    rows, own, deficient, theirs_errors = [], [], [], []
    for shape, matrices in sorted(shapes.items(), key=lambda item: item[0]):
        matrix = matrices[0].contiguous()
        small = matrix.numel() <= exact
        ours, factors = clock(lambda m=matrix: svd(m), budget)
        own.append(errors(matrix, factors, small))
        theirs = float("nan")
        if not skip_library:
            theirs, factors = clock(lambda m=matrix: library(m), budget)
            theirs_errors.append(errors(matrix, factors, small))
        if small:
            rank = max(1, min(shape) // 3)
            poor = matrix[:, :rank] @ torch.randn(rank, shape[1]) / rank**0.5
            deficient.append(errors(poor, svd(poor), True))
        rows.append({"shape": shape, "count": len(matrices), "ours": ours, "library": theirs})
    total = {which: sum(row["count"] * row[which] for row in rows) for which in ("ours", "library")}
    return {
        "shapes": rows, "total_seconds": total, "speedup": total["library"] / total["ours"],
        "errors": {"own": worst(own), "rank_deficient": worst(deficient), "library": worst(theirs_errors)},
    }  # fmt: skip


def whole(model: str, cache: str) -> dict[str, float]:
    """`load_basis` as users call it: the first time, and again from the cache."""
    unet = make_unet(model)
    start = time.perf_counter()
    first = load_basis(unet, cache)
    middle = time.perf_counter()
    again = load_basis(unet, cache)
    end = time.perf_counter()
    size = sum(p.stat().st_size for p in (Path(cache) / first.base_hash).glob("*.safetensors"))
    assert again.id == first.id
    return {"first_seconds": middle - start, "second_seconds": end - middle, "gigabytes": size / 1e9}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sd15", help="sd15, tiny, or a diffusers folder")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds for repeats of one shape")
    parser.add_argument("--exact", type=int, default=2_000_000, help="largest weight to check against svdvals")
    parser.add_argument("--skip-library", action="store_true", help="time ours alone")
    parser.add_argument("--whole", help="a cache folder: time load_basis there, first and second time, as well")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options.model, options.budget, options.exact, options.skip_library)
    if options.whole:
        result["load_basis"] = whole(options.model, options.whole)
    if options.json:
        print(json.dumps({"model": options.model, **machine(), **result}, indent=1))
        return
    rows = [
        [f"{r['shape'][0]} x {r['shape'][1]}", str(r["count"]), f"{r['ours']:.3f}", f"{r['library']:.3f}"]
        for r in result["shapes"]
    ]
    total = result["total_seconds"]
    rows.append(
        [
            "whole UNet",
            str(sum(r["count"] for r in result["shapes"])),
            f"{total['ours']:.1f}",
            f"{total['library']:.1f}",
        ]
    )
    print(table(["shape", "count", "ours s", "torch svd s"], rows))
    print(f"{result['speedup']:.2f} x faster")
    for kind, found in result["errors"].items():
        print(f"{kind}: " + ", ".join(f"{name} {value:.1e}" for name, value in sorted(found.items())))
    if "load_basis" in result:
        print(
            "load_basis: {first_seconds:.1f} s, then {second_seconds:.1f} s for {gigabytes:.1f} GB".format(
                **result["load_basis"]
            )
        )


if __name__ == "__main__":
    main()

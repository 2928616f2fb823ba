"""Products of the SD-1.5 UNet's sizes by PyTorch's `@` (MKL) and by oneDNN: which one `svdiff.spectral.cpu` takes.

python -m benchmarks.products
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from benchmarks.common import machine, seconds, table
from svdiff.spectral.cpu import OneDnnProduct, onednn_is_faster

# tokens x inputs x outputs
SHAPES = (
    (4096, 320, 320), (4096, 320, 2560), (4096, 1280, 320), (1024, 640, 640), (1024, 640, 5120), (256, 1280, 1280),
    (256, 1280, 10240), (64, 1280, 1280), (77, 768, 1280), (64, 128, 128),
)  # fmt: skip


def measure(repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of `x Wᵀ` for each shape."""
    rows: list[dict[str, Any]] = []
    for tokens, inputs, outputs in SHAPES:
        x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
        mkl = 1e3 * statistics.median(seconds(lambda x=x, w=weight: x @ w.T, repeats))
        onednn = 1e3 * statistics.median(seconds(lambda x=x, w=weight: OneDnnProduct.apply(x, w.T), repeats))
        shape = f"{tokens} x {inputs} x {outputs}"
        taken = "oneDNN" if onednn_is_faster(x, weight.T) else "PyTorch"
        rows.append({"shape": shape, "mkl_ms": mkl, "onednn_ms": onednn, "ratio": mkl / onednn, "taken": taken})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with torch.no_grad():
        rows = measure(arguments.repeats)
    if arguments.json:
        print(json.dumps({"machine": machine(), "products": rows}))
        return
    cells = [
        [row["shape"], f"{row['mkl_ms']:.2f}", f"{row['onednn_ms']:.2f}", f"{row['ratio']:.2f}", row["taken"]]
        for row in rows
    ]
    print(table(["tokens x in x out", "@ ms", "oneDNN ms", "@ / oneDNN", "taken"], cells))


if __name__ == "__main__":
    main()

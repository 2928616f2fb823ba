"""Sizes of deltas against Table 1, and what half precision costs in pixels.

python -m benchmarks.sizes
python -m benchmarks.sizes --delta out/train/teapot/delta.safetensors --base models/base --prompt "a sks teapot"
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import make_unet, table
from svdiff.spectral import SUBSETS, SpectralDelta, SpectralPipeline
from svdiff.spectral.subsets import shift_sizes, subset_sizes


def sizes() -> list[dict[str, Any]]:
    """Every subset of the SD-1.x UNet: our files, `torch.save` of the same tensors, and the paper's."""
    unet = make_unet("sd15", "meta")
    rows = []
    for name in SUBSETS:
        stored = io.BytesIO()
        torch.save({key: torch.zeros(size) for key, size in shift_sizes(unet, name).items()}, stored)
        rows.append(asdict(subset_sizes(unet, name)) | {"torch_save": len(stored.getvalue())})
    return rows


def half_precision(delta: Path, base: str, prompt: str, cache: str) -> dict[str, float]:
    """Differences in pixels (of 255) between pictures from the float32 and the float16 file."""
    from svdiff.config import BaseModelConfig
    from svdiff.models import load_pipeline
    from svdiff.sampling import Job, sample_images

    concepts = SpectralPipeline(load_pipeline(BaseModelConfig(model=base)), cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        files = {d: Path(folder) / f"{d}.safetensors" for d in (torch.float32, torch.float16)}
        for dtype, file in files.items():
            SpectralDelta.load(delta).save(file, dtype)
            concepts.load_delta(file, str(dtype))
        names = concepts.deltas
        length = [file.stat().st_size for file in files.values()]
    pictures = []
    for name in names:
        concepts.set_deltas(name)
        images = sample_images(concepts.pipe, [Job(prompt, seed) for seed in range(4)], steps=20, guidance=5.0)
        pictures.append(torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in images]))
    apart = (pictures[0].float() - pictures[1].float()).abs()
    return {
        "bytes_fp32": length[0], "bytes_fp16": length[1], "mean_pixel": float(apart.mean()), "max_pixel": float(apart.max()),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta", type=Path, help="a trained delta, for the pixels")
    parser.add_argument("--base", default="models/base")
    parser.add_argument("--prompt", default="a sks dog on a blue background")
    parser.add_argument("--cache", default=".svdiff/bases")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result: dict[str, Any] = {"subsets": sizes()}
    if options.delta:
        result["half_precision"] = half_precision(options.delta, options.base, options.prompt, options.cache)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    rows = []
    for row in result["subsets"]:
        paper = 1024 * row["paper_kb"]
        kb = [f"{row[key] / 1024:.1f}" for key in ("bytes_fp32", "bytes_fp16", "torch_save")]
        shares = [f"{row['bytes_fp32'] / paper:.3f}", f"{row['bytes_fp16'] / paper:.3f}"]
        rows.append([row["name"], str(row["tensors"]), str(row["shifts"]), *kb, f"{row['paper_kb']:.1f}", *shares])
    header = [
        "subset",
        "tensors",
        "shifts",
        "fp32 KB",
        "fp16 KB",
        "torch.save KB",
        "paper KB",
        "fp32/paper",
        "fp16/paper",
    ]
    print(table(header, rows))
    if options.delta:
        print(
            "half precision: {mean_pixel:.3f} of 255 in the mean, {max_pixel:.0f} at most".format(
                **result["half_precision"]
            )
        )


if __name__ == "__main__":
    main()

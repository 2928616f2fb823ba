"""What the benchmarks share: the model, memory, a child process for each measurement, tables."""

from __future__ import annotations

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TINY = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def make_unet(model: str, device: str = "cpu") -> nn.Module:
    """`sd15` (its shape, random weights, seed 0), `tiny`, or the UNet of a diffusers folder."""
    from diffusers import UNet2DConditionModel

    from svdiff.models.sizes import build

    torch.manual_seed(0)
    if model == "sd15":
        return build("sd15", device=device)
    if model == "tiny":
        with torch.device(device):
            return UNet2DConditionModel(**TINY)
    return UNet2DConditionModel.from_pretrained(model, subfolder="unet").to(device)


def make_inputs(unet: Any, latents: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, timesteps and 77 text tokens."""
    torch.manual_seed(1)
    size, width = unet.config.in_channels, unet.config.cross_attention_dim
    text = torch.randn(batch, 77, width)
    return torch.randn(batch, size, latents, latents), torch.full((batch,), 500), text


def seconds(run: Callable[[], object], repeats: int, warmup: int = 1) -> list[float]:
    """Wall-clock times of `run`."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def reset_peak_memory() -> None:
    """Give freed memory back to the system and forget the peak so far (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def memory_gb(which: str = "VmHWM") -> float:
    """Resident memory in GB, mapped files included: `VmHWM` the peak, `VmRSS` now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(which))


def in_child(module: str, **arguments: Any) -> dict[str, Any]:
    """Run `python -m module --child <json>` and return what it prints as JSON on its last line."""
    command = [sys.executable, "-m", module, "--child", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"error": f"exit status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
    }


def median(values: list[float]) -> float:
    """Median, the number that is reported of several runs."""
    return statistics.median(values)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)

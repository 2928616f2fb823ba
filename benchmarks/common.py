"""What the benchmarks share: the model, memory, a child process for each measurement, tables."""

from __future__ import annotations

import ctypes
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
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
    done = subprocess.run(_command(module, arguments), stdout=subprocess.PIPE, text=True, check=False)
    return _result(done.returncode, done.stdout)


def children_in_turn(
    module: str, children: Mapping[str, Mapping[str, Any]], slices: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """`in_child` of several that take turns, so that what else the machine does meanwhile slows all of them alike.

    Args:
        module: as in `in_child`.
        children: arguments of each by name. A result's `started` and `ended`, by `time.time()`, say what of it is timed.
        slices: seconds of a turn of each, best in the ratio of the times that they need; while one has its turn the others stop.

    Returns:
        their results; with `wall_s`, the seconds from `started` to `ended` in which it had its turn.
    """
    with ExitStack() as stack:
        outputs, running = dict[str, Any](), dict[str, subprocess.Popen[str]]()
        for name, arguments in children.items():
            outputs[name] = stack.enter_context(tempfile.TemporaryFile("w+"))
            running[name] = subprocess.Popen(_command(module, arguments), stdout=outputs[name], text=True)
            stack.callback(running[name].kill)
            running[name].send_signal(signal.SIGSTOP)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in children}
        while any(process.poll() is None for process in running.values()):
            for name, process in running.items():
                begun = time.time()
                process.send_signal(signal.SIGCONT)
                try:
                    process.wait(slices[name])
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGSTOP)
                turns[name].append((begun, time.time()))
        results = {}
        for name, output in outputs.items():
            output.seek(0)
            results[name] = result = _result(running[name].returncode, output.read())
            if "error" not in result:
                started, ended = result.pop("started"), result.pop("ended")
                result["wall_s"] = sum(max(0.0, min(ended, b) - max(started, a)) for a, b in turns[name])
    return results


def _command(module: str, arguments: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-m", module, "--child", json.dumps(arguments)]


def _result(status: int, output: str) -> dict[str, Any]:
    """What a child printed on its last line, or why it ended without."""
    if status:
        return {"error": f"exit status {status}"}
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
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

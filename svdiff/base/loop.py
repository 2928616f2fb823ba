"""The loop that every training of the base shares: a cosine schedule, a progress bar, checkpoints, exact resume."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdiff.files import atomic_file, write_atomic

if TYPE_CHECKING:
    from svdiff.base.config import BaseTrainingConfig
    from svdiff.base.world import World


def scratch(part: str) -> Path:
    """Folder of a part's resume state: `.svdiff/base/<part>`, or below $SVDIFF_HOME."""
    return Path(os.environ.get("SVDIFF_HOME", ".svdiff")) / "base" / part


def load_world(config: BaseTrainingConfig) -> World:
    """The configured picture world, its sprites in the scratch folder."""
    from svdiff.base.world import World

    settings = config.world
    return World(settings.folder, scratch("sprites"), settings.individuals, settings.named, settings.held_out)


def make_readable(folder: Path) -> None:
    """Give a folder's files the usual permissions: safetensors writes private ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o644)


def cosine_rate(step: int, steps: int, warmup: int, decay: float = 1.0) -> float:
    """Factor on the peak learning rate: linear warm-up, constant, then a half cosine over the last `decay`."""
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, round(steps * (1 - decay)))
    if step < start:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A generator for one step: what a step draws depends on its number alone, so resuming is exact."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + stream)


def multiplies_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where it does not, that is several times slower than float32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))


def autocast() -> torch.autocast:
    """bfloat16 where the machine multiplies it in hardware."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16())


def _gradients(loss: torch.nn.Module, batch: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict[str, float]]:
    parameters = [p for p in loss.parameters() if p.requires_grad]
    value, numbers = loss(*batch)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)], numbers


def _serve(pipe: Connection, loss: torch.nn.Module, shared: list[torch.Tensor]) -> None:
    """The second process: gradients of the parts of batches that arrive on `pipe`, left in `shared`."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the first process decides when to end
    try:
        while True:
            gradients, numbers = _gradients(loss, pipe.recv())
            for place, gradient in zip(shared, gradients, strict=True):
                place.copy_(gradient)
            pipe.send(numbers)
    except EOFError:
        return


class Gradients:
    """Gradients of a batch, by one process, or in two halves by two that share the weights, each single-threaded.

    Two processes are several times faster than two-threaded kernels, which wait for each other after every one of
    thousands of small operations. `loss` maps a part of a batch to (scalar, {name: number}).
    """

    def __init__(self, loss: torch.nn.Module, processes: int = 1) -> None:
        self.loss = loss
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self._other: Any = None
        if processes == 2:
            self._start()

    def _start(self) -> None:
        import torch.multiprocessing as processes

        self.loss.share_memory()
        # In the layout of the parameters, which the fused optimiser takes for granted.
        self._shared = [torch.zeros_like(p).share_memory_() for p in self.parameters]
        spawn = processes.get_context("spawn")
        self._pipe, far = spawn.Pipe()
        self._other = spawn.Process(target=_serve, args=(far, self.loss, self._shared), daemon=True)
        self._other.start()
        far.close()

    def __call__(self, *batch: torch.Tensor) -> dict[str, float]:
        """Set `.grad` to the mean gradient over the batch; returns the loss's numbers."""
        if self._other is None:
            gradients, numbers = _gradients(self.loss, list(batch))
        else:
            middle = len(batch[0]) // 2
            self._pipe.send([item[middle:].clone() for item in batch])
            gradients, numbers = _gradients(self.loss, [item[:middle] for item in batch])
            others = self._pipe.recv()
            gradients = [(a + b).mul_(0.5) for a, b in zip(gradients, self._shared, strict=True)]
            numbers = {name: (value + others[name]) / 2 for name, value in numbers.items()}
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return numbers

    def close(self) -> None:
        """End the second process."""
        if self._other is not None:
            self._pipe.close()
            self._other.join(5)


class _StopSignal:
    """Set by SIGTERM or Ctrl-C: the step is finished and saved before the training ends; asking twice ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def run(
    part: str,
    *,
    steps: int,
    state: Mapping[str, Any],
    step_fn: Callable[[int], dict[str, float]],
    checkpoint_seconds: float,
    identity: str,
    on_checkpoint: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> bool:
    """Run `step_fn(step)` up to `steps`, resuming from the part's checkpoint if its `identity` is the same.

    `state` holds everything with state_dict()/load_state_dict() that changes. The curve goes to `curve.csv`.
    Returns whether the end was reached (`stop_after` ends a run early, as a kill would, for tests).
    """
    from tqdm import tqdm

    folder = scratch(part)
    path = folder / "state.pt"
    first, curve = 0, []
    if path.is_file():
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["identity"] == identity:
            for name, item in state.items():
                item.load_state_dict(saved["state"][name])
            first, curve = saved["step"], saved["curve"]

    def save(step: int) -> None:
        content = {
            "identity": identity,
            "step": step,
            "curve": curve,
            "state": {name: item.state_dict() for name, item in state.items()},
        }
        with atomic_file(path) as temporary:
            torch.save(content, temporary)
        table = io.StringIO()
        if curve:
            writer = csv.DictWriter(table, fieldnames=list(curve[-1]), extrasaction="ignore")
            writer.writeheader()
            writer.writerows(curve)
        write_atomic(folder / "curve.csv", table.getvalue())
        if on_checkpoint is not None:
            on_checkpoint(step)

    stopping = _StopSignal()
    saved_at = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    end = steps if stop_after is None else min(steps, stop_after)
    bar = tqdm(range(first, end), initial=first, total=steps, desc=part, mininterval=5)
    for step in bar:
        for name, value in step_fn(step).items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
        if (step + 1) % 20 == 0:
            row = {"step": float(step + 1), **{name: value / count for name, value in sums.items()}}
            curve.append(row)
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name != "step"})
            sums, count = {}, 0
        if time.monotonic() - saved_at > checkpoint_seconds and step + 1 < end:
            save(step + 1)
            saved_at = time.monotonic()
        if stopping.asked and step + 1 < end:
            end = step + 1
            break
    stopping.restore()
    if first < end:
        save(end)
    elif on_checkpoint is not None:
        on_checkpoint(end)  # ended before: what it wrote may have been removed since
    return end == steps

"""The loop that every training of the base shares: a cosine schedule, a progress bar, checkpoints, exact resume."""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdiff.files import atomic_file, write_atomic

if TYPE_CHECKING:
    from svdiff.base.config import BaseTrainingConfig
    from svdiff.base.world import World


#: From a step's number to what it draws: tensors on the CPU.
Draw = Callable[[int], tuple[torch.Tensor, ...]]


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


def step_generator(seed: int, step: int, stream: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one step: what a step draws depends on its number alone, so resuming is exact."""
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step) * 16 + stream)


def device() -> torch.device:
    """The GPU where there is one. On a CPU one thread: two would wait for each other after every small operation."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        return torch.device("cuda")
    torch.set_num_threads(1)
    return torch.device("cpu")


def autocast(where: torch.device) -> torch.autocast:
    """bfloat16 where the machine multiplies it in hardware; elsewhere it is several times slower than float32."""
    able = torch.cpu.get_capabilities()
    fast = where.type == "cuda" or bool(able.get("amx_bf16") or able.get("avx512_bf16"))
    return torch.autocast(where.type, torch.bfloat16, enabled=fast)


class _Draws(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What each step draws, by its number."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.draw(step)


def _drawn(draw: Draw, steps: range, where: torch.device, workers: int) -> Iterable[Any]:
    """What the steps draw, in order; by `workers` processes ahead of a GPU."""
    ahead: dict[str, Any] = {}
    if workers and where.type == "cuda":
        # Forked, so that they share the world; they never touch the GPU.
        ahead = {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "fork", "pin_memory": True}
    return torch.utils.data.DataLoader(_Draws(draw), batch_size=None, sampler=steps, **ahead)


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
    draw: Draw,
    learn: Callable[..., dict[str, torch.Tensor]],
    config: BaseTrainingConfig,
    identity: str,
    on_checkpoint: Callable[[int], None] | None = None,
    stop_after: int | None = None,
) -> bool:
    """Run `learn(step, *draw(step))` up to `steps`, resuming from the part's checkpoint if its `identity` is the same.

    `draw` makes CPU tensors of a step's number alone; `learn` gets them on the device and returns numbers to log.
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
    sums: dict[str, Any] = {}
    count = 0
    where = device()
    end = steps if stop_after is None else min(steps, stop_after)
    draws = _drawn(draw, range(first, end), where, config.workers) if first < end else ()
    bar = tqdm(draws, initial=first, total=steps, desc=part, mininterval=5)
    for step, drawn in enumerate(bar, first):
        for name, value in learn(step, *(item.to(where, non_blocking=True) for item in drawn)).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
        count += 1
        if (step + 1) % 20 == 0:
            row = {"step": float(step + 1), **{name: float(value) / count for name, value in sums.items()}}
            curve.append(row)
            bar.set_postfix({name: f"{value:.4g}" for name, value in row.items() if name != "step"}, refresh=False)
            sums, count = {}, 0
        if time.monotonic() - saved_at > config.checkpoint_seconds and step + 1 < end:
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

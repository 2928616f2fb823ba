"""The most memory that each phase of a stage held, measured: of the GPU, or else of the process."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm.auto import tqdm

PROCESS = Path("/proc/self")


class Peaks:
    """Bytes held at most in each phase, by its name; of a phase that comes again and again the highest count."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure while the block runs; phases do not nest."""
        _forget()
        try:
            yield
        finally:
            self.bytes[name] = max(self.bytes.get(name, 0), _peak())

    def __str__(self) -> str:
        """One line for people."""
        phases = ", ".join(f"{name} {held / 2**30:.2f} GiB" for name, held in self.bytes.items())
        return f"most memory of the {'GPU' if _on_gpu() else 'process'}: {phases}"

    def say(self) -> None:
        """Print it, where something can be measured."""
        if any(self.bytes.values()):
            tqdm.write(str(self), file=sys.stderr)


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _forget() -> None:
    """Start to look for the peak anew."""
    if _on_gpu():
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # of proc(5): the peak is what is held now


def _peak() -> int:
    """Bytes held at most since `_forget`; 0 where nobody counts them."""
    if _on_gpu():
        import torch

        return torch.cuda.max_memory_allocated()
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", (PROCESS / "status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0

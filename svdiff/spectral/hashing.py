"""Which base a network is: the hash of all its weights, read once where they come from files."""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch import uint8 as byte

from svdiff.files import write_atomic

SETTLED = 2.0  # seconds: files younger than this may be written again without a trace in their times

Facts = list[tuple[str, int, int, int, int]]
_loaded: WeakKeyDictionary[nn.Module, _Files] = WeakKeyDictionary()


class _Files:
    """The files that a module was loaded from, and the tensors that they became."""

    def __init__(self, module: nn.Module, folder: Path, facts: Facts, how: str, cache: Path) -> None:
        self.folder, self.facts, self.tensors = folder, facts, _tensors(module)
        key = json.dumps([f"{type(module).__module__}.{type(module).__qualname__}", how, str(folder), facts])
        self.known = cache / hashlib.sha256(key.encode()).hexdigest()

    def still(self, module: nn.Module) -> bool:
        """Whether the module holds what the files held and hold."""
        return self.tensors == _tensors(module) and self.facts == file_facts(self.folder)

    def read(self) -> str | None:
        """The hash that was found when these files were loaded before."""
        with suppress(OSError):
            found = self.known.read_text()
            return found if re.fullmatch("[0-9a-f]{64}", found) else None
        return None


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over the sorted `(name, dtype, shape, bytes)` of the module's state dict: which base this is.

    All weights count, also for a delta that shifts a few of them: on a base that differs anywhere it would draw other
    pictures, and it is refused there. What `loaded_from` speaks of is read once as long as its files stay as they are
    (size, times and inode), and again as soon as a tensor is exchanged or written to. What is written through `tensor.data`,
    as fusing a LoRA does, leaves no trace in PyTorch, and is noticed by a few of the tensor's numbers.
    """
    files = _loaded.get(module)
    if files is not None and not files.still(module):
        del _loaded[module]
        files = None
    if files is not None and (known := files.read()):
        return known
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(raw_bytes(tensor))
    found = digest.hexdigest()
    if files is not None and files.still(module):  # weights may be mapped: they change when their file is written to
        with suppress(OSError):  # a scratch folder that we may only read
            write_atomic(files.known, found)
    return found


def loaded_from(module: nn.Module, folder: Path, how: str, since: float, cache: Path) -> None:
    """Note that a module's weights are, unchanged, those of the files in a folder, so that `weights_hash` need not read them.

    Args:
        module: where it will stay: the memory that its tensors take is noted.
        folder: absolute; all files from which weights and layout come.
        how: what else decides what the module holds: its precision, the versions of what loads it.
        since: seconds since the epoch when loading began; files that are younger count as changed meanwhile.
        cache: folder of known hashes.
    """
    facts = file_facts(folder)
    if facts and all(max(modified, changed) < (since - SETTLED) * 1e9 for _, _, modified, changed, _ in facts):
        _loaded[module] = _Files(module, folder, facts, how, cache)


def file_facts(folder: Path) -> Facts:
    """Name, size, times of change in nanoseconds (of content; of anything) and inode of each file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def _tensors(module: nn.Module) -> list[tuple[Any, ...]]:
    """What changes where a tensor of the state dict is exchanged or written to."""
    return [
        (name, t.data_ptr(), t.dtype, t.shape, None if t.is_inference() else t._version, _some_numbers(t))
        for name, t in module.state_dict(keep_vars=True).items()
    ]


def _some_numbers(tensor: Tensor) -> list[Any]:
    """Up to sixteen numbers, evenly spread."""
    flat = tensor.detach().flatten()
    found: list[Any] = [] if tensor.is_meta else flat[:: max(1, len(flat) // 16)][:16].tolist()
    return found


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order (no copy if it is a contiguous one in main memory)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(byte).numpy().data if flat.numel() else memoryview(b"")

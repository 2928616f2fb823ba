"""The cache of decompositions: a folder of mapped safetensors, addressed by the hash of the weights.

    <cache>/<base hash>/<weight name>.safetensors          u, sigma, vh, weight; checksums in the header
    <cache>/<base hash>/<weight name>.leading-k.safetensors   u, sigma, vh of the leading k directions
    <cache>/<base hash>/lock                               locked by the process that decomposes

Every file appears whole (renamed into place) and proves itself (checksums over its tensors), so an interrupted
decomposition goes on where it stopped and a truncated or edited file is made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file
from svdiff.spectral.basis import (
    ALGORITHM,
    Basis,
    Factors,
    factorise,
    factors_digest,
    full_rank,
    matrix_weights,
)
from svdiff.spectral.cpu import threads
from svdiff.spectral.hashing import weights_hash

_AT_ONCE = min(4, os.cpu_count() or 1)  # weights: each needs several times its own memory
Owners = dict[str, tuple[nn.Module, Tensor]]


def load_basis(
    module: nn.Module,
    cache: str | Path | None,
    *,
    names: Collection[str] | None = None,
    rank: int | None = None,
    base_hash: str | None = None,
    progress: bool = True,
) -> Basis:
    """The decomposition of the weights of `module` with two dimensions or more (Sec. 3.2), or of those in `names`.

    Computed once per set of weights and stored under `cache` as mapped files, safe for several processes at once;
    with `cache=None` it is computed in memory. `rank` finds the leading directions alone, in much less time.
    `base_hash` spares hashing the weights where their hash is known. Raises SvdiffError for weights on the meta
    device, quantised weights or weights that are not finite.
    """
    owners = {n: owner for n, owner in matrix_weights(module).items() if names is None or n in names}
    if base_hash is None and any(type(layer).__module__ == "svdiff.spectral.layers" for layer in module.modules()):
        raise SvdiffError("the model has spectral layers: detach them before decomposing it, or use their basis")
    for name, (_, weight) in owners.items():
        if weight.is_meta or not weight.is_floating_point():
            kind = "on the meta device" if weight.is_meta else f"of {weight.dtype}"
            raise SvdiffError(f"weight {name!r} is {kind}: load the model with real float weights to decompose it")
    base_hash = base_hash or weights_hash(module)
    if cache is None:
        bar = tqdm(owners.items(), "decomposing", disable=not progress)
        with threads(1):
            return Basis({name: _checked(name, *owner, rank) for name, owner in bar}, base_hash, rank)

    folder = Path(cache) / base_hash
    folder.mkdir(parents=True, exist_ok=True)
    found = _read_all(folder, owners, rank)
    if len(found) < len(owners):
        with FileLock(folder / "lock"):
            # Whoever had the lock before us has probably done the work.
            found |= _read_all(folder, {n: o for n, o in owners.items() if n not in found}, rank)
            missing = [name for name in owners if name not in found]
            found |= _make_all(folder, {name: owners[name] for name in missing}, rank, progress and bool(missing))
    with suppress(OSError):  # a cache that we may only read
        os.utime(folder)
    return Basis({name: found[name] for name in owners}, base_hash, rank)


def _make_all(folder: Path, owners: Owners, rank: int | None, progress: bool) -> dict[str, Factors]:
    """Decompose weights, several at once by one thread each: the factors are the same on any number of processors."""

    def make(name: str) -> Factors:
        path = _path(folder, name, owners[name], rank)
        _write(path, _checked(name, *owners[name], rank))
        made = _read(path, owners[name][1])
        if made is None:
            raise SvdiffError(f"{path} cannot be read back: is the disk full or failing?")
        return made

    with threads(1), ThreadPoolExecutor(_AT_ONCE, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            made = tqdm(pool.map(make, owners), "decomposing", len(owners), disable=not progress, unit="weight")
            return dict(zip(owners, made, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)


def _checked(name: str, owner: nn.Module, weight: Tensor, rank: int | None) -> Factors:
    if not torch.isfinite(weight).all():
        raise SvdiffError(f"weight {name!r} has values that are not finite: the base model is broken")
    return factorise(owner, weight, rank)


def _path(folder: Path, name: str, owner: tuple[nn.Module, Tensor], rank: int | None) -> Path:
    partial = rank is not None and rank < full_rank(*owner)
    return folder / (f"{name}.leading-{rank}.safetensors" if partial else f"{name}.safetensors")


def _write(path: Path, factors: Factors) -> None:
    metadata = {
        "algorithm": ALGORITHM,
        "factors_sha256": factors.digest,
        "fingerprint": repr(factors.fingerprint),
    }
    tensors = {"u": factors.u, "sigma": factors.sigma, "vh": factors.vh}
    if not factors.partial:
        tensors["weight"] = factors.base_weight().contiguous()
    with atomic_file(path, sync=False) as temporary:
        save_file({key: tensor.cpu() for key, tensor in tensors.items()}, temporary, metadata)


def _read(path: Path, weight: Tensor) -> Factors | None:
    """The mapped factors of `weight`, or None if the file is missing, broken, edited, or of another recipe."""
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            if metadata.get("algorithm") != ALGORITHM:
                return None
            u, sigma, vh = (stream.get_tensor(key) for key in ("u", "sigma", "vh"))
            # Mapped as long as the factors live: the file may be deleted meanwhile.
            source = stream.get_tensor("weight") if "weight" in stream.keys() else None  # noqa: SIM118
        digest, fingerprint = factors_digest(u, sigma, vh), float(metadata["fingerprint"])
        factors = Factors(u, sigma, vh, weight.shape, source, fingerprint, digest)
        sound = digest == metadata["factors_sha256"] and factors.partial == (source is None)
        return factors if sound and (source is None or _same_bits(_mapped_anew(path), weight)) else None
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None


def _mapped_anew(path: Path) -> Tensor:
    """The weight in a mapping that leaves memory with it, where it is read once and as a whole."""
    with safe_open(path, framework="pt") as stream:
        return stream.get_tensor("weight")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(bits), b.detach().cpu().contiguous().view(bits))


def _read_all(folder: Path, owners: Owners, rank: int | None) -> dict[str, Factors]:
    # Checksums are most of the time of a load, and hashlib lets other threads run.
    with ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 2))) as pool:
        read = pool.map(lambda n: (n, _read(_path(folder, n, owners[n], rank), owners[n][1])), owners)
        return {name: factors for name, factors in read if factors is not None}


@dataclass(frozen=True)
class CachedBasis:
    """One decomposed base in a cache."""

    base_hash: str
    weights: int
    bytes: int
    used: float  # seconds since the epoch, of the last load


def list_cache(cache: str | Path) -> list[CachedBasis]:
    """The decompositions under `cache`, most recently used first."""
    found = []
    for folder in Path(cache).glob("*") if Path(cache).is_dir() else []:
        # Hidden ones are being written.
        files = (
            [file for file in folder.glob("*.safetensors") if not file.name.startswith(".")] if folder.is_dir() else []
        )
        if files:
            size = sum(file.stat().st_size for file in files)
            found.append(CachedBasis(folder.name, len(files), size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def prune_cache(cache: str | Path, *, keep: int = 0) -> list[CachedBasis]:
    """Delete all but the `keep` most recently used decompositions; returns what is gone."""
    return [entry for entry in list_cache(cache)[keep:] if delete_cached(Path(cache) / entry.base_hash)]


def delete_cached(folder: Path) -> bool:
    """Delete a decomposition, unless a process is making it right now. Those that use it have its files mapped."""
    try:
        with FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder)
    except Timeout:
        return False
    return True

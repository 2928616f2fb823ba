"""A trained concept: spectral shifts by weight name, where they fit, and their arithmetic (Eq. 4 and 5)."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file, sort_safetensors_metadata
from svdiff.spectral.basis import Basis
from svdiff.spectral.tokens import MARK, mix_changes

FORMAT = "svdiff-spectral-delta"
FORMAT_VERSION = "1"

# How far fingerprints of one direction set may differ by rounding, see `basis.fingerprint`; other directions
# differ by about 1/sqrt(K), 1/36 for the largest weights of SD 1.x.
_SAME_DIRECTIONS = 1e-3


def metadata_key(prefix: str, what: str) -> str:
    """Metadata key of a fact about one part of the pipeline; those of the denoising network have no prefix."""
    return what if prefix in ("unet", "transformer") else f"{prefix}.{what}"


def identity(basis: Basis, prefix: str, names: Iterable[str]) -> dict[str, str]:
    """What a delta must remember of the basis that it was trained on."""
    prints = {name: basis[name].fingerprint for name in names if name in basis}
    facts = {"base_hash": basis.base_hash, "basis_id": basis.id, "fingerprints": _pack(prints)}
    if basis.rank is not None:
        facts["directions"] = str(basis.rank)  # of how many leading directions the fingerprints are
    return {metadata_key(prefix, what): value for what, value in facts.items()}


def _pack(prints: Mapping[str, float]) -> str:
    """Fingerprints in the order of their names."""
    values = [prints[name] for name in sorted(prints)]
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


@dataclass(frozen=True)
class SpectralDelta:
    """Shifts by name (`"unet.conv_in.weight"`, float32, one for a singular value or a norm's element).

    Metadata says what they fit (`base_hash`, `basis_id`) and where they come from (`subset`, `rank`, `config`,
    `created_by`, ...). Deltas are values: every operation returns a new one.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    """Changes of special tokens' embeddings, by `tokens.token_name`."""

    def __post_init__(self) -> None:
        for what in ("tensors", "tokens"):
            object.__setattr__(self, what, {k: v.detach().float().cpu() for k, v in getattr(self, what).items()})

    @classmethod
    def zeros(
        cls, sizes: Mapping[str, int], norms: Iterable[str], *, prefix: str = "unet", **metadata: str
    ) -> SpectralDelta:
        """No change at all, for weights with `sizes` shifts, of which `norms` are 1-D."""
        tensors = {f"{prefix}.{name}": torch.zeros(size) for name, size in sizes.items()}
        return cls(tensors, {"norms": json.dumps([f"{prefix}.{n}" for n in norms])} | metadata)

    # -- files ---------------------------------------------------------------------------------------------

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file, whole or not at all; `dtype` float32 or float16. Equal content, equal bytes."""
        content = self.to_bytes(dtype)
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
            sort_safetensors_metadata(temporary)

    def to_bytes(self, dtype: torch.dtype = torch.float32, *, provenance: bool = True) -> bytes:
        """The content of the file; without `provenance` only what is needed to read and combine shifts."""
        if dtype not in (torch.float32, torch.float16):
            raise SvdiffError(f"a delta is stored as float32 or float16, not {dtype}")
        tensors = {name: value.to(dtype).contiguous() for name, value in (self.tensors | self.tokens).items()}
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise SvdiffError(f"the shifts of {name!r} are not finite (or too large for {dtype}): not saved")
        metadata = self.metadata | {"format": FORMAT, "format_version": FORMAT_VERSION}
        if not provenance:
            metadata = {k: v for k, v in metadata.items() if k in ("format", "format_version", "norms")}
        return save(tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> SpectralDelta:
        """Read a delta file; raises SvdiffError if it is not one."""
        try:
            with safe_open(path, framework="pt") as stream:
                metadata = dict(stream.metadata() or {})
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise SvdiffError(f"there is no delta file {path}") from None
        except SafetensorError as error:
            raise SvdiffError(f"{path} is not a safetensors file, or is damaged: {error}") from None
        found = (metadata.get("format"), metadata.get("format_version"))
        if found != (FORMAT, FORMAT_VERSION):
            said = " ".join(filter(None, found)) or "nothing"
            raise SvdiffError(
                f"{path} is not a file of spectral shifts: its metadata says {said!r}, expected "
                f"'{FORMAT} {FORMAT_VERSION}' (for svdiff-pytorch's files there is `svdiff delta import`)"
            )
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise SvdiffError(f"{path}: the shifts of {name!r} are not finite; train again with lower rates")
        tokens = {name: tensors.pop(name) for name in list(tensors) if MARK in name}
        return cls(tensors, metadata, tokens)

    @property
    def hash(self) -> str:
        """SHA-256 of the shifts alone: equal for equal concepts, whatever their metadata."""
        digest = hashlib.sha256()
        for name, value in sorted((self.tensors | self.tokens).items()):
            digest.update(f"{name}\0{value.numel()}\0".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()

    # -- where it fits -------------------------------------------------------------------------------------

    def prefixes(self) -> list[str]:
        """Parts of the pipeline that it changes: `unet`, `text_encoder`."""
        return list(dict.fromkeys(name.partition(".")[0] for name in self.tensors))

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The shifts of one part by the names in that module."""
        return {n.removeprefix(f"{prefix}."): v for n, v in self.tensors.items() if n.startswith(f"{prefix}.")}

    def check(self, basis: Basis, prefix: str = "unet") -> None:
        """Raise SvdiffError unless it was trained on this base and these singular directions."""
        part = self.part(prefix)
        if not part:
            return
        self.check_base(basis.base_hash, prefix)
        if self.metadata.get(metadata_key(prefix, "basis_id")) != basis.id:
            self._check_directions(basis, prefix, part)

    def check_base(self, base_hash: str, prefix: str) -> None:
        """Raise SvdiffError unless it was trained on weights of this hash."""
        trained = self.metadata.get(metadata_key(prefix, "base_hash"))
        if trained != base_hash:
            raise SvdiffError(
                f"this delta was trained on a {prefix} with weights {str(trained)[:16]}, the model at hand has "
                f"{base_hash[:16]}: load the base that it was trained on, in the same precision"
            )

    def _check_directions(self, basis: Basis, prefix: str, part: Mapping[str, Tensor]) -> None:
        """Another machine's rounding makes another basis id; the directions must still be the same."""
        prints, trained = self.fingerprints(prefix), self.metadata.get(metadata_key(prefix, "basis_id"), "none")
        names = [name for name in part if name in basis]
        here = {name: basis[name].leading_fingerprint(self.directions(prefix)) for name in names}
        different = [n for n in names if n not in prints or not _near(prints[n], here[n])]
        if different or trained.partition(":")[0] != basis.id.partition(":")[0]:
            raise SvdiffError(
                f"this delta was trained on another decomposition of the same {prefix} ({trained}, this is "
                f"{basis.id}; {len(different)} of {len(names)} weights have other singular directions): use the "
                "cached basis that it was trained with, or train it again"
            )

    def directions(self, prefix: str) -> int | None:
        """How many leading directions its basis had; None for all."""
        found = self.metadata.get(metadata_key(prefix, "directions"))
        return None if found is None else int(found)

    def fingerprints(self, prefix: str) -> dict[str, float]:
        """Fingerprints of the singular directions of each weight, empty if the delta does not know them."""
        packed = base64.b64decode(self.metadata.get(metadata_key(prefix, "fingerprints"), ""))
        norms = self.norms
        names = sorted(name for name in self.part(prefix) if f"{prefix}.{name}" not in norms)
        if len(packed) != 4 * len(names):
            return {}
        return dict(zip(names, struct.unpack(f"<{len(names)}f", packed), strict=True))

    # -- arithmetic ----------------------------------------------------------------------------------------

    def __add__(self, other: SpectralDelta) -> SpectralDelta:
        """Eq. 4: `δ₁ + δ₂`; a weight that only one of them shifts keeps its shift."""
        return combine([(self, 1.0), (other, 1.0)])

    def __mul__(self, weight: float) -> SpectralDelta:
        """Scaling (Fig. 26)."""
        return combine([(self, weight)])

    __rmul__ = __mul__

    def map(self, change: Callable[[str, Tensor], Tensor], **metadata: str) -> SpectralDelta:
        """Apply `change(name, shifts)` to every tensor."""
        tensors = {n: change(n, v) for n, v in self.tensors.items()}
        return SpectralDelta(tensors, self.metadata | metadata, self.tokens)

    def limit_rank(self, rank: int) -> SpectralDelta:
        """Keep the shifts of the leading `rank` singular values of every weight; norms are kept whole.

        Which tensors are norms is written in the delta's metadata.
        """
        if rank < 0:
            raise SvdiffError(f"rank is {rank}, expected 0 or more")
        norms = self.norms

        def cut(name: str, shifts: Tensor) -> Tensor:
            return shifts if name in norms else torch.where(torch.arange(len(shifts)) < rank, shifts, 0.0)

        return self.map(cut, rank=str(rank))

    @property
    def norms(self) -> set[str]:
        """Names of shifts that belong to 1-D weights."""
        return set(json.loads(self.metadata.get("norms", "[]")))


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= _SAME_DIRECTIONS * max(1.0, abs(a))


def combine(parts: Iterable[tuple[SpectralDelta, float]]) -> SpectralDelta:
    """`Σ wᵢ δᵢ`: addition (Eq. 4), interpolation (Eq. 5), scaling (Fig. 26); `σ' = ReLU(σ + Σ wᵢ δᵢ)` follows.

    Raises SvdiffError for an empty list and for deltas of different bases.
    """
    weighted = list(parts)
    if not weighted:
        raise SvdiffError("nothing to combine: give at least one delta")
    _check_together([delta for delta, _ in weighted])
    total: dict[str, Tensor] = {}
    for delta, weight in weighted:
        for name, shifts in delta.tensors.items():
            total[name] = total[name] + weight * shifts if name in total else weight * shifts
    tokens = mix_changes([(delta.tokens, weight) for delta, weight in weighted])
    return _with_facts(total, tokens, [delta for delta, _ in weighted])


def _with_facts(tensors: dict[str, Tensor], tokens: dict[str, Tensor], parts: list[SpectralDelta]) -> SpectralDelta:
    """A delta made of others: facts on which they agree, and what is needed to know where it fits."""
    known = {key for part in parts for key in part.metadata}
    values = {key: {part.metadata[key] for part in parts if key in part.metadata} for key in known}
    facts = {key: found.pop() for key, found in values.items() if len(found) == 1}
    norms = set[str]().union(*(part.norms for part in parts)) & tensors.keys()
    facts["norms"] = json.dumps(sorted(norms))
    for prefix in dict.fromkeys(name.partition(".")[0] for name in tensors):
        prints = {name: print_ for part in reversed(parts) for name, print_ in part.fingerprints(prefix).items()}
        facts[metadata_key(prefix, "fingerprints")] = _pack(
            {n: p for n, p in prints.items() if f"{prefix}.{n}" in tensors}
        )
        if (key := metadata_key(prefix, "basis_id")) in known:
            # Another machine's rounding makes another id of the same directions: the first one stands.
            facts[key] = next(part.metadata[key] for part in parts if key in part.metadata)
    return SpectralDelta(tensors, facts, tokens)


def _check_together(parts: list[SpectralDelta]) -> None:
    """Raise SvdiffError unless all are shifts of one basis, of equal sizes."""
    for a, b in combinations(parts, 2):
        for prefix in set(a.prefixes()) & set(b.prefixes()):
            left, right = (d.metadata.get(metadata_key(prefix, "base_hash")) for d in (a, b))
            if left != right:
                raise SvdiffError(f"deltas of different bases do not add up: the {prefix} is {left} and {right}")
            ranks = [d.directions(prefix) for d in (a, b)]
            if ranks[0] != ranks[1]:
                known = " and ".join("all" if rank is None else str(rank) for rank in ranks)
                raise SvdiffError(
                    f"deltas that were trained on {known} singular directions of the {prefix} do not become one file; pictures "
                    "of both: `svdiff sample --delta A --delta B`"
                )
            if a.metadata.get(metadata_key(prefix, "basis_id")) != b.metadata.get(metadata_key(prefix, "basis_id")):
                mine, theirs = a.fingerprints(prefix), b.fingerprints(prefix)
                far = [name for name in mine.keys() & theirs.keys() if not _near(mine[name], theirs[name])]
                if far or not (mine and theirs):
                    raise SvdiffError(f"deltas of different decompositions of the {prefix} do not add up")
        for name in a.tensors.keys() & b.tensors.keys():
            sizes = len(a.tensors[name]), len(b.tensors[name])
            if sizes[0] != sizes[1]:
                raise SvdiffError(f"{name!r} has {sizes[0]} shifts in one delta, {sizes[1]} in the other")


def interpolate(a: SpectralDelta, b: SpectralDelta, alpha: float) -> SpectralDelta:
    """Eq. 5: `α δ₁ + (1 − α) δ₂`; alpha 1 is `a`, alpha 0 is `b`."""
    return combine([(a, alpha), (b, 1 - alpha)])


def mix_by_layer(a: SpectralDelta, b: SpectralDelta, takes_a: Callable[[str], bool]) -> SpectralDelta:
    """Style mixing (Fig. 10): layers for which `takes_a(name)` from `a`, the rest from `b`."""
    _check_together([a, b])
    tensors = {n: v for n, v in a.tensors.items() if takes_a(n)}
    tensors |= {n: v for n, v in b.tensors.items() if not takes_a(n)}
    return _with_facts(tensors, b.tokens | a.tokens, [a, b])


def cosine_similarity(a: SpectralDelta, b: SpectralDelta) -> dict[str, float]:
    """Cosine of the two shifts in each layer that both have (Fig. 9a takes the mean); 0 where one is all zero."""
    common = [name for name in a.tensors if name in b.tensors]
    return {n: float(torch.cosine_similarity(a.tensors[n].double(), b.tensors[n].double(), dim=0)) for n in common}

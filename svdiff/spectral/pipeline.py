"""Concepts on a live pipeline, with the verbs of diffusers and PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import Basis, matrix_weights
from svdiff.spectral.cache import load_basis
from svdiff.spectral.delta import SpectralDelta
from svdiff.spectral.hashing import weights_hash
from svdiff.spectral.shifts import SpectralShifts
from svdiff.spectral.subsets import weights as weights_of
from svdiff.spectral.tokens import LoadedTokens

Mix = str | Mapping[str, float] | None
"""What a picture shows: a delta's name, several with weights, or None for the base."""


class SpectralPipeline:
    """Any number of concepts on one diffusers pipeline, switched by copying some hundred kilobytes.

        personal = SpectralPipeline(pipe, cache=".svdiff/bases")
        personal.load_delta("teapot.safetensors", "teapot")
        personal.load_delta("cat.safetensors", "cat")
        personal.set_deltas({"teapot": 1.0, "cat": 0.5})   # σ' = ReLU(σ + Σ wᵢ δᵢ), Eq. 4
        pipe("a sks teapot")
        with personal.concepts(["teapot", {"teapot": 0.7, "cat": 0.3}, None]):
            pipe(["a sks teapot", "a sks teapot", "a teapot"])    # each picture its own concept, in one batch
        personal.fuse()                                    # at the base's speed
        personal.unload()                                  # the base again, bit for bit

    The pipeline must hold the weights that the deltas were trained on, in that precision; cast it afterwards
    (`pipe.to(torch.float16)`), the shifts stay in float32. `rank` leaves W in memory and takes deltas of that rank at
    most, as it is for deltas that were trained on a basis of leading directions; `bases` are decompositions that exist
    already, as those of a base that was quantised afterwards.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        cache: str | Path | None = None,
        rank: int | None = None,
        bases: Mapping[str, Basis] | None = None,
        progress: bool = True,
    ) -> None:
        self.pipe, self._cache, self._rank, self._progress = pipe, cache, rank, progress
        self._bases: dict[str, Basis] = dict(bases or {})
        self._shifts: dict[str, SpectralShifts] = {}
        self._attention: dict[str, list[Any]] = {}  # layers whose projections diffusers can fuse
        # By name and part of the pipeline: all shifts in one row, see `SpectralShifts.pack`.
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._active: dict[str, float] = {}
        self._mixing = False
        self._tokens = LoadedTokens(pipe)

    @property
    def deltas(self) -> list[str]:
        """Names of the loaded deltas."""
        return list(self._rows)

    @property
    def active(self) -> dict[str, float]:
        """Names and weights of the deltas in force."""
        return dict(self._active)

    @property
    def fused(self) -> bool:
        """Whether the active deltas are in plain weights."""
        return any(shifts.fused for shifts in self._shifts.values())

    def load_delta(self, source: SpectralDelta | str | Path, name: str) -> None:
        """Load a delta under a name, without changing which are active, unless it is the first.

        Raises SvdiffError for a name in use, another base, or a pipeline without the parts that it changes.
        """
        if name in self._rows:
            raise SvdiffError(f"a delta named {name!r} is loaded already: delete it first or choose another name")
        self._refuse("loading another delta")
        delta = source if isinstance(source, SpectralDelta) else SpectralDelta.load(source)
        with self._as_before_on_failure():
            for prefix in self.bases_of(delta):
                self._cover(prefix, delta.part(prefix))
            self._tokens.load(name, delta.tokens)
            self._rows[name] = {prefix: self._shifts[prefix].pack(delta.part(prefix)) for prefix in delta.prefixes()}
        self.set_deltas({name: 1.0} if len(self._rows) == 1 else self._active)

    @contextmanager
    def _as_before_on_failure(self) -> Iterator[None]:
        """What was loaded draws as it did, where the block fails: a full memory or disk, a delta that does not fit after all."""
        bases, rows = dict(self._bases), {name: dict(of) for name, of in self._rows.items()}
        sizes = {prefix: dict(shifts.sizes) for prefix, shifts in self._shifts.items()}
        changes, shifts = dict(self._tokens.changes), dict(self._shifts)
        try:
            yield
        except BaseException:
            self._bases, self._rows, self._tokens.changes = bases, rows, changes
            for prefix in {*sizes, *self._shifts}:
                if self._shifts.get(prefix) is not shifts.get(prefix):
                    self._release(prefix)
                    if prefix in sizes:
                        self._attach(prefix, list(sizes[prefix]), sizes[prefix])
            self.set_deltas(self._active)
            raise

    def set_deltas(self, names: str | Sequence[str] | Mapping[str, float], weights: Any = None) -> None:
        """Choose the active deltas: `{"a": 0.5, "b": 1}`, or names with a weight, or one weight for each.

        No name at all is the base. Costs a copy of the shifts, whatever the model's size.
        """
        chosen = _weights(names, weights)
        self._check_known(chosen)
        self._refuse("choosing deltas")
        for prefix, shifts in self._shifts.items():
            shifts.write(self._mixed(prefix, [chosen])[0])
        self._tokens.use([chosen])
        self._active = chosen

    @contextmanager
    def concepts(self, pictures: Sequence[Mix]) -> Iterator[Any]:
        """Draw a batch in which each picture has its own concept; afterwards what was active is so again.

        `pictures` has an entry for each picture, in the order of the batch (with several pictures a prompt, as often
        each). Guidance and the text encoder are taken care of. The pictures are those of batches of one concept.
        """
        mixes = [_weights(() if mix is None else mix, None) for mix in pictures]
        if not mixes:
            raise SvdiffError("no picture is asked for: give one concept a picture")
        for mix in mixes:
            self._check_known(mix)
        self._refuse("drawing several concepts")
        distinct: list[dict[str, float]] = []
        for mix in mixes:
            if mix not in distinct:
                distinct.append(mix)
        index = [distinct.index(mix) for mix in mixes]
        try:
            for prefix, shifts in self._shifts.items():
                shifts.write(self._mixed(prefix, distinct), index)
            self._tokens.use(distinct, index)
            self._mixing = True
            yield self.pipe
        finally:
            self._mixing = False
            self.set_deltas(self._active)

    def delete_delta(self, name: str) -> None:
        """Forget a delta; if it was active, the others stay so."""
        self._check_known([name])
        self._refuse("deleting a delta")
        del self._rows[name]
        self._tokens.forget(name)
        self.set_deltas({n: w for n, w in self._active.items() if n != name})

    def fuse(self) -> None:
        """Put the active deltas into plain weights: no spectral layer is left, sampling has the base's speed."""
        if not self.fused:
            self._refuse("fusing")
        for shifts in self._shifts.values():
            shifts.fuse()
        self._tokens.fuse()

    def unfuse(self) -> None:
        """Undo `fuse`: spectral layers again, with the same deltas active."""
        self._tokens.unfuse()
        for shifts in self._shifts.values():
            shifts.unfuse()
        self._tokens.follow()

    def unload(self) -> None:
        """Forget all deltas and give the pipeline back as it was, bit for bit."""
        self._tokens.unload()
        for shifts in self._shifts.values():
            shifts.detach()
        self._shifts, self._rows, self._active = {}, {}, {}

    def bases_of(self, delta: SpectralDelta) -> dict[str, Basis]:
        """The decomposition of each part of the pipeline that a delta changes.

        Raises SvdiffError for another base, or a pipeline without such a part, before minutes of decomposition.
        """
        for prefix in delta.prefixes():
            delta.check_base(self._base_hash(prefix), prefix)
        bases = {p: self.basis(p, delta.part(p), rank=delta.directions(p)) for p in delta.prefixes()}
        for prefix, basis in bases.items():
            delta.check(basis, prefix)
        return bases

    def basis(self, prefix: str, names: Iterable[str] | None = None, *, rank: int | None = None) -> Basis:
        """The decomposition of one part of the pipeline, or of `names` at least: computed or read when asked for.

        `rank` finds the leading directions alone, where no more of them are here yet.
        """
        if (known := self._bases.get(prefix)) and known.rank is not None and (rank is None or rank > known.rank):
            self._deepen(prefix, rank)
        module, known = self._module(prefix), self._bases.get(prefix)
        asked = None if names is None else set(names)
        missing = {
            n for n in matrix_weights(module) if (asked is None or n in asked) and (known is None or n not in known)
        }
        if known is None or missing:
            self._tokens.remove()  # which base it is, does not depend on them
            try:
                more = load_basis(
                    module,
                    self._cache,
                    names=missing,
                    rank=rank if known is None else known.rank,
                    base_hash=known.base_hash if known else None,
                    progress=self._progress,
                )
            finally:
                self._tokens.follow()
            self._bases[prefix] = Basis({**(known or {}), **more}, more.base_hash, more.rank)
        return self._bases[prefix]

    def _base_hash(self, prefix: str) -> str:
        """Which weights a part of the pipeline has, whatever is on them."""
        if known := self._bases.get(prefix):
            return known.base_hash
        self._tokens.remove()
        try:
            return weights_hash(self._module(prefix))
        finally:
            self._tokens.follow()

    def _module(self, prefix: str) -> nn.Module:
        module = getattr(self.pipe, prefix, None)
        if not isinstance(module, nn.Module):
            raise SvdiffError(
                f"the delta changes the {prefix!r} of a pipeline, and this {type(self.pipe).__name__} has none: "
                "it was trained for another architecture"
            )
        return getattr(module, "_orig_mod", module)  # `torch.compile` puts a module around it

    def _cover(self, prefix: str, names: Mapping[str, object]) -> None:
        """Attach the weights that a delta shifts, and no others: the rest keeps the base's speed."""
        attached = self._shifts.get(prefix)
        known = set(attached.layers) if attached else set()
        if set(names) <= known:
            return
        module = self._module(prefix)
        wanted = [name for name in weights_of(module) if name in known or name in names]
        missing = sorted(set(names) - set(wanted))
        if missing:
            raise SvdiffError(f"the delta shifts {missing[0]!r}, which the pipeline's {prefix} does not have")
        self._attach(prefix, wanted, self._release(prefix))

    def _deepen(self, prefix: str, rank: int | None) -> None:
        """In the place of a basis of leading directions one of `rank`, or of all; what is loaded stays so."""
        loaded = self._release(prefix)
        known = self._bases.pop(prefix)
        self.basis(prefix, known, rank=rank)
        if loaded:
            self._attach(prefix, list(loaded), loaded)

    def _release(self, prefix: str) -> dict[str, int]:
        """Give a part of the pipeline its own layers back; returns how many shifts each weight had."""
        attached = self._shifts.pop(prefix, None)
        sizes = {} if attached is None else dict(attached.sizes)
        if attached:
            attached.detach()
            self._tokens.follow()
        return sizes

    def _attach(self, prefix: str, wanted: list[str], before: Mapping[str, int]) -> None:
        """Attach weights, and lay the rows of loaded deltas out for them; `before` are the sizes that these have now."""
        module, basis = self._module(prefix), self.basis(prefix, wanted, rank=self._rank_of(prefix))
        shifts = SpectralShifts(module, basis, names=wanted, rank=self._rank or basis.rank, prefix=prefix)
        self._shifts[prefix] = shifts
        self._tokens.follow()
        self._attention[prefix] = [layer for layer in module.modules() if hasattr(layer, "fused_projections")]
        for rows in self._rows.values():
            if prefix in rows:
                parts = zip(before, rows[prefix].split(list(before.values())), strict=True)
                rows[prefix] = shifts.pack({name: _padded(part, shifts, name) for name, part in parts})

    def _rank_of(self, prefix: str) -> int | None:
        """How many leading directions the basis has; None for all, or where there is none yet."""
        return self._bases[prefix].rank if prefix in self._bases else None

    def _mixed(self, prefix: str, mixes: Sequence[Mapping[str, float]]) -> Tensor:
        """`Σ wᵢ δᵢ` of each mix, a row each."""
        shifts = self._shifts[prefix]
        mixed = torch.zeros(len(mixes), sum(shifts.sizes.values()))
        for total, mix in zip(mixed, mixes, strict=True):
            for name, weight in mix.items():
                if (row := self._rows[name].get(prefix)) is not None:
                    total.add_(row, alpha=weight)
        return mixed

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self._rows]
        if unknown:
            raise SvdiffError(f"no delta named {unknown[0]!r} is loaded; there are {self.deltas or 'none'}")

    def _refuse(self, action: str) -> None:
        """Refuse what would have no effect on the pictures, or another than it says."""
        if self._mixing:
            raise SvdiffError(f"a batch of several concepts is being drawn: leave `with ….concepts(…)` before {action}")
        if self.fused:
            raise SvdiffError(f"the active deltas are fused into the weights: unfuse before {action}")
        for prefix, shifts in self._shifts.items():
            if self._module(prefix) is not shifts.module:
                raise SvdiffError(
                    f"the pipeline's {prefix} is another than the one that the deltas were loaded on: put that back, or "
                    "make a new SpectralPipeline"
                )
            if any(_computes_fused(layer) for layer in self._attention[prefix]):
                raise SvdiffError(
                    f"the projections of the pipeline's {prefix} are fused, which holds the present shifts fast: "
                    f"unfuse_qkv_projections() before {action}"
                )


def _padded(part: Tensor, shifts: SpectralShifts, name: str) -> Tensor:
    """The shifts of one weight, with zeros for the singular values that they do not reach."""
    return nn.functional.pad(part, (0, shifts.layers[name].full_size - len(part)))


def _computes_fused(attention: Any) -> bool:
    """Whether an attention layer of diffusers multiplies by one weight of its own in the place of ours."""
    # In its older class unfusing exchanges the processor and leaves the flag as it is.
    older = type(attention).__module__.endswith("attention_processor")
    return attention.fused_projections and (not older or "Fused" in type(attention.processor).__name__)


def _weights(names: str | Sequence[str] | Mapping[str, float], weights: Any) -> dict[str, float]:
    if isinstance(names, Mapping):
        return {name: float(weight) for name, weight in names.items()}
    names = [names] if isinstance(names, str) else list(names)
    if weights is None or isinstance(weights, int | float):
        weights = [1.0 if weights is None else weights] * len(names)
    if len(weights) != len(names):
        raise SvdiffError(f"{len(names)} deltas but {len(weights)} weights: give one for each")
    return {name: float(weight) for name, weight in zip(names, weights, strict=True)}

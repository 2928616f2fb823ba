"""Concepts on a live pipeline, with the verbs of diffusers and PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import Basis
from svdiff.spectral.cache import load_basis
from svdiff.spectral.delta import SpectralDelta, combine
from svdiff.spectral.shifts import SpectralShifts
from svdiff.spectral.tokens import LoadedTokens


class SpectralPipeline:
    """Several concepts on one diffusers pipeline, switched by copying some hundred kilobytes.

        concepts = SpectralPipeline(pipe, cache=".svdiff/bases")
        concepts.load_delta("teapot.safetensors", "teapot")
        concepts.load_delta("cat.safetensors", "cat")
        concepts.set_deltas({"teapot": 1.0, "cat": 0.5})   # σ' = ReLU(σ + Σ wᵢ δᵢ), Eq. 4
        pipe("a sks teapot")
        concepts.fuse()                                    # at the base's speed
        concepts.unload()                                  # the base again, bit for bit

    The pipeline must hold the weights that the deltas were trained on, in that precision; cast it afterwards
    (`pipe.to(torch.float16)`), the shifts stay in float32.
    """

    def __init__(self, pipe: Any, *, cache: str | Path | None = None, progress: bool = True) -> None:
        self.pipe, self._cache, self._progress = pipe, cache, progress
        self._bases: dict[str, Basis] = {}
        self._shifts: dict[str, SpectralShifts] = {}
        self._deltas: dict[str, SpectralDelta] = {}
        self._active: dict[str, float] = {}
        self._tokens = LoadedTokens(pipe)

    @property
    def deltas(self) -> list[str]:
        """Names of the loaded deltas."""
        return list(self._deltas)

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
        if name in self._deltas:
            raise SvdiffError(f"a delta named {name!r} is loaded already: delete it first or choose another name")
        self._refuse_fused("loading another delta")
        delta = source if isinstance(source, SpectralDelta) else SpectralDelta.load(source)
        for prefix in delta.prefixes():
            delta.check(self.basis(prefix), prefix)
        for prefix in delta.prefixes():
            self._cover(prefix, delta.part(prefix))
        self._deltas[name] = delta
        self._tokens.load(name, delta.tokens)
        self.set_deltas({name: 1.0} if len(self._deltas) == 1 else self._active)

    def set_deltas(self, names: str | Sequence[str] | Mapping[str, float], weights: Any = None) -> None:
        """Choose the active deltas: `{"a": 0.5, "b": 1}`, or names with a weight, or one weight for each.

        No name at all is the base. Costs a copy of the shifts, whatever the model's size.
        """
        chosen = _weights(names, weights)
        unknown = [name for name in chosen if name not in self._deltas]
        if unknown:
            raise SvdiffError(f"no delta named {unknown[0]!r} is loaded; there are {self.deltas or 'none'}")
        self._refuse_fused("choosing deltas")
        total = combine((self._deltas[n], w) for n, w in chosen.items()) if chosen else SpectralDelta({})
        for prefix, shifts in self._shifts.items():
            shifts.set(total.part(prefix))
        self._tokens.use([chosen])
        self._active = chosen

    def delete_delta(self, name: str) -> None:
        """Forget a delta; if it was active, the others stay so."""
        if name not in self._deltas:
            raise SvdiffError(f"no delta named {name!r} is loaded; there are {self.deltas or 'none'}")
        self._refuse_fused("deleting a delta")
        del self._deltas[name]
        self._tokens.forget(name)
        self.set_deltas({n: w for n, w in self._active.items() if n != name})

    def fuse(self) -> None:
        """Put the active deltas into plain weights: no spectral layer is left, sampling has the base's speed."""
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
        self._shifts, self._deltas, self._active = {}, {}, {}

    def basis(self, prefix: str) -> Basis:
        """The decomposition of one part of the pipeline, computed or read when first asked for."""
        if prefix not in self._bases:
            module = getattr(self.pipe, prefix, None)
            if not isinstance(module, nn.Module):
                raise SvdiffError(
                    f"the delta changes the {prefix!r} of a pipeline, and this {type(self.pipe).__name__} has none: "
                    "it was trained for another architecture"
                )
            self._bases[prefix] = load_basis(module, self._cache, progress=self._progress)
        return self._bases[prefix]

    def _cover(self, prefix: str, names: Mapping[str, object]) -> None:
        """Attach the weights that a delta shifts, and no others: the rest keeps the base's speed."""
        attached = self._shifts.get(prefix)
        known = set(attached.layers) if attached else set()
        if set(names) <= known:
            return
        if attached:
            attached.detach()
        module: nn.Module = getattr(self.pipe, prefix)
        wanted = [name for name in self._order(module) if name in known or name in names]
        missing = sorted(set(names) - set(wanted))
        if missing:
            raise SvdiffError(f"the delta shifts {missing[0]!r}, which the pipeline's {prefix} does not have")
        self._shifts[prefix] = SpectralShifts(module, self.basis(prefix), names=wanted, prefix=prefix)
        self._tokens.follow()

    @staticmethod
    def _order(module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_parameters()]

    def _refuse_fused(self, action: str) -> None:
        if self.fused:
            raise SvdiffError(f"the active deltas are fused into the weights: unfuse before {action}")


def _weights(names: str | Sequence[str] | Mapping[str, float], weights: Any) -> dict[str, float]:
    if isinstance(names, Mapping):
        return dict(names)
    names = [names] if isinstance(names, str) else list(names)
    if weights is None or isinstance(weights, int | float):
        weights = [1.0 if weights is None else weights] * len(names)
    if len(weights) != len(names):
        raise SvdiffError(f"{len(names)} deltas but {len(weights)} weights: give one for each")
    return {name: float(weight) for name, weight in zip(names, weights, strict=True)}

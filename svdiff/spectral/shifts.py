"""Attaching spectral shifts to a model, in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from svdiff import __version__
from svdiff.errors import SvdiffError
from svdiff.spectral.basis import Basis, Factors, is_matrix
from svdiff.spectral.delta import SpectralDelta, identity, metadata_key
from svdiff.spectral.layers import SpectralLayer, SpectralMatrix, make_layer
from svdiff.spectral.memory import trim
from svdiff.spectral.subsets import select


def attach(
    module: nn.Module, basis: Basis, *, subset: str = "UNet", rank: int | None = None, prefix: str = "unet"
) -> SpectralShifts:
    """Swap the layers of `subset` for spectral ones with zero shifts, which compute the same function.

    All parameters of the base are frozen. `rank` trains the leading singular values' shifts only (Fig. 25);
    `prefix` names the model in delta files (`"unet"`, `"text_encoder"`). `basis` must come from
    `load_basis(module, ...)`. Raises SvdiffError for a basis of other weights, unknown subsets, unsupported layers.
    """
    return SpectralShifts(module, basis, subset=subset, rank=rank, prefix=prefix)


class SpectralShifts:
    """The shifts of an attached model: float32 parameters by weight name, and the way back."""

    def __init__(
        self,
        module: nn.Module,
        basis: Basis,
        *,
        subset: str = "UNet",
        rank: int | None = None,
        prefix: str = "unet",
        names: Iterable[str] | None = None,
    ) -> None:
        """As `attach`; `names` lists the weights where no subset describes them."""
        if rank is not None and rank < 1:
            raise SvdiffError(f"rank is {rank}, expected at least 1, or None for all singular values")
        if any(isinstance(layer, SpectralLayer) for layer in module.modules()):
            raise SvdiffError("the model has spectral layers already: detach them first")
        self.module, self.basis, self.subset, self.rank, self.prefix = module, basis, subset, rank, prefix
        self.layers: dict[str, SpectralLayer] = {}
        self.fused = False
        chosen = select(module, subset) if names is None else list(names)
        if "weight" in chosen:
            raise SvdiffError(f"a {type(module).__name__} is one layer: wrap it in nn.Sequential to attach shifts")
        owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in chosen}
        for name, owner in owners.items():
            weight: Tensor = owner.weight  # type: ignore[assignment]
            factors = basis[name] if is_matrix(owner) else None
            if factors is not None:
                _check_same(name, weight, factors)
            self.layers[name] = make_layer(name, owner, factors, rank)
        self._trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        module.requires_grad_(False)
        self._swap_in()

    def _swap_in(self) -> None:
        for name, layer in self.layers.items():
            _replace(self.module, name, layer)
            # From here on the weight is kept by the basis (on disk, with a cache) and not in memory.
            layer.original._parameters["weight"] = None
        trim()

    def _swap_out(self, weight_of: Callable[[SpectralLayer], Tensor]) -> None:
        for name, layer in self.layers.items():
            original = layer.original
            original._parameters["weight"] = nn.Parameter(weight_of(layer), requires_grad=False)
            if "bias" in original._parameters:
                original._parameters["bias"] = layer.bias
            original.train(layer.training)
            _replace(self.module, name, original)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(weight name, shift)`: shifts of `min(M, N)` singular values, or of a norm's elements."""
        for name, layer in self.layers.items():
            yield name, layer.delta

    def parameters(self) -> list[nn.Parameter]:
        """All shifts."""
        return [layer.delta for layer in self.layers.values()]

    def parameters_spectral(self) -> list[nn.Parameter]:
        """Shifts of singular values (of 2-D and 4-D weights)."""
        return [layer.delta for layer in self.layers.values() if isinstance(layer, SpectralMatrix)]

    def parameters_1d(self) -> list[nn.Parameter]:
        """Shifts of norm weights, which the paper gives a learning rate of their own."""
        return [layer.delta for layer in self.layers.values() if not isinstance(layer, SpectralMatrix)]

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of every shift by weight name."""
        return {name: shift.detach().clone() for name, shift in self.named_parameters()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set every shift; the names and sizes must be exactly those of `state_dict()`."""
        if state.keys() != self.layers.keys():
            different = sorted(state.keys() ^ self.layers.keys())
            raise SvdiffError(f"{len(different)} names of the state differ from the model's, such as {different[0]!r}")
        self.set(state)

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor]) -> None:
        """Set shifts by weight name, without a check of their origin; the weights not named go back to zero."""
        if self.fused:
            raise SvdiffError("the shifts are fused into the weights: unfuse before changing them")
        for name, value in values.items():
            shift = self.layers[name].delta
            if value.shape != shift.shape:
                raise SvdiffError(f"{name!r} has {tuple(value.shape)} shifts, expected {tuple(shift.shape)}")
        for name, layer in self.layers.items():
            if name in values:
                layer.delta.copy_(values[name])
            else:
                layer.delta.zero_()

    def delta(self, **metadata: str) -> SpectralDelta:
        """The current shifts as a delta, with what is needed to know where it fits."""
        tensors = {f"{self.prefix}.{name}": value for name, value in self.state_dict().items()}
        norms = [f"{self.prefix}.{n}" for n, layer in self.layers.items() if not isinstance(layer, SpectralMatrix)]
        known = {
            metadata_key(self.prefix, "subset"): self.subset,
            "rank": "full" if self.rank is None else str(self.rank),
            "norms": json.dumps(norms),
            "created_by": f"svdiff {__version__}, torch {torch.__version__}",
        }
        return SpectralDelta(tensors, known | identity(self.basis, self.prefix, list(self.layers)) | metadata)

    def load(self, delta: SpectralDelta) -> None:
        """Set the shifts to those of `delta`; weights of the subset that it does not have go back to zero.

        Raises SvdiffError if it was trained on another base, or has weights that are not attached.
        """
        delta.check(self.basis, self.prefix)
        values = delta.part(self.prefix)
        strange = [name for name in values if name not in self.layers]
        if strange:
            raise SvdiffError(
                f"the delta shifts {len(strange)} weights outside the attached subset {self.subset!r}, such as "
                f"{strange[0]!r}: attach subset {delta.metadata.get('subset', 'UNet')!r}"
            )
        self.set(values)

    def zero(self) -> None:
        """Set all shifts to zero: the base model's function."""
        self.set({})

    def fuse(self) -> None:
        """Put plain layers with the shifted weights in place: no spectral layer is left, nothing to pay for."""
        if not self.fused:
            self._swap_out(lambda layer: layer.shifted_weight())
            self.fused = True

    def unfuse(self) -> None:
        """Undo `fuse`: the spectral layers again, with the same shifts."""
        if self.fused:
            self._follow()
            self._swap_in()
            self.fused = False

    def detach(self) -> None:
        """Put the original layers back, with the base's weights bit for bit; the shifts are gone."""
        if self.fused:
            self._follow()
        self._swap_out(lambda layer: layer.base_weight().clone())
        self.layers, self.fused = {}, False
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._trained)

    def _follow(self) -> None:
        """Move the layers that were out of the model to where it has gone since, and to its dtype."""
        for layer in self.layers.values():
            weight: Tensor = layer.original.weight  # type: ignore[assignment]
            layer.to(weight.device, weight.dtype)


def _check_same(name: str, weight: Tensor, factors: Factors) -> None:
    """Raise SvdiffError unless a basis fits a weight: by shape, and by 64 of its numbers."""
    if factors.shape != weight.shape:
        raise SvdiffError(
            f"{name!r} has shape {tuple(weight.shape)} but {tuple(factors.shape)} in the basis: "
            "it was made for another model"
        )
    every = max(1, weight.numel() // 64)
    mine, theirs = (w.detach().reshape(-1)[::every].to(weight) for w in (weight, factors.base_weight()))
    if not torch.equal(mine, theirs):
        raise SvdiffError(f"{name!r} is not the weight in the basis: it was made for other weights of this model")


def _replace(module: nn.Module, weight_name: str, layer: nn.Module) -> None:
    path = weight_name.rpartition(".")[0]
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)

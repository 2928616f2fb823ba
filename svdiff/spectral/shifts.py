"""Attaching spectral shifts to a model, in place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from svdiff import __version__
from svdiff.errors import SvdiffError
from svdiff.spectral.basis import TRANSPOSED, Basis, Factors, is_matrix
from svdiff.spectral.batch import Batch
from svdiff.spectral.cpu import trim
from svdiff.spectral.decompose import as_matrix
from svdiff.spectral.delta import SpectralDelta, identity, metadata_key
from svdiff.spectral.layers import SpectralLayer, SpectralMatrix, is_quantised, make_layer
from svdiff.spectral.subsets import select


def attach(
    module: nn.Module,
    basis: Basis,
    *,
    subset: str = "UNet",
    rank: int | None = None,
    concepts: int | None = None,
    prefix: str = "unet",
) -> SpectralShifts:
    """Swap the layers of `subset` for spectral ones with zero shifts, which compute the same function.

    All parameters of the base are frozen. `rank` shifts the leading singular values only (Fig. 25), and W stays in
    memory beside that many directions. `concepts` makes shifts of shape `(concepts, K)`, which train or draw as one
    batch: `assign` says which picture takes which. `prefix` names the model in delta files (`"unet"`,
    `"text_encoder"`). `basis` must come from `load_basis(module, ...)`. Raises SvdiffError for a basis of other
    weights, unknown subsets, unsupported layers.
    """
    return SpectralShifts(module, basis, subset=subset, rank=rank, concepts=concepts, prefix=prefix)


class SpectralShifts:
    """The shifts of an attached model: float32 parameters by weight name, and the way back."""

    def __init__(
        self,
        module: nn.Module,
        basis: Basis,
        *,
        subset: str = "UNet",
        rank: int | None = None,
        concepts: int | None = None,
        prefix: str = "unet",
        names: Iterable[str] | None = None,
    ) -> None:
        """As `attach`; `names` lists the weights where no subset describes them."""
        for what, number in (("rank", rank), ("concepts", concepts)):
            if number is not None and number < 1:
                raise SvdiffError(f"{what} is {number}, expected at least 1, or None")
        if any(isinstance(layer, SpectralLayer) for layer in module.modules()):
            raise SvdiffError("the model has spectral layers already: detach them first")
        self.module, self.basis, self.subset, self.rank, self.prefix = module, basis, subset, rank, prefix
        self.layers: dict[str, SpectralLayer] = {}
        self.fused = False
        self._flat: Tensor | None = None  # one tensor behind all shifts, and where its parts lie
        self._flat_addresses: list[int] = []
        self._batch = Batch()
        self._hook = module.register_forward_pre_hook(self._batch.follow, with_kwargs=True)
        chosen = select(module, subset) if names is None else list(names)
        if "weight" in chosen:
            raise SvdiffError(f"a {type(module).__name__} is one layer: wrap it in nn.Sequential to attach shifts")
        owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in chosen}
        for name, owner in owners.items():
            factors = basis[name] if is_matrix(owner) else None
            if factors is not None:
                _check_same(name, owner, factors)
            layer = self.layers[name] = make_layer(name, owner, factors, rank)
            weight: Tensor = owner.weight  # type: ignore[assignment]
            if is_quantised(weight) and isinstance(layer, SpectralMatrix) and not layer.keeps_weight:
                raise SvdiffError(f"{name!r} is quantised: attach with a rank, which leaves it in its place")
            layer.batch = self._batch
        self.sizes = {name: len(layer.delta) for name, layer in self.layers.items()}
        if concepts is not None:
            self.write(torch.zeros(concepts, sum(self.sizes.values())))
        self._trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
        module.requires_grad_(False)
        self._swap_in()

    def _swap_in(self) -> None:
        for name, layer in self.layers.items():
            _replace(self.module, name, layer)
            layer.take_weight()
        trim()

    def _swap_out(self, *, shifted: bool) -> None:
        for name, layer in self.layers.items():
            _replace(self.module, name, layer.give_back(shifted=shifted))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`(weight name, shift)`: shifts of `min(M, N)` singular values (or `rank`), or of a norm's elements."""
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

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Set every shift; the names and sizes must be exactly those of `state_dict()`."""
        if state.keys() != self.layers.keys():
            different = sorted(state.keys() ^ self.layers.keys())
            raise SvdiffError(f"{len(different)} names of the state differ from the model's, such as {different[0]!r}")
        self._refuse_fused()
        for name, shift in self.named_parameters():
            if state[name].shape != shift.shape:
                raise SvdiffError(f"{name!r} has {tuple(state[name].shape)} shifts, expected {tuple(shift.shape)}")
        for name, shift in self.named_parameters():
            shift.copy_(state[name])

    @torch.no_grad()
    def set(self, values: Mapping[str, Tensor], *, row: int | None = None) -> None:
        """Set shifts by weight name, without a check of their origin; the weights not named go back to zero.

        `row` sets those of one concept and leaves the others alone.
        """
        self._refuse_fused()
        packed = self.pack(values)
        if row is None:
            self.write(packed)
            return
        for shift, part in zip(self.parameters(), packed.split(list(self.sizes.values())), strict=True):
            shift[row].copy_(part)

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Shifts by weight name as one row `(sum of sizes)`, zero where a weight is not named."""
        parts = []
        for name, size in self.sizes.items():
            value = values.get(name)
            if value is None:
                parts.append(torch.zeros(size))
                continue
            whole = self.layers[name].full_size
            if value.shape not in ((size,), (whole,)):
                raise SvdiffError(f"{name!r} has {tuple(value.shape)} shifts, expected {(whole,)}")
            if value[size:].any():
                raise SvdiffError(
                    f"{name!r} has shifts beyond the leading {size} singular values, where the model was attached with "
                    f"rank {self.rank}: attach with a larger rank, or limit the delta's rank"
                )
            parts.append(value[:size].float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0)

    def write(self, packed: Tensor, index: Sequence[int] | Tensor | None = None) -> None:
        """Set all shifts from one row `(sum of sizes)`, or from a row for each concept and the row of each picture.

        The layers' parameters stay the same objects. Those of one concept look into one tensor, so that the next row
        is one copy, a fraction of a millisecond whatever the number of layers.
        """
        self._refuse_fused()
        if self._flat is not None and self._flat.shape == packed.shape and self._addresses() == self._flat_addresses:
            self._flat.copy_(packed)
        else:
            flat = packed.to(next(iter(self.layers.values())).delta.device, copy=True)
            parts = flat.split(list(self.sizes.values()), -1)
            for layer, part in zip(self.layers.values(), parts, strict=True):
                # Optimisers want the rows of a parameter without gaps.
                layer.delta.data = part.to(layer.delta.device).contiguous()
            self._flat, self._flat_addresses = flat, [part.data_ptr() for part in parts]
        self.assign(index)

    def _addresses(self) -> list[int]:
        """Where the shifts lie: not in the one tensor when the model was moved or copied, or has several concepts."""
        return [layer.delta.data_ptr() for layer in self.layers.values()]

    def assign(self, index: Sequence[int] | Tensor | None) -> None:
        """Say which row of the shifts each picture of the batches to come takes; None forgets it.

        A batch that repeats the pictures as a whole (as for guidance) is recognised, and so is a shorter one of
        prompts of which each has several pictures.
        """
        if index is None:
            self._batch.assign(None, 1)
        else:
            shift = self.parameters()[0]
            self._batch.assign(index, len(shift) if shift.ndim > 1 else 1)

    def delta(self, row: int | None = None, /, **metadata: str) -> SpectralDelta:
        """The current shifts (of concept `row`) as a delta, with what is needed to know where it fits."""
        tensors, norms = {}, []
        for name, layer in self.layers.items():
            shift = layer.delta.detach()
            if (row is None) != (shift.ndim == 1):
                raise SvdiffError(
                    "the shifts of several concepts become deltas one by one: give the row of one, and only then"
                )
            shift = (shift if row is None else shift[row]).clone()
            tensors[f"{self.prefix}.{name}"] = nn.functional.pad(shift, (0, layer.full_size - len(shift)))
            if not isinstance(layer, SpectralMatrix):
                norms.append(f"{self.prefix}.{name}")
        known = {
            metadata_key(self.prefix, "subset"): self.subset,
            "rank": "full" if self.rank is None else str(self.rank),
            "norms": json.dumps(norms),
            "created_by": f"svdiff {__version__}, torch {torch.__version__}",
        }
        return SpectralDelta(tensors, known | identity(self.basis, self.prefix, list(self.layers)) | metadata)

    def load(self, delta: SpectralDelta, *, row: int | None = None) -> None:
        """Set the shifts (of concept `row`) to those of `delta`; weights of the subset that it lacks go back to zero.

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
        self.set(values, row=row)

    def zero(self) -> None:
        """Set all shifts to zero: the base model's function."""
        self.set({})

    def fuse(self) -> None:
        """Put plain layers with the shifted weights in place: no spectral layer is left, nothing to pay for."""
        if not self.fused:
            for layer in self.layers.values():
                layer.check_single()
            self._swap_out(shifted=True)
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
        self._hook.remove()
        self._swap_out(shifted=False)
        self.layers, self.sizes, self.fused = {}, {}, False
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(name in self._trained)

    def _follow(self) -> None:
        """Move the layers that were out of the model to where it has gone since, and to its dtype."""
        for layer in self.layers.values():
            weight: Tensor = layer.original.weight  # type: ignore[assignment]
            layer.take_weight()
            layer.to(weight.device, weight.dtype)

    def _refuse_fused(self) -> None:
        if self.fused:
            raise SvdiffError("the shifts are fused into the weights: unfuse before changing them")


def _check_same(name: str, owner: nn.Module, factors: Factors) -> None:
    """Raise SvdiffError unless a basis fits a weight: by 64 of its numbers, or where those are not at hand (in a
    quantised layer, or a basis of leading directions) by `W v₁ = σ₁ u₁`."""
    weight: Tensor = owner.weight  # type: ignore[assignment]
    by_numbers = factors.source is not None and not is_quantised(weight)
    if factors.shape != weight.shape and not (isinstance(owner, nn.Linear) and is_quantised(weight)):
        raise SvdiffError(
            f"{name!r} has shape {tuple(weight.shape)} but {tuple(factors.shape)} in the basis: "
            "it was made for another model"
        )
    if by_numbers:
        every = max(1, weight.numel() // 64)
        mine, theirs = (w.detach().reshape(-1)[::every].to(weight) for w in (weight, factors.base_weight()))
        same = torch.equal(mine, theirs)
    else:
        same = _first_direction_fits(owner, weight, factors)
    if not same:
        raise SvdiffError(f"{name!r} is not the weight in the basis: it was made for other weights of this model")


@torch.no_grad()
def _first_direction_fits(owner: nn.Module, weight: Tensor, factors: Factors) -> bool:
    u, sigma, v = (part.to(weight.device) for part in (factors.u[:, 0], factors.sigma[0], factors.vh[0]))
    if is_quantised(weight):
        probe = torch.stack([v, torch.zeros_like(v)]) * len(v) ** 0.5
        y = owner(probe.to(_compute_dtype(owner))).float()
        return bool((y[0] - y[1] - sigma * u * len(v) ** 0.5).norm() < 0.25 * sigma * len(v) ** 0.5)
    matrix = as_matrix(weight.detach(), transposed=isinstance(owner, TRANSPOSED)).float()
    return bool((matrix @ v - sigma * u).norm() < 1e-2 * sigma)


def _compute_dtype(owner: nn.Module) -> torch.dtype:
    """What a quantised layer computes in: said by itself, by its weight, or by its bias."""
    bias, weight = owner._parameters.get("bias"), owner._parameters["weight"]
    for dtype in (getattr(owner, "compute_dtype", None), getattr(bias, "dtype", None), getattr(weight, "dtype", None)):
        if dtype is not None and dtype.is_floating_point:
            return dtype  # type: ignore[no-any-return]
    return torch.float32


def _replace(module: nn.Module, weight_name: str, layer: nn.Module) -> None:
    path = weight_name.rpartition(".")[0]
    parent, _, attribute = path.rpartition(".")
    setattr(module.get_submodule(parent), attribute, layer)

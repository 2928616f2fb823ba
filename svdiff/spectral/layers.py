"""Layers whose weight is `W_δ = U diag(ReLU(σ + δ)) Vᵀ` (Eq. 2), or `w + δ` for norms.

A spectral layer takes the place of the layer it was made from and computes the same function at δ = 0. How it
applies W_δ without keeping W, and what that costs, is in `functions`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import NORMS, TRANSPOSED, Factors
from svdiff.spectral.convolution import Geometry, mix_channels
from svdiff.spectral.decompose import as_matrix, from_matrix
from svdiff.spectral.functions import (
    FactoredConv,
    FactoredLinear,
    SpectralWeight,
    materialising_is_cheaper,
)
from svdiff.spectral.products import product


class SpectralLayer(nn.Module):
    """Base of all spectral layers: the shift, and what was not decomposed of the original layer.

    `delta` is a float32 parameter of shape `(K,)`. It belongs to `SpectralShifts` and is kept out of the module
    tree on purpose: the model's `parameters()`, `state_dict()` and `dtype` stay those of the base, and casting
    the model to half precision leaves the shifts in float32.
    """

    original: nn.Module
    delta: nn.Parameter
    bias: nn.Parameter | None
    # Tensors that follow the model to another device but never to another dtype.
    _float32: ClassVar[tuple[str, ...]] = ("delta",)

    def __init__(self, original: nn.Module, size: int) -> None:
        super().__init__()
        weight: Tensor = original.weight  # type: ignore[assignment]
        self.training = original.training
        self.shape = weight.shape
        self.bias = original._parameters.get("bias")
        self._outside_tree("original", original)
        self._outside_tree("delta", nn.Parameter(torch.zeros(size, device=weight.device)))

    def __getattr__(self, name: str) -> Any:
        """What else is asked of the layer is a fact of the original's, such as `in_features`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original" or name.startswith("_"):
                raise
            return getattr(self.original, name)

    def _outside_tree(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralLayer:
        super()._apply(fn, recurse)
        for name in self._float32:
            constant: Tensor = getattr(self, name)
            moved = constant.data.to(fn(constant.data).device)
            if moved.is_meta == constant.is_meta:
                constant.data = moved  # the same tensor as before, which an optimiser may hold
            else:
                self._outside_tree(name, nn.Parameter(moved) if isinstance(constant, nn.Parameter) else moved)
        return self

    @property
    def weight(self) -> Tensor:
        """The current weight, in the shape and dtype of the original's."""
        raise NotImplementedError

    def base_weight(self) -> Tensor:
        """The base's weight, bit for bit, in the layer's present dtype and on its device."""
        raise NotImplementedError

    def shifted_weight(self) -> Tensor:
        """The weight with the present shift, without gradient: for fusing and export."""
        raise NotImplementedError

    # To the outside a model with shifts has the state dict of its base.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.base_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.pop(f"{prefix}weight", None)
        if weight is not None and not torch.equal(weight.to(base := self.base_weight()), base):
            raise SvdiffError(f"{prefix}weight differs from the decomposed one: detach the shifts to change the base")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"weight={tuple(self.shape)}, shifts={len(self.delta)}"


class SpectralNorm(SpectralLayer):
    """LayerNorm, GroupNorm, RMSNorm or another layer with its 1-D weight shifted element by element (Sec. 3.2)."""

    def __init__(self, original: nn.Module) -> None:
        weight: Tensor = original.weight  # type: ignore[assignment]
        super().__init__(original, weight.numel())
        self.base = nn.Buffer(weight.detach(), persistent=False)

    @property
    def weight(self) -> Tensor:
        """`w + δ`, added in float32."""
        return (self.base.float() + self.delta.view(self.shape)).to(self.base.dtype)

    def base_weight(self) -> Tensor:
        """The base's weight."""
        return self.base

    def shifted_weight(self) -> Tensor:
        """`w + δ`."""
        return self.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` as the original layer does."""
        if isinstance(self.original, nn.GroupNorm):
            return F.group_norm(x, self.original.num_groups, self.weight, self.bias, self.original.eps)
        if isinstance(self.original, nn.LayerNorm):
            return F.layer_norm(x, self.shape, self.weight, self.bias, self.original.eps)
        tensors = {"weight": self.weight} | ({} if self.bias is None else {"bias": self.bias})
        normalised: Tensor = torch.func.functional_call(self.original, tensors, (x,))
        return normalised


class SpectralMatrix(SpectralLayer):
    """A layer whose weight is decomposed."""

    contraction: ClassVar[Literal["auto", "factored", "materialised"]] = "auto"
    _float32 = ("delta", "sigma")
    sigma: Tensor
    factors: Factors

    def __init__(self, original: nn.Module, factors: Factors, rank: int | None = None) -> None:
        super().__init__(original, len(factors.sigma))
        weight: Tensor = original.weight  # type: ignore[assignment]
        self.u = nn.Buffer(factors.u.to(weight), persistent=False)
        self.vh = nn.Buffer(factors.vh.to(weight), persistent=False)
        self.transposed = isinstance(original, TRANSPOSED)
        self.rank = rank
        self._cast: tuple[Tensor, Tensor] | None = None
        self._outside_tree("sigma", factors.sigma.to(weight.device))
        self._outside_tree("factors", factors)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralMatrix:
        self._cast = None
        super()._apply(fn, recurse)
        return self

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """U and Vᵀ in the dtype of this call; under autocast they are cast once and not at every call."""
        if dtype == self.u.dtype:
            return self.u, self.vh
        if self._cast is None or self._cast[0].dtype != dtype:
            self._cast = (self.u.to(dtype), self.vh.to(dtype))
        return self._cast

    @property
    def weight(self) -> Tensor:
        """`W_δ` of Eq. 2, differentiable; a full matrix product, so ask for `shape` where that is enough."""
        return self._built(self.u.dtype)

    def base_weight(self) -> Tensor:
        """The base's weight, from the basis."""
        return self.factors.base_weight().to(self.u)

    def shifted_weight(self) -> Tensor:
        """Eq. 2 on the base's weight, in float32 and then in the layer's dtype."""
        shifts = self.delta.detach().to(self.factors.sigma.device)
        return self.factors.shifted_weight(shifts, transposed=self.transposed).to(self.u)

    def _built(self, dtype: torch.dtype) -> Tensor:
        u, vh = self._factors(dtype)
        vh = as_matrix(vh, transposed=self.transposed and vh.ndim > 2)
        matrix = SpectralWeight.apply(self.delta, self.sigma, u, vh, self.rank)
        return from_matrix(matrix, self.shape, transposed=self.transposed)

    def _materialise(self, x: Tensor, tokens: int) -> bool:
        if self.contraction != "auto":
            return self.contraction == "materialised"
        m, n = len(self.u), self.vh[0].numel()
        grad = torch.is_grad_enabled() and self.delta.requires_grad
        return materialising_is_cheaper(tokens, m, n, grad=grad, input_grad=x.requires_grad)

    def _compute(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Input and bias in the dtype of this call: autocast's, or that of the layer."""
        device = x.device.type
        # Where there is no autocast, as on the meta device, asking whether it is on is an error.
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return x, None if self.bias is None else self.bias.to(x.dtype)


class SpectralLinear(SpectralMatrix):
    """Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., N) -> (..., M)`."""
        x, bias = self._compute(x)
        if self._materialise(x, x.numel() // x.shape[-1]):
            weight = self._built(x.dtype)
            return product(x.reshape(-1, x.shape[-1]), weight.T, bias).view(*x.shape[:-1], len(weight))
        u, vh = self._factors(x.dtype)
        keep = torch.is_grad_enabled()
        return FactoredLinear.apply(x, self.delta, bias, self.sigma, u, vh, self.rank, keep)


class SpectralEmbedding(SpectralMatrix):
    """Embedding: the scaled rows of U times `Vᵀ`."""

    def forward(self, index: Tensor) -> Tensor:
        """`index (...) -> (..., N)`."""
        delta: Tensor = self.delta
        if self.rank is not None:
            delta = torch.cat([delta[: self.rank], delta[self.rank :].detach()])
        scale = F.relu(self.sigma + delta).to(self.u.dtype)
        return (F.embedding(index, self.u) * scale) @ self.vh


class SpectralConv(SpectralMatrix):
    """Convolution in one or two dimensions, plain or transposed; grouped ones by building the weight."""

    def __init__(self, original: Any, factors: Factors, rank: int | None = None) -> None:
        super().__init__(original, factors, rank)
        padding, self.pad, self.pad_mode = original.padding, None, "constant"
        if isinstance(padding, str) or original.padding_mode != "zeros":
            self.pad = list(original._reversed_padding_repeated_twice)
            self.pad_mode = "constant" if original.padding_mode == "zeros" else original.padding_mode
            padding = (0,) * len(original.stride)
        self.geometry = Geometry(
            original.stride, padding, original.dilation, self.transposed,
            original.output_padding, original.groups,
        )  # fmt: skip
        if original.groups == 1:
            self.vh = nn.Buffer(_as_kernel(self.vh, self.shape, self.transposed), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, *S) -> (B, M, *S')`."""
        if x.ndim == self.vh.ndim - 1 and self.geometry.groups == 1:
            return self.forward(x[None])[0]  # a picture without batch dimension
        x, bias = self._compute(x)
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        pointwise = self.geometry.pointwise and self.shape[2:].numel() == 1
        if self.geometry.groups != 1 or self._materialise(x, x.numel() // x.shape[1] if pointwise else 0):
            weight = self._built(x.dtype)
            if pointwise:
                return mix_channels(x, weight.flatten(1), bias)
            return torch.convolution(x, weight, bias, *self.geometry)
        u, vh = self._factors(x.dtype)
        keep = torch.is_grad_enabled()
        return FactoredConv.apply(x, self.delta, bias, self.sigma, u, vh, self.geometry, self.rank, keep)


def _as_kernel(vh: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """`Vᵀ (K, N)` as the kernel of a convolution from the layer's input to K channels."""
    if transposed:
        return from_matrix(vh, torch.Size([shape[0], len(vh), *shape[2:]]), transposed=True)
    return vh.view(len(vh), *shape[1:])


_MATRICES: dict[type[nn.Module], type[SpectralMatrix]] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv,
    nn.Conv2d: SpectralConv,
    nn.ConvTranspose1d: SpectralConv,
    nn.ConvTranspose2d: SpectralConv,
    nn.Embedding: SpectralEmbedding,
}


def make_layer(name: str, original: nn.Module, factors: Factors | None, rank: int | None) -> SpectralLayer:
    """The spectral layer for `original`, whose weight is called `name`; refuses kinds that have none."""
    if isinstance(original, NORMS) or original._parameters["weight"].ndim == 1:  # type: ignore[union-attr]
        return SpectralNorm(original)
    kind = _MATRICES.get(type(original)) or next(
        (layer for base, layer in _MATRICES.items() if _same_forward(original, base)), None
    )
    if kind is not None and factors is not None and getattr(original, "max_norm", None) is None:
        return kind(original, factors, rank)
    supported = ", ".join(kind.__name__ for kind in (*_MATRICES, *NORMS))
    raise SvdiffError(
        f"{name!r} belongs to a {type(original).__name__}, which has no spectral layer (there are some for "
        f"{supported}): choose a subset without this weight"
    )


def _same_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass computes what its base does (such as diffusers' compatible layers without adapters)."""
    return isinstance(module, base) and type(module).forward is base.forward

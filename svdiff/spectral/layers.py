"""Layers whose weight is `W_δ = U diag(ReLU(σ + δ)) Vᵀ` (Eq. 2), or `w + δ` for norms.

A spectral layer takes the place of the layer it was made from and computes the same function at δ = 0. W is not
rebuilt: for a linear layer `W_δ x = U (s ⊙ (Vᵀ x))`, and for a convolution V is a convolution of the same geometry
and U a 1 x 1 one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import TRANSPOSED, Factors
from svdiff.spectral.decompose import as_matrix, from_matrix


class SpectralLayer(nn.Module):
    """Base of all spectral layers: holds the shift and what was not decomposed of the original layer.

    `delta` is a float32 parameter of shape `(K,)`. It is owned by `SpectralShifts` and kept out of the module
    tree on purpose: the model's `parameters()`, `state_dict()` and `dtype` stay those of the base, and casting the
    model to half precision leaves the shifts in float32.
    """

    delta: nn.Parameter

    def __init__(self, original: nn.Module, size: int) -> None:
        super().__init__()
        self.training = original.training
        self.shape: torch.Size = original.weight.shape  # type: ignore[assignment]
        self.bias = original._parameters.get("bias")
        object.__setattr__(self, "original", original)
        delta = nn.Parameter(torch.zeros(size, device=original.weight.device))  # type: ignore[arg-type]
        object.__setattr__(self, "delta", delta)

    def _apply(self, fn: Any, recurse: bool = True) -> SpectralLayer:
        super()._apply(fn, recurse)
        for constant in self._float32():
            constant.data = constant.data.to(fn(constant.data).device)
        return self

    def _float32(self) -> list[Tensor]:
        """Tensors that follow the model to another device but never to another dtype."""
        return [self.delta]

    @property
    def weight(self) -> Tensor:
        """The current weight, in the shape of the original's."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"weight={tuple(self.shape)}, shifts={len(self.delta)}"


class SpectralNorm(SpectralLayer):
    """LayerNorm or GroupNorm with its weight shifted element by element, without ReLU (Sec. 3.2)."""

    def __init__(self, original: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__(original, original.weight.numel())
        self.base = nn.Buffer(original.weight.detach(), persistent=False)
        self.eps = original.eps

    @property
    def weight(self) -> Tensor:
        return (self.base.float() + self.delta.view(self.shape)).to(self.base.dtype)

    def original_weight(self) -> Tensor:
        """The base weight itself."""
        return self.base


class SpectralLayerNorm(SpectralNorm):
    """LayerNorm with a shifted weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


class SpectralGroupNorm(SpectralNorm):
    """GroupNorm with a shifted weight."""

    def __init__(self, original: nn.GroupNorm) -> None:
        super().__init__(original)
        self.num_groups = original.num_groups

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class SpectralMatrix(SpectralLayer):
    """A layer whose weight is decomposed."""

    def __init__(self, original: nn.Module, factors: Factors, rank: int | None = None) -> None:
        super().__init__(original, len(factors.sigma))
        weight: Tensor = original.weight  # type: ignore[assignment]
        self.u = nn.Buffer(factors.u.to(weight), persistent=False)
        self.vh = nn.Buffer(factors.vh.to(weight), persistent=False)
        self.transposed = isinstance(original, TRANSPOSED)
        object.__setattr__(self, "sigma", factors.sigma.to(weight.device))
        object.__setattr__(self, "factors", factors)
        self.rank = rank

    sigma: Tensor
    factors: Factors

    def _float32(self) -> list[Tensor]:
        return [self.delta, self.sigma]

    @property
    def scale(self) -> Tensor:
        """`ReLU(σ + δ)` in float32, with gradient to the leading `rank` shifts only."""
        delta: Tensor = self.delta
        if self.rank is not None and self.rank < len(delta):
            delta = torch.cat([delta[: self.rank], delta[self.rank :].detach()])
        return F.relu(self.sigma + delta)

    @property
    def weight(self) -> Tensor:
        matrix = (self.u * self.scale.to(self.u.dtype)) @ self.vh.flatten(1)
        return from_matrix(matrix, self.shape, transposed=self.transposed)

    def original_weight(self) -> Tensor:
        """The base weight, bit for bit, from wherever it is kept."""
        return self.factors.restored().to(self.u)


class SpectralLinear(SpectralMatrix):
    """Linear layer by its factors."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.vh)
        return F.linear(h * self.scale.to(h.dtype), self.u, self.bias)


class SpectralEmbedding(SpectralMatrix):
    """Embedding: rows of `U`, scaled, times `Vᵀ`."""

    def forward(self, index: Tensor) -> Tensor:
        return (F.embedding(index, self.u) * self.scale.to(self.u.dtype)) @ self.vh


class SpectralConv(SpectralMatrix):
    """Convolution (1-D or 2-D, plain or transposed)."""

    def __init__(self, original: Any, factors: Factors, rank: int | None = None) -> None:
        super().__init__(original, factors, rank)
        conv = original
        self.geometry: tuple[Any, ...] = (
            conv.stride, () if isinstance(conv.padding, str) else conv.padding, conv.dilation, self.transposed,
            conv.output_padding, conv.groups,
        )  # fmt: skip
        self.pad, self.pad_mode = None, "constant"
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            self.pad = list(conv._reversed_padding_repeated_twice)
            self.pad_mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            self.geometry = (conv.stride, (0,) * len(conv.stride), *self.geometry[2:])
        if conv.groups == 1:
            self.vh = nn.Buffer(_as_kernel(self.vh, self.shape, self.transposed), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        if self.geometry[-1] != 1:
            return torch.convolution(x, self.weight, self.bias, *self.geometry)
        h = torch.convolution(x, self.vh, None, *self.geometry)
        h = h * self.scale.to(h.dtype).view(-1, *[1] * (h.ndim - 2))
        u = self.u.reshape(*self.u.shape, *[1] * (h.ndim - 2))
        return torch.convolution(h, u, self.bias, [1], [0], [1], False, [0], 1)

    @property
    def weight(self) -> Tensor:
        vh = as_matrix(self.vh, transposed=self.transposed and self.vh.ndim > 2)
        return from_matrix(
            (self.u * self.scale.to(self.u.dtype)) @ vh, self.shape, transposed=self.transposed
        )


def _as_kernel(vh: Tensor, shape: torch.Size, transposed: bool) -> Tensor:
    """`Vᵀ (K, N)` as the kernel of a convolution from the layer's input to K channels."""
    k = len(vh)
    if transposed:
        return from_matrix(vh, torch.Size([shape[0], k, *shape[2:]]), transposed=True)
    return vh.view(k, *shape[1:])


_KINDS: dict[type[nn.Module], type[SpectralMatrix]] = {
    nn.Linear: SpectralLinear,
    nn.Conv1d: SpectralConv,
    nn.Conv2d: SpectralConv,
    nn.ConvTranspose1d: SpectralConv,
    nn.ConvTranspose2d: SpectralConv,
    nn.Embedding: SpectralEmbedding,
}
_NORMS: dict[type[nn.Module], type[SpectralNorm]] = {
    nn.LayerNorm: SpectralLayerNorm,
    nn.GroupNorm: SpectralGroupNorm,
}


def make_layer(name: str, original: nn.Module, factors: Factors | None, rank: int | None) -> SpectralLayer:
    """The spectral layer for `original`, whose weight is called `name`; refuses kinds that are not supported."""
    for kind in type(original).__mro__:
        if kind in _NORMS:
            return _NORMS[kind](original)  # type: ignore[arg-type]
        if kind in _KINDS and factors is not None:
            return _KINDS[kind](original, factors, rank)
    raise SvdiffError(
        f"{name!r} belongs to a {type(original).__name__}, which has no spectral layer. Supported are "
        f"{', '.join(kind.__name__ for kind in (*_KINDS, *_NORMS))}; choose a subset without this weight."
    )

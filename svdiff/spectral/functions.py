"""The two ways to apply `W_δ = U diag(s) Vᵀ`, `s = ReLU(σ + δ)` (Eq. 2), with gradients for δ and the input.

Factored: `y = U (s ⊙ h)` with `h = Vᵀx`. Only h is kept for the backward pass; neither x nor any M x N matrix:

    e = Uᵀ g_y        g_δ = 1[σ + δ > 0] ⊙ Σ_t e_t ⊙ h_t        g_x = V (s ⊙ e)

Materialised: W_δ is built for one call, and `g_δ = diag(Uᵀ G V)` comes from its gradient G. Dearer by a constant
and cheaper by a token: see `materialising_is_cheaper`.

Shifts and σ are float32 always; factors and activations have the layer's compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svdiff.spectral.basis import scales
from svdiff.spectral.convolution import Geometry, convolve, convolve_backward, mix_channels
from svdiff.spectral.memory import note_kept
from svdiff.spectral.products import product


def materialising_is_cheaper(tokens: int, m: int, n: int, *, grad: bool, input_grad: bool) -> bool:
    """Whether building W_δ costs fewer multiply-adds than two factors, for `tokens` columns of an M x N weight.

    A training step needs the product, the gradient to the input (where asked) and that to δ: three products
    with W or G, and two more to build W_δ and to project G, against two with each of U and V.
    """
    k = min(m, n)
    if not grad:
        return tokens * m * n + k * m * n < tokens * k * (m + n)
    factored = tokens * k * (2 * m + (1 + input_grad) * n)
    return tokens * m * n * (2 + input_grad) + 2 * k * m * n < factored


class SpectralWeight(torch.autograd.Function):
    """`W_δ (M, N)` from δ; the gradient is `diag(Uᵀ G V)`, without the K x K matrix around that diagonal."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, sigma: Tensor, u: Tensor, vh: Tensor, rank: int | None) -> Tensor:
        scale = scales(delta, sigma)
        ctx.alive, ctx.u, ctx.vh, ctx.rank = scale > 0, u, vh, rank
        scale = scale.to(u.dtype)
        return product(u * scale, vh) if len(u) <= vh.shape[1] else product(u, scale[:, None] * vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, vh = ctx.u[:, : ctx.rank], ctx.vh[: ctx.rank]
        wide = len(u) <= vh.shape[1]  # the smaller product is the one that is made
        diagonal = _dot(u, product(gradient, vh.T), (0,)) if wide else _dot(product(u.T, gradient), vh, (1,))
        return _shift_gradient(diagonal, ctx.alive), None, None, None, None


class FactoredLinear(torch.autograd.Function):
    """`x (..., N) -> (..., M)`; `keep` says whether a backward pass may follow."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None,
        sigma: Tensor, u: Tensor, vh: Tensor, rank: int | None, keep: bool,
    ) -> Tensor:  # fmt: skip
        scale = scales(delta, sigma)
        ctx.alive, ctx.u, ctx.vh, ctx.rank, ctx.shape = scale > 0, u, vh, rank, x.shape
        ctx.scale = scale = scale.to(x.dtype)
        h = product(x.reshape(-1, x.shape[-1]), vh.T)
        if keep:
            ctx.save_for_backward(h)
            note_kept(h)
        # The smaller of the two is scaled.
        left, right = (h, u * scale) if len(h) > len(u) else (h * scale, u)
        y = product(left, right.T, bias)
        return y.view(*x.shape[:-1], len(u))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        e = product(g, ctx.u)
        for_delta = _shift_gradient(_dot(e[:, : ctx.rank], h[:, : ctx.rank], (0,)), ctx.alive)
        for_x = product(e.mul_(ctx.scale), ctx.vh).view(ctx.shape) if ctx.needs_input_grad[0] else None
        for_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        return for_x, for_delta, for_bias, None, None, None, None, None


class FactoredConv(torch.autograd.Function):
    """Convolution with V, of the layer's own geometry, then 1 x 1 with U: `x (B, C, *S) -> (B, M, *S')`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None,
        sigma: Tensor, u: Tensor, vh: Tensor, geometry: Geometry, rank: int | None, keep: bool,
    ) -> Tensor:  # fmt: skip
        scale = scales(delta, sigma)
        ctx.alive, ctx.u, ctx.vh, ctx.rank, ctx.shape = scale > 0, u, vh, rank, x.shape
        ctx.geometry = geometry
        ctx.scale = scale = scale.to(x.dtype)
        h = convolve(x, vh, geometry)
        if keep:
            ctx.save_for_backward(h)
            note_kept(h)
        if h.numel() > u.numel():
            return mix_channels(h, u * scale, bias)
        return mix_channels(h * _per_channel(scale, h), u, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        but_channels = (0, *range(2, h.ndim))
        e = mix_channels(gradient, ctx.u.T, None)
        for_delta = _shift_gradient(_dot(e[:, : ctx.rank], h[:, : ctx.rank], but_channels), ctx.alive)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = convolve_backward(e.mul_(_per_channel(ctx.scale, e)), ctx.shape, ctx.vh, ctx.geometry)
        for_bias = gradient.sum(but_channels) if ctx.needs_input_grad[2] else None
        return for_x, for_delta, for_bias, None, None, None, None, None, None


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))


def _dot(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`Σ a ⊙ b` over `dims`, multiplied and summed in float32 at least."""
    return (a * b).sum(dims) if a.dtype == torch.float32 else (a.float() * b.float()).sum(dims)


def _shift_gradient(diagonal: Tensor, alive: Tensor) -> Tensor:
    """ReLU's part, and zeros for the shifts beyond the rank."""
    gradient = torch.zeros(len(alive), dtype=diagonal.dtype, device=diagonal.device)
    gradient[: len(diagonal)] = torch.where(alive[: len(diagonal)], diagonal, 0.0)
    return gradient

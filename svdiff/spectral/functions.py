"""The two ways to apply `W_δ = U diag(s) Vᵀ`, `s = ReLU(σ + δ)` (Eq. 2), with gradients for δ and the input.

Factored: `y = U (s ⊙ h)` with `h = Vᵀx`. Only h is saved for the backward pass; neither x nor any M x N matrix:

    e = Uᵀ g_y        g_δ = 1[σ + δ > 0] ⊙ Σ_t e_t ⊙ h_t        g_x = V (s ⊙ e)

Materialised: W_δ is built for one call, and `g_δ = diag(Uᵀ G V)` comes from its gradient G. Dearer by a constant
and cheaper by a token: see `materialising_is_cheaper`.

Many concepts at once: δ is `(C, K)`, a row for each concept, and `rows (B,)` says which row each picture of the batch
takes: `s_b ⊙ h_b`. With `rows` None there is one concept, and δ is `(K,)`.

With `change` the factors apply `s − σ` alone, for layers that keep W beside their leading factors.

Shifts and σ are float32 always; factors and activations have the layer's compute dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svdiff.spectral.basis import scales
from svdiff.spectral.cpu import (
    Geometry,
    batched_product,
    convolve,
    convolve_backward,
    mix_channels,
    note_saved,
    product,
)


def materialising_is_cheaper(tokens: int, m: int, n: int, *, grad: bool, input_grad: bool, concepts: int = 1) -> bool:
    """Whether building W_δ for each concept costs fewer multiply-adds than two factors, for `tokens` columns of an
    M x N weight.

    A training step needs the product, the gradient to the input (where asked) and that to δ: three products
    with W or G, and two more to build W_δ and to project G, against two with each of U and V.
    """
    k = min(m, n)
    build = concepts * k * m * n
    if not grad:
        return tokens * m * n + build < tokens * k * (m + n)
    return tokens * m * n * (2 + input_grad) + 2 * build < tokens * k * (2 * m + (1 + input_grad) * n)


class SpectralWeight(torch.autograd.Function):
    """`W_δ (M, N)`, or `(C, M, N)`, from δ; the gradient is `diag(Uᵀ G V)`, without the K x K matrix around it."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, sigma: Tensor, u: Tensor, vh: Tensor, change: bool) -> Tensor:
        scale, ctx.alive = _scale(delta, sigma, change)
        ctx.u, ctx.vh = u, vh
        scale = scale.to(u.dtype)
        if delta.ndim > 1:
            return product((u * scale[:, None]).flatten(0, 1), vh).unflatten(0, (len(delta), len(u)))
        return product(u * scale, vh) if len(u) <= vh.shape[1] else product(u, scale[:, None] * vh)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        u, vh = ctx.u, ctx.vh
        if gradient.ndim > 2:
            right = product(gradient.flatten(0, 1), vh.T).unflatten(0, gradient.shape[:2])
            diagonal = _dot(u, right, (1,))
        elif len(u) <= vh.shape[1]:  # the smaller product is the one that is made
            diagonal = _dot(u, product(gradient, vh.T), (0,))
        else:
            diagonal = _dot(product(u.T, gradient), vh, (1,))
        return torch.where(ctx.alive, diagonal, 0.0), None, None, None, None


class FactoredLinear(torch.autograd.Function):
    """`x (..., N) -> (..., M)`; `save` says whether a backward pass may follow."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None,
        sigma: Tensor, u: Tensor, vh: Tensor, rows: Tensor | None, change: bool, save: bool,
    ) -> Tensor:  # fmt: skip
        scale, ctx.alive = _scale(delta, sigma, change)
        ctx.u, ctx.vh, ctx.rows, ctx.shape = u, vh, rows, x.shape
        pictures = 1 if rows is None else len(rows)
        # One scale, or one a picture.
        ctx.scale = scale = (scale if rows is None else scale[rows]).to(x.dtype).view(pictures, 1, -1)
        h = product(x.reshape(-1, x.shape[-1]), vh.T)
        if save:
            ctx.save_for_backward(h)
            note_saved(h)
        by_picture = h.view(pictures, -1, h.shape[1])
        # The smaller of the two is scaled.
        if by_picture.shape[1] > len(u):
            scaled = u * scale
            y = product(h, scaled[0].T, bias) if rows is None else batched_product(by_picture, scaled.mT, bias)
        else:
            y = product((by_picture * scale).view(h.shape), u.T, bias)
        return y.view(*x.shape[:-1], len(u))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        g = gradient.reshape(-1, gradient.shape[-1])
        e = product(g, ctx.u).view(len(ctx.scale), -1, h.shape[1])
        for_delta = _shift_gradient(_dot(e, h.view(e.shape), (1,)), ctx.alive, ctx.rows)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = product(e.mul_(ctx.scale).view(h.shape), ctx.vh).view(ctx.shape)
        for_bias = g.sum(0) if ctx.needs_input_grad[2] else None
        return for_x, for_delta, for_bias, None, None, None, None, None, None


class FactoredConv(torch.autograd.Function):
    """Convolution with V, of the layer's own geometry, then 1 x 1 with U: `x (B, C, *S) -> (B, M, *S')`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, bias: Tensor | None,
        sigma: Tensor, u: Tensor, vh: Tensor, geometry: Geometry, rows: Tensor | None, change: bool, save: bool,
    ) -> Tensor:  # fmt: skip
        scale, ctx.alive = _scale(delta, sigma, change)
        ctx.u, ctx.vh, ctx.rows, ctx.shape, ctx.geometry = u, vh, rows, x.shape, geometry
        scale = (scale if rows is None else scale[rows]).to(x.dtype)
        h = convolve(x, vh, geometry)
        ctx.scale = by_channel = scale.view(-1, h.shape[1], *[1] * (h.ndim - 2))
        if save:
            ctx.save_for_backward(h)
            note_saved(h)
        if h.numel() > u.numel() * len(by_channel):
            return mix_channels(h, u * (scale if rows is None else scale[:, None]), bias)
        return mix_channels(h * by_channel, u, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (h,) = ctx.saved_tensors
        space = tuple(range(2, h.ndim))
        e = mix_channels(gradient, ctx.u.T, None)
        per_picture = _dot(e, h, space if ctx.rows is not None else (0, *space))
        for_delta = _shift_gradient(per_picture, ctx.alive, ctx.rows)
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = convolve_backward(e.mul_(ctx.scale), ctx.shape, ctx.vh, ctx.geometry)
        for_bias = gradient.sum((0, *space)) if ctx.needs_input_grad[2] else None
        return for_x, for_delta, for_bias, None, None, None, None, None, None, None, None


def _scale(delta: Tensor, sigma: Tensor, change: bool) -> tuple[Tensor, Tensor]:
    """What the factors are scaled by, and which directions ReLU leaves alive."""
    scale = scales(delta, sigma)
    return (scale - sigma if change else scale), scale > 0


def _dot(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`Σ a ⊙ b` over `dims`, multiplied and summed in float32 at least."""
    return (a * b).sum(dims) if a.dtype == torch.float32 else (a.float() * b.float()).sum(dims)


def _shift_gradient(per_picture: Tensor, alive: Tensor, rows: Tensor | None) -> Tensor:
    """Sum the pictures of each concept, and stop what ReLU stops."""
    if rows is None:
        return torch.where(alive, per_picture.view(alive.shape), 0.0)
    # Unlike adding in place this has the same order of sums on every device; unlike a product with zeros and ones it keeps a
    # concept whose numbers are no longer finite apart from the others.
    pictures = torch.bincount(rows, minlength=len(alive))
    by_concept = per_picture[rows.argsort(stable=True)]
    return torch.where(alive, torch.segment_reduce(by_concept, "sum", lengths=pictures, unsafe=True), 0.0)

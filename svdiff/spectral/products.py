"""Products of float32 matrices on a CPU, by the library that multiplies faster there.

PyTorch multiplies with MKL, which leaves AVX-512 unused on processors of other makers than its own. oneDNN, which
PyTorch has for convolutions, uses it, and takes less than half the time there (`python -m benchmarks.products`).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiply-adds of a product below which the call itself decides.
_FEW = 1 << 21


def product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    """`a (M, K) @ b (K, N) + add`, `add` of a shape that broadcasts to `(M, N)`; differentiable once."""
    if onednn_is_faster(a, b):
        y = _OneDnn.apply(a, b)
        return y if add is None else y + add if y.requires_grad else y.add_(add)
    return a @ b if add is None else torch.addmm(add, a, b)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """`y += a @ b` in place; not differentiable."""
    if onednn_is_faster(a, b):
        y += product(a, b)
    else:
        y.addmm_(a, b)


def onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether `product` goes by oneDNN: a function of the machine, the shapes and the dtype alone."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    return a.shape[0] * a.shape[1] * b.shape[-1] >= _FEW and _mkl_holds_back()


@cache
def _mkl_holds_back() -> bool:
    """Whether this processor has AVX-512 and is not MKL's maker's, and PyTorch has both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not both or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


class _OneDnn(torch.autograd.Function):
    """`a @ b` by the operation that PyTorch's own compiler calls for linear layers."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b).T, None, "none", [], "")
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        for_a = product(gradient, b.T) if ctx.needs_input_grad[0] else None
        for_b = product(a.T, gradient) if ctx.needs_input_grad[1] else None
        return for_a, for_b


def _dense(x: Tensor) -> Tensor:
    """`x` itself where its rows or its columns follow each other without gaps: for others oneDNN may take minutes."""
    return x if x.is_contiguous() or x.T.is_contiguous() else x.contiguous()

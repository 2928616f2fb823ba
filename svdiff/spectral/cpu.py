"""Faster routes of the same arithmetic on CPUs; on any other device, and with `ON` false, plain PyTorch.

Three things, each with the benchmark that says whether it pays:

- products by oneDNN on processors where MKL leaves AVX-512 unused (`python -m benchmarks.products`);
- deep convolutions by unfolding the picture: oneDNN copies the whole kernel into a blocked layout at every call,
  which costs more where the kernel is larger than the picture (`python -m benchmarks.layers`);
- memory given back to the system: glibc cannot reuse the hole that an aligned block leaves between two others for
  a block of the same size, 0.2 of 2 GB at the size of Stable Diffusion 1.5 (`python -m benchmarks.train_step`).

The environment variable SVDIFF_CPU_ROUTES=0 switches all of them off.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ON = os.environ.get("SVDIFF_CPU_ROUTES") != "0"

# Multiply-adds of a product below which the call itself decides.
_FEW = 1 << 21
# And those of each product below which one call for all of a batch beats one by oneDNN of each: by a fifth at 4 million.
_FEW_EACH = 1 << 24
# Pixels of a picture up to which the pictures of a batch are laid side by side for one product: measured three times as fast
# as one of each for 16 pixels, as fast for 64, where larger matrices gain.
_FEW_PIXELS = 64
# Numbers of a picture that are unfolded at a time: 4 MB, which also stay in the cache for the product.
_UNFOLDED = 1 << 20
# Bytes saved for the backward pass between two trims: ten trims in a step at 64 x 64 latents, two at 32 x 32 ...
_TRIM_EVERY = 32 << 20
# ... but no more than one in so many times as long as the last one took: small models save as much in a fraction of the time.
_TRIM_RARELY = 200
_saved, _trim_after = 0, 0.0


def _helps(x: Tensor) -> bool:
    return ON and x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many processor threads for each of PyTorch's kernels, on which the last bits of results depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- products --------------------------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    """`a (M, K) @ b (K, N) + add`, `add` of a shape that broadcasts to `(M, N)`; differentiable once."""
    if onednn_is_faster(a, b):
        y: Tensor = OneDnnProduct.apply(a, b)
        return y if add is None else y + add if y.requires_grad else y.add_(add)
    return a @ b if add is None else torch.addmm(add, a, b)


def batched_product(a: Tensor, b: Tensor, add: Tensor | None = None) -> Tensor:
    """`a (B, M, K) @ b (B, K, N) + add`: a product for each picture.

    Either may have fewer, which then stand for all: the first of the others' again after its last.
    """
    pictures = max(len(a), len(b))
    if a[0].numel() * b.shape[-1] >= _FEW_EACH and onednn_is_faster(a[0], b[0]):
        return torch.stack([product(a[i % len(a)], b[i % len(b)], add) for i in range(pictures)])
    if len(a) == len(b):
        return a @ b if add is None else torch.baddbmm(add, a, b)
    y = a.new_empty(pictures, a.shape[1], b.shape[2])
    for start in range(0, pictures, step := min(len(a), len(b))):
        one, other = (x[start : start + step] if len(x) == pictures else x for x in (a, b))
        torch.bmm(one, other, out=y[start : start + step])
    return y if add is None else y.add_(add)


def onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether `product` goes by oneDNN: a function of the machine, the shapes and the dtype alone."""
    return _helps(a) and a.shape[0] * a.shape[1] * b.shape[-1] >= _FEW and _mkl_holds_back()


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


class OneDnnProduct(torch.autograd.Function):
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


# -- convolutions ----------------------------------------------------------------------------------------------


class Geometry(NamedTuple):
    """Arguments of `torch.convolution` after the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def pointwise(self) -> bool:
        """Whether a kernel of size 1 mixes channels only."""
        return not self.transposed and self.groups == 1 and set(self.stride) == {1} and set(self.padding) == {0}


def mix_channels(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """1 x 1 convolution `x (B, K, *S)` with `matrix (M, K)`, or one a picture as `batched_product` has it, -> `(B, M, *S)`."""
    if not x.is_contiguous():  # channels last
        pixels = x.movedim(1, -1)
        if matrix.ndim == 2:
            y = product(pixels.reshape(-1, x.shape[1]), matrix.T, bias)
        else:
            y = batched_product(pixels.flatten(1, -2), matrix.mT, bias)
        return y.view(*pixels.shape[:-1], matrix.shape[-2]).movedim(-1, 1)
    columns, column = x.flatten(2), None if bias is None else bias[:, None]
    if matrix.ndim == 2 and len(x) > 1 and columns.shape[2] <= _FEW_PIXELS:
        y = product(matrix, _join_batch(columns), column)
        return _split_batch(y, len(x)).contiguous().view(len(x), len(matrix), *x.shape[2:])
    if len(x) == 1:
        y = product(matrix.view(matrix.shape[-2:]), columns[0], column)
    else:
        y = batched_product(matrix.expand(len(x), -1, -1) if matrix.ndim == 2 else matrix, columns, column)
    return y.view(len(x), matrix.shape[-2], *x.shape[2:])


def convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    """`x (B, C, *S)` with `kernel (K, C, *R)` (transposed: `(C, K, *R)`) -> `(B, K, *S')`."""
    if kernel[0, 0].numel() == 1 and geometry.pointwise:
        return mix_channels(x, kernel.flatten(1), None)
    size = _output_size(x, kernel, geometry)
    if size is None or not unfolding_is_cheaper(x, kernel, size):
        return torch.convolution(x, kernel, None, *geometry)
    matrix = kernel.flatten(1)
    y = x.new_zeros(len(kernel), len(x) * math.prod(size))
    for channels, rows in _parts(kernel, y.shape[1]):
        columns = F.unfold(x[:, channels], kernel.shape[2:], geometry.dilation, geometry.padding, geometry.stride)
        part, columns = matrix[:, rows], _join_batch(columns)
        if onednn_is_faster(part, columns):
            y += product(part, columns)
        else:
            y.addmm_(part, columns)
    return _split_batch(y, len(x)).unflatten(2, size).contiguous(memory_format=_layout(x))


def convolve_backward(g: Tensor, shape: torch.Size, kernel: Tensor, geometry: Geometry) -> Tensor:
    """The gradient to the input of `convolve`, of shape `shape`, from `g`, that to its output."""
    if kernel[0, 0].numel() == 1 and geometry.pointwise:
        return mix_channels(g, kernel.flatten(1).T, None)
    if geometry.transposed or not unfolding_is_cheaper(g, kernel, g.shape[2:]):
        # Only the shape of the input is needed: one number is shown as all of it.
        x = g.new_empty(1).expand(shape)
        only_input = [True, False, False]
        return torch.ops.aten.convolution_backward(g, x, kernel, None, *geometry, only_input)[0]
    matrix, g_columns = kernel.flatten(1), _join_batch(g.flatten(2)).T
    x = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=_layout(g))
    for channels, rows in _parts(kernel, len(g_columns)):
        columns = _split_batch(product(g_columns, matrix[:, rows]).T, len(g))
        x[:, channels] = F.fold(
            columns, shape[2:], kernel.shape[2:], geometry.dilation, geometry.padding, geometry.stride
        )
    return x


def _output_size(x: Tensor, kernel: Tensor, geometry: Geometry) -> tuple[int, ...] | None:
    """Height and width of the output where unfolding is possible at all, else None."""
    if geometry.transposed or geometry.groups != 1 or x.ndim != 4:
        return None
    return tuple(
        (s + 2 * p - d * (r - 1) - 1) // t + 1
        for s, r, t, p, d in zip(x.shape[2:], kernel.shape[2:], *geometry[:3], strict=True)
    )


def unfolding_is_cheaper(x: Tensor, kernel: Tensor, size: tuple[int, ...]) -> bool:
    """Measured: unfolding one number of the picture costs as much as reordering three of the kernel."""
    return _helps(x) and x.ndim == 4 and 3 * len(x) * math.prod(size) < len(kernel)


def _parts(kernel: Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Input channels in groups, each with its columns of `kernel.flatten(1)`: unfolded all at once, a picture of the
    deep half takes 24 MB, and the allocator cannot use the hole that it leaves for the next one."""
    channels, taps = kernel.shape[1], kernel[0, 0].numel()
    step = max(1, _UNFOLDED // (taps * tokens))
    for start in range(0, channels, step):
        stop = min(start + step, channels)
        yield slice(start, stop), slice(start * taps, stop * taps)


def _join_batch(columns: Tensor) -> Tensor:
    """`(B, N, T) -> (N, B * T)`."""
    return columns[0] if len(columns) == 1 else columns.transpose(0, 1).flatten(1)


def _split_batch(columns: Tensor, batch: int) -> Tensor:
    """`(N, B * T) -> (B, N, T)`."""
    return columns[None] if batch == 1 else columns.unflatten(1, (batch, -1)).transpose(0, 1)


def _layout(x: Tensor) -> torch.memory_format:
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


# -- memory ----------------------------------------------------------------------------------------------------


def trim() -> None:
    """Give the pages of all holes back. Costs some milliseconds, and a page fault for each page that is used again."""
    if ON and (function := _malloc_trim()):
        function(0)


def note_saved(tensor: Tensor) -> None:
    """Count a tensor that is saved for the backward pass, and trim now and then."""
    global _saved, _trim_after
    if not ON or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return
    _saved += tensor.numel() * tensor.element_size()
    started = time.perf_counter()
    if _saved >= _TRIM_EVERY and started >= _trim_after:
        trim()
        _saved, ended = 0, time.perf_counter()
        _trim_after = ended + _TRIM_RARELY * (ended - started)


@cache
def _malloc_trim() -> Any:
    """glibc's function, or None on other systems, whose allocators we leave alone."""
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None

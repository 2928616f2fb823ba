"""Convolution with a frozen kernel: the product and its transpose, each by the cheaper of three routes.

On a CPU, oneDNN copies the whole kernel into a blocked layout at every call. Where the kernel is larger than the
picture, which is so in the deep half of Stable Diffusion's UNet, unfolding the picture costs less than that copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from svdiff.spectral.products import add_product, onednn_is_faster, product

# Numbers of a picture that are unfolded at a time: 4 MB, which also stay in the cache for the product.
_UNFOLDED = 1 << 20


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


def convolve(x: Tensor, kernel: Tensor, geometry: Geometry) -> Tensor:
    """`x (B, C, *S)` with `kernel (K, C, *R)` (transposed: `(C, K, *R)`) -> `(B, K, *S')`."""
    if kernel[0, 0].numel() == 1 and geometry.pointwise:
        return mix_channels(x, kernel.flatten(1), None)
    size = _output_size(x, kernel, geometry)
    if size is None or not _unfolding_is_cheaper(x, kernel, size):
        return torch.convolution(x, kernel, None, *geometry)
    matrix = kernel.flatten(1)
    y = x.new_zeros(len(kernel), len(x) * math.prod(size))
    for channels, rows in _parts(kernel, y.shape[1]):
        columns = F.unfold(x[:, channels], kernel.shape[2:], geometry.dilation, geometry.padding, geometry.stride)
        add_product(y, matrix[:, rows], _join_batch(columns))
    return _split_batch(y, len(x)).unflatten(2, size).contiguous(memory_format=_layout(x))


def convolve_backward(g: Tensor, shape: torch.Size, kernel: Tensor, geometry: Geometry) -> Tensor:
    """The gradient to the input of `convolve`, of shape `shape`, from `g`, that to its output."""
    if kernel[0, 0].numel() == 1 and geometry.pointwise:
        return mix_channels(g, kernel.flatten(1).T, None)
    if geometry.transposed or not _unfolding_is_cheaper(g, kernel, g.shape[2:]):
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


def mix_channels(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """1 x 1 convolution `x (B, K, *S)`, `matrix (M, K)` -> `(B, M, *S)` as one product, in the layout of `x`."""
    if not x.is_contiguous():
        pixels = x.movedim(1, -1)
        y = product(pixels.reshape(-1, x.shape[1]), matrix.T, bias)
        return y.view(*pixels.shape[:-1], len(matrix)).movedim(-1, 1)
    columns = x.flatten(2)
    column = None if bias is None else bias[:, None]
    if len(x) == 1:
        y = product(matrix, columns[0], column)
    elif onednn_is_faster(matrix, columns):
        y = torch.stack([product(matrix, one, column) for one in columns])
    elif column is None:
        y = matrix @ columns
    else:
        y = torch.baddbmm(column, matrix.expand(len(x), *matrix.shape), columns)
    return y.view(len(x), len(matrix), *x.shape[2:])


def _output_size(x: Tensor, kernel: Tensor, geometry: Geometry) -> tuple[int, ...] | None:
    """Height and width of the output where unfolding is possible at all, else None."""
    if geometry.transposed or geometry.groups != 1 or x.ndim != 4:
        return None
    return tuple(
        (s + 2 * p - d * (r - 1) - 1) // t + 1
        for s, r, t, p, d in zip(x.shape[2:], kernel.shape[2:], *geometry[:3], strict=True)
    )


def _unfolding_is_cheaper(x: Tensor, kernel: Tensor, size: tuple[int, ...]) -> bool:
    # By CPU time of one thread in float32: unfolding one number of the picture costs as much as reordering three of the kernel.
    few = 3 * len(x) * math.prod(size) < len(kernel)
    return few and x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim == 4


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

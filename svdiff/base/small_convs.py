"""3×3 convolutions as matrix products: at resolutions of a few pixels twice as fast on a CPU as the convolution kernels,
which spend their time on rearranging the weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def columns(x: torch.Tensor) -> torch.Tensor:
    """Channels-last N×C×H×W to NHW × 9C: the 3×3 neighbourhood of every place, zeros outside."""
    n, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return torch.stack(shifted, dim=3).view(n * h * w, 9 * c)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        n, _, h, w = x.shape
        gathered = columns(x)
        ctx.save_for_backward(gathered, weight)
        y = torch.addmm(bias, gathered, weight.permute(0, 2, 3, 1).reshape(len(weight), -1).T)
        return y.view(n, h, w, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gathered, weight = ctx.saved_tensors
        (g,) = gradients
        n, o, h, w = g.shape
        c = weight.shape[1]
        rows = g.permute(0, 2, 3, 1).reshape(-1, o)
        of_weight = (rows.T @ gathered).view(o, 3, 3, c).permute(0, 3, 1, 2)
        back = weight.flip(2, 3).permute(2, 3, 0, 1).reshape(9 * o, c)  # the transposed convolution's weights
        of_x = (columns(g) @ back).view(n, h, w, c).permute(0, 3, 1, 2)
        return of_x, of_weight, rows.sum(0)


class ProductConv2d(torch.nn.Conv2d):
    """A 3×3 convolution of stride 1 and padding 1 with a bias, computed in bfloat16 as a matrix product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """N×C×H×W to N×C'×H×W."""
        assert self.bias is not None
        half = (tensor.to(torch.bfloat16) for tensor in (input, self.weight, self.bias))
        return _Product.apply(*half)  # type: ignore[no-any-return,no-untyped-call]


def use_products(module: torch.nn.Module) -> None:
    """Make every 3×3 convolution of stride 1 in `module` one of these, in place; its weights stay as they are."""
    for part in module.modules():
        if type(part) is torch.nn.Conv2d and (part.kernel_size, part.stride, part.padding) == ((3, 3), (1, 1), (1, 1)):
            part.__class__ = ProductConv2d

"""3×3 convolutions by Winograd's minimal filtering, F(4×4, 3×3): a quarter of the multiplications.

At resolutions of 4 to 8 pixels the convolution kernels of a CPU run at its full rate already; what is left is to do
less. A tile of 4×4 outputs takes 36 products a pair of channels instead of 144 (Lavin and Gray, 2016):

    Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A

and the sum over input channels makes 36 matrix products of it, in float32, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_B = torch.tensor(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]],
    dtype=torch.float64,
)  # fmt: skip
_G = torch.tensor(
    [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]],
    dtype=torch.float64,
)  # fmt: skip
_A = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], dtype=torch.float64
)
# Both sides at once: Bᵀ x B = (Bᵀ ⊗ Bᵀ) vec x.
_INPUT, _KERNEL, _OUTPUT = (torch.kron(m, m).float() for m in (_B, _G, _A))


def _tiles(x: torch.Tensor) -> torch.Tensor:
    """N×H×W×C to 36 × (tiles · C): the 6×6 neighbourhoods of all 4×4 tiles, zeros outside."""
    n, h, w, c = x.shape
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    s = padded.stride()
    return padded.as_strided((6, 6, n, h // 4, w // 4, c), (s[1], s[2], s[0], 4 * s[1], 4 * s[2], 1)).reshape(36, -1)


def _overlaid(tiles: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """The transpose of `_tiles`: 36 × (tiles · C) to N×H×W×C, overlaps added up."""
    n, h, w, c = shape
    parts = tiles.view(6, 6, n, h // 4, w // 4, c)
    x = tiles.new_zeros(n, h + 2, w + 2, c)
    for i in range(h // 4):
        for j in range(w // 4):
            x[:, 4 * i : 4 * i + 6, 4 * j : 4 * j + 6] += parts[:, :, :, i, j].permute(2, 0, 1, 3)
    return x[:, 1:-1, 1:-1]


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        o = len(weight)
        inputs = (_INPUT @ _tiles(x.permute(0, 2, 3, 1))).view(36, -1, c)
        kernels = (_KERNEL @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(36, c, o)
        ctx.save_for_backward(inputs, kernels)
        ctx.size = h, w
        tiles = (_OUTPUT @ (inputs @ kernels).view(36, -1)).view(4, 4, n, h // 4, w // 4, o)
        return (tiles.permute(2, 3, 0, 4, 1, 5).reshape(n, h, w, o) + bias).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs, kernels = ctx.saved_tensors
        rows = gradients[0].permute(0, 2, 3, 1).contiguous()
        n, h, w, o = rows.shape
        c = kernels.shape[1]
        tiles = rows.view(n, h // 4, 4, w // 4, 4, o).permute(2, 4, 0, 1, 3, 5).reshape(16, -1)
        products = (_OUTPUT.T @ tiles).view(36, -1, o)
        of_weight = _KERNEL.T @ (inputs.transpose(1, 2) @ products).view(36, -1)
        of_x = _overlaid(_INPUT.T @ (products @ kernels.transpose(1, 2)).view(36, -1), (n, h, w, c))
        of_weight = of_weight.view(3, 3, c, o).permute(3, 2, 0, 1)
        return of_x.permute(0, 3, 1, 2), of_weight, rows.sum((0, 1, 2))


class WinogradConv2d(torch.nn.Conv2d):
    """A 3×3 convolution of stride 1 and padding 1 with a bias, of pictures whose sides are multiples of 4."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """N×C×H×W to N×C'×H×W, channels last."""
        assert self.bias is not None
        return _Winograd.apply(input, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


def use_winograd(module: torch.nn.Module) -> None:
    """Make every wide 3×3 convolution of stride 1 in `module` one of these, in place; its weights stay as they are."""
    for part in module.modules():
        square = (3, 3), (1, 1), (1, 1)
        if type(part) is torch.nn.Conv2d and (part.kernel_size, part.stride, part.padding) == square:
            part.__class__ = WinogradConv2d

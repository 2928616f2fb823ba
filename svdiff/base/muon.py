"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U Vᵀ of an m×n matrix U S Vᵀ, by Newton and Schulz's iteration in bfloat16: singular values in about 0.7 to 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # the authors' coefficients: steep at zero, not exact at one
    x = matrix.bfloat16()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised for each weight as a c_out × rest matrix.

    Steps have the root mean square of AdamW's (0.2 × lr an entry; Liu et al., 2025), so that one rate serves both.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                moving = state.setdefault("momentum", torch.zeros_like(p))
                moving.lerp_(p.grad, 1 - group["momentum"])
                direction = orthogonal(p.grad.lerp(moving, group["momentum"]).reshape(len(p), -1))
                scale = 0.2 * max(direction.shape) ** 0.5
                p.add_(direction.view(p.shape), alpha=-group["lr"] * scale)

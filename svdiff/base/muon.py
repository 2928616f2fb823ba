"""Muon: momentum whose matrices are made orthogonal before they are applied (Jordan et al., 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearly U Vᵀ of an m×n matrix U S Vᵀ, by Newton and Schulz's iteration: singular values in about 0.7 to 1.2.

    The iteration x ← (a + b g + c g²) x with g = x xᵀ runs on the small side's square g alone, whose powers commute;
    the matrix itself is multiplied twice, not fifteen times.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # the authors' coefficients: steep at zero, not exact at one
    x = matrix
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    one = torch.eye(len(x), dtype=x.dtype)
    factor = one
    for _ in range(steps):
        polynomial = a * one + b * gram + c * gram @ gram
        factor, gram = polynomial @ factor, polynomial @ polynomial @ gram
    x = factor @ x
    return x.T if tall else x


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

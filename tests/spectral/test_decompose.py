"""Decomposition against float64 LAPACK, on full-rank, rank-deficient and badly scaled matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdiff.spectral.basis import factorise, fingerprint
from svdiff.spectral.decompose import as_matrix, from_matrix, svd


def random_matrix(m: int, n: int, spectrum: str) -> torch.Tensor:
    k = min(m, n)
    u, v = torch.linalg.qr(torch.randn(m, k).double())[0], torch.linalg.qr(torch.randn(n, k).double())[0]
    sigma = {
        "flat": torch.ones(k),
        "steep": torch.logspace(0, -12, k),
        "half": torch.cat([torch.linspace(2, 1, k - k // 2), torch.zeros(k // 2)]),
        "tail": torch.cat([torch.linspace(2, 1, k - k // 2), torch.full((k // 2,), 1e-7)]),
        "zero": torch.zeros(k),
    }[spectrum].double()
    return ((u * sigma) @ v.T).float()


MATRICES = {
    "square": torch.randn(96, 96),
    "wide": torch.randn(40, 300),
    "tall": torch.randn(300, 40),
    "one": torch.randn(1, 7),
    "column": torch.randn(7, 1),
    "eye": torch.eye(20),
    "repeated": torch.randn(30, 1).expand(30, 50).contiguous(),
    **{f"{s}-{m}x{n}": random_matrix(m, n, s) for s in ("flat", "steep", "half", "tail", "zero") for m, n in ((48, 48), (32, 120), (120, 32))},
}  # fmt: skip


@pytest.mark.parametrize("name", MATRICES)
def test_is_a_singular_value_decomposition(name: str) -> None:
    w = MATRICES[name]
    u, sigma, vh = (part.float() for part in svd(w))
    k = min(w.shape)
    exact = torch.linalg.svdvals(w.double())
    top = float(exact[0])
    assert u.shape == (w.shape[0], k)
    assert vh.shape == (k, w.shape[1])
    assert (sigma - exact).abs().max() <= 1e-5 * top
    assert (sigma >= 0).all()
    assert (sigma.diff() <= 1e-6 * top).all(), "descending"
    eye = torch.eye(k)
    assert (u.T @ u - eye).abs().max() <= 1e-5
    assert (vh @ vh.T - eye).abs().max() <= 1e-5
    assert torch.linalg.norm(w - (u * sigma) @ vh) <= 1e-6 * torch.linalg.norm(w)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.floats(1e-6, 1e3), st.integers(0, 99))
def test_any_shape_rank_and_scale(m: int, n: int, rank: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    rank = min(rank, m, n)
    w = scale * (torch.randn(m, rank) @ torch.randn(rank, n))
    u, sigma, vh = svd(w)
    assert torch.allclose((u * sigma) @ vh, w.double(), atol=1e-8 * float(w.norm() + 1e-30))
    assert (vh @ vh.T - torch.eye(min(m, n))).abs().max() < 1e-8
    assert (u.T @ u - torch.eye(min(m, n))).abs().max() < 1e-8


def test_reshapes_as_the_paper_and_back() -> None:
    w = torch.randn(5, 7, 3, 2)
    assert as_matrix(w).shape == (5, 42)
    assert as_matrix(w, transposed=True).shape == (7, 30)
    for transposed in (False, True):
        assert torch.equal(from_matrix(as_matrix(w, transposed=transposed), w.shape, transposed=transposed), w)


def test_fingerprint_sees_directions_and_not_signs_or_rounding() -> None:
    factors = factorise(torch.nn.Linear(64, 48), torch.randn(48, 64))
    signs = torch.where(torch.arange(48) % 3 == 0, -1.0, 1.0)
    flipped = fingerprint(factors.u * signs, factors.vh * signs[:, None])
    noisy = fingerprint(factors.u + 1e-7 * torch.randn(48, 48), factors.vh)
    turned = factors.vh.clone()
    turned[[3, 4]] = turned[[4, 3]]
    assert abs(flipped - factors.fingerprint) < 1e-5
    assert abs(noisy - factors.fingerprint) < 1e-5
    assert abs(fingerprint(factors.u, turned) - factors.fingerprint) > 1e-2

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from svdiff.spectral import cpu


def strided(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).T if transposed else torch.randn(rows, columns)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 40), (33, 128, 65)])
@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("added", [None, "row", "column", "matrix"])
def test_onednn_multiplies_as_float64_does(
    shape: tuple[int, int, int], layout: tuple[bool, bool], added: str | None
) -> None:
    torch.manual_seed(0)
    m, k, n = shape
    a, b = strided(m, k, layout[0]).requires_grad_(), strided(k, n, layout[1]).requires_grad_()
    sizes = {None: None, "row": (n,), "column": (m, 1), "matrix": (m, n)}
    add = None if (size := sizes[added]) is None else torch.randn(size, requires_grad=True)
    inputs = [x for x in (a, b, add) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert cpu.onednn_is_faster(a, b)

    y = cpu.product(a, b, add)
    expected = exact[0] @ exact[1] + (exact[2] if add is not None else 0)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    g = torch.randn(m, n)
    found = torch.autograd.grad(y, inputs, g)
    for one, other in zip(found, torch.autograd.grad(expected, exact, g.double()), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(cpu.product(a, b, add), y)
        together = cpu.batched_product(torch.stack([a, -a]), torch.stack([b, b]), add)
        torch.testing.assert_close(together[0], y, atol=1e-5, rtol=1e-5)


class Operands(TorchDispatchMode):
    """Notes what oneDNN is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_linear_pointwise" in str(func):
            self.seen += args[:2]
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("by_onednn")
def test_operands_with_gaps_are_closed_first() -> None:
    a, b = torch.randn(16, 40)[:, 3:20], torch.randn(40, 9)[3:20, ::2]
    with Operands() as operands:
        y = cpu.product(a, b)
    torch.testing.assert_close(y, a @ b, atol=1e-5, rtol=1e-5)
    assert len(operands.seen) == 2
    assert all(x.is_contiguous() or x.T.is_contiguous() for x in operands.seen)


@pytest.mark.usefixtures("by_onednn")
def test_only_float32_on_a_cpu_goes_by_onednn() -> None:
    a, b = torch.randn(8, 8), torch.randn(8, 8)
    assert cpu.onednn_is_faster(a, b)
    assert not cpu.onednn_is_faster(a.double(), b.double())
    assert not cpu.onednn_is_faster(a.bfloat16(), b.bfloat16())
    assert not cpu.onednn_is_faster(a.to("meta"), b.to("meta"))


@pytest.mark.usefixtures("by_onednn")
def test_one_switch_turns_all_routes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    a, picture, kernel = torch.randn(8, 8), torch.randn(1, 4, 3, 3), torch.randn(90, 4, 3, 3)
    assert cpu.onednn_is_faster(a, a)
    assert cpu.unfolding_is_cheaper(picture, kernel, (3, 3))
    monkeypatch.setattr(cpu, "ON", False)
    monkeypatch.setattr(cpu, "_malloc_trim", lambda: pytest.fail("memory is given back"))
    assert not cpu.onednn_is_faster(a, a)
    assert not cpu.unfolding_is_cheaper(picture, kernel, (3, 3))
    cpu.trim()


def test_small_products_stay_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_mkl_holds_back", lambda: True)
    small, large = torch.randn(64, 64), torch.randn(512, 512)
    assert not cpu.onednn_is_faster(small, small)
    assert cpu.onednn_is_faster(large, large)

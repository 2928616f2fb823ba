"""The arithmetic of memory against bytes that attached layers hold."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from svdiff.models import sizes
from svdiff.models.memory import CARDS, TRAINED, largest_rank, said, training_memory
from svdiff.spectral import attach, load_basis
from svdiff.spectral.layers import SpectralMatrix

build = cache(sizes.build)


def held(module: torch.nn.Module, shifts: list[torch.Tensor], sigmas: list[torch.Tensor]) -> int:
    """Bytes of all tensors, each storage once."""
    tensors = [*module.parameters(), *module.buffers(), *shifts, *sigmas]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("subset", ["all", "attention", "UNet-4D"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_arithmetic_is_what_a_training_holds(
    tiny_pipe, tmp_path: Path, subset: str, dtype: torch.dtype, rank: int | None
) -> None:
    unet = tiny_pipe.unet.to(dtype)
    expected = training_memory(unet, subset, rank, dtype.itemsize)
    basis = load_basis(unet, tmp_path, rank=rank, progress=False)
    attached = attach(unet, basis, subset=subset, rank=rank)
    optimizer = torch.optim.AdamW(attached.parameters())
    for parameter in attached.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    sigmas = [layer.sigma for layer in attached.layers.values() if isinstance(layer, SpectralMatrix)]
    state = [t for kept in optimizer.state.values() for t in kept.values() if t.numel() > 1]
    gradients = [p.grad for p in attached.parameters() if p.grad is not None]
    measured = held(unet, [*attached.parameters(), *gradients, *state], sigmas)
    assert measured == pytest.approx(expected.total, rel=0.01)
    assert expected.shifts == TRAINED * sum(p.numel() for p in attached.parameters())


def test_what_fits_grows_with_the_card_and_a_limited_rank_costs_k_times_m_plus_n() -> None:
    flux = build("flux")
    ranks = [largest_rank(flux, card) for card in (12, 24, 48, 80)]
    assert ranks[:2] == [0, 0]  # its weights in bf16 take 22 GiB
    assert ranks[2:] == [None, None]
    limited = largest_rank(build("sd3.5-large"), 24)
    assert limited is not None
    large = build("sd3.5-large")
    inside, outside = (training_memory(large, rank=k, itemsize=2).total for k in (limited, limited + 1))
    assert inside <= 0.8 * 24 * 2**30 < outside
    one, two = (training_memory(flux, rank=k, itemsize=2) for k in (1, 2))
    assert one.weights == two.weights == 2 * sum(p.numel() for p in flux.parameters())
    assert two.factors == 2 * one.factors
    assert largest_rank(build("sd15"), 12) is None


@pytest.mark.parametrize(
    "base", ["sd15", "sdxl", "sd3.5-medium", "sd3.5-large", "flux", pytest.param("flux2", marks=pytest.mark.slow)]
)
def test_the_documentation_says_what_fits(base: str) -> None:
    network = build(base)
    cells = [said(largest_rank(network, card)) for card in CARDS]
    weights, whole = 2 * sum(p.numel() for p in network.parameters()), training_memory(network, itemsize=2).total
    line = f"| {base} | {weights / 2**30:.1f} | {whole / 2**30:.1f} | {' | '.join(cells)} |"
    assert line in (Path(__file__).parents[2] / "docs/models.md").read_text()

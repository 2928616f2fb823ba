"""A random tiny UNet with all of Stable Diffusion's layer kinds, and its decomposition."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from svdiff.spectral import Basis, cpu, load_basis


def perturb(shifts, scale: float = 0.05, seed: int = 0) -> None:
    """Random shifts, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shifts.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unet(tiny_pipe) -> nn.Module:
    return tiny_pipe.unet


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of decompositions that the tests share."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture
def basis(unet: nn.Module, bases: Path) -> Basis:
    return load_basis(unet, bases, progress=False)


@pytest.fixture
def call(unet: nn.Module):
    """The tiny UNet as a function of nothing."""
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, 16)
    return lambda model=unet: model(sample, torch.tensor([3, 500]), text).sample


@pytest.fixture
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor where MKL holds back, and for products of any size."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(cpu, "_mkl_holds_back", lambda: True)
    monkeypatch.setattr(cpu, "_FEW", 0)
    monkeypatch.setattr(cpu, "_FEW_EACH", 0)

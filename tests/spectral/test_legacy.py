"""Files of svdiff-pytorch 0.2, whose layers rebuild every weight by `torch.linalg.svd`, norms as 1 x C matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import Basis, attach, import_spectral_shifts, load_basis


def rebuilt(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """What that package computes for one weight."""
    matrix = weight[None] if weight.ndim == 1 else weight.flatten(1)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ torch.diag(F.relu(s + delta)) @ vh).view(weight.shape).float()


def old_file(module: nn.Module, path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random shifts under that package's names; returns the weights it would use."""
    shifts, weights = {}, {}
    for name, weight in module.named_parameters():
        if name.endswith(".weight"):
            size = 1 if weight.ndim == 1 else min(weight.flatten(1).shape)
            shifts[prefix + name.replace(".weight", ".delta")] = delta = 0.1 * torch.randn(size)
            weights[name] = rebuilt(weight.detach(), delta)
    save_file(shifts, path)
    return weights


def test_unet(unet: nn.Module, basis: Basis, call, tmp_path: Path) -> None:
    wanted = old_file(unet, tmp_path / "spectral_shifts.safetensors")
    delta = import_spectral_shifts(tmp_path / "spectral_shifts.safetensors", unet, basis)
    y = call(lambda *args: torch.func.functional_call(unet, wanted, args))
    assert len(delta.tensors) == len(wanted)
    shifts = attach(unet, basis)
    shifts.load(delta)
    assert (call() - y).abs().max() < 1e-4
    for name, layer in shifts.layers.items():
        assert torch.allclose(layer.shifted_weight(), wanted[name], atol=1e-5), name
    assert delta.norms == {f"unet.{n}" for n, w in wanted.items() if w.ndim == 1}


def test_text_encoder_with_the_names_of_its_time(tiny_pipe, bases: Path, tmp_path: Path) -> None:
    encoder = tiny_pipe.text_encoder
    prefix = "" if any(n.startswith("text_model.") for n, _ in encoder.named_parameters()) else "text_model."
    wanted = old_file(encoder, tmp_path / "te.safetensors", prefix)
    basis = load_basis(encoder, bases, progress=False)
    delta = import_spectral_shifts(tmp_path / "te.safetensors", encoder, basis, prefix="text_encoder")
    shifts = attach(encoder, basis, prefix="text_encoder")
    shifts.load(delta)
    for name, layer in shifts.layers.items():
        assert torch.allclose(layer.shifted_weight(), wanted[name], atol=1e-5), name


def test_files_of_another_model_are_refused(unet: nn.Module, basis: Basis, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(SvdiffError, match="cannot read"):
        import_spectral_shifts(path, unet, basis)
    save_file({"nowhere.delta": torch.zeros(3)}, path)
    with pytest.raises(SvdiffError, match=r"'nowhere.delta', which is no layer"):
        import_spectral_shifts(path, unet, basis)
    save_file({"conv_in.delta": torch.zeros(3)}, path)
    with pytest.raises(SvdiffError, match="has 3 shifts, this model's layer 16"):
        import_spectral_shifts(path, unet, basis)

"""Deltas of svdiff-pytorch 0.2, `spectral_shifts.safetensors` (UNet) and `spectral_shifts_te.safetensors`."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import Basis
from svdiff.spectral.delta import SpectralDelta, identity
from svdiff.spectral.subsets import weights


def import_spectral_shifts(path: str | Path, module: nn.Module, basis: Basis, *, prefix: str = "unet") -> SpectralDelta:
    """Read such a file for `module`, the base it was trained on; it names no base, so that cannot be checked.

    Keys are `<layer>.delta`. A norm has one scalar there, the shift of its weight's length; it is widened to the
    shift of each element that it stands for. Raises SvdiffError for layers the module lacks or other sizes.
    """
    try:
        stored = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise SvdiffError(f"cannot read {path}: {error}") from None
    base = weights(module)
    tensors: dict[str, Tensor] = {}
    for key, shifts in stored.items():
        name = _weight_name(key, base)
        if name is None:
            raise SvdiffError(f"{path} has {key!r}, which is no layer of this {type(module).__name__}")
        weight = base[name].detach().float().cpu()
        widened = _widen(shifts.float(), weight) if weight.ndim == 1 else shifts.float().reshape(-1)
        expected = len(weight) if weight.ndim == 1 else len(basis[name].sigma)
        if len(widened) != expected:
            raise SvdiffError(f"{path}: {key!r} has {len(widened)} shifts, this model's layer {expected}")
        tensors[f"{prefix}.{name}"] = widened
    norms = [n.removeprefix(f"{prefix}.") for n, v in tensors.items() if base[n.removeprefix(f"{prefix}.")].ndim == 1]
    sizes = {n.removeprefix(f"{prefix}."): len(v) for n, v in tensors.items()}
    known = SpectralDelta.zeros(sizes, norms, prefix=prefix).metadata
    source = {"subset": "UNet", "rank": "full", "imported_from": f"svdiff-pytorch: {Path(path).name}"}
    return SpectralDelta(tensors, known | source | identity(basis, prefix, sizes))


def _weight_name(key: str, base: dict[str, Tensor]) -> str | None:
    """`<layer>.delta` -> the weight's name here; transformers has dropped a level of names since."""
    name = f"{key.removesuffix('.delta')}.weight"
    candidates = (name, name.removeprefix("text_model."), f"text_model.{name}")
    return next((candidate for candidate in candidates if candidate in base), None)


def _widen(scalar: Tensor, weight: Tensor) -> Tensor:
    """Shift of a 1 x C matrix's one singular value `‖w‖`, said element by element."""
    if scalar.numel() != 1:
        return scalar.reshape(-1)
    length = weight.norm()
    if length == 0:
        return torch.zeros_like(weight)
    return weight * ((length + scalar.reshape(())).clamp_min(0) / length - 1)

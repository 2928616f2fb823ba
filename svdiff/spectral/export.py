"""Concepts for tools that know nothing of spectra: plain weights (exact) and LoRA (exact but for norms)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file, sort_safetensors_metadata
from svdiff.spectral.basis import TRANSPOSED, Basis, Factors
from svdiff.spectral.delta import SpectralDelta
from svdiff.spectral.layers import SpectralLayer

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te"}
"""Names of Stable Diffusion 1.x and 2.x in kohya's layout."""


def fused_state_dict(
    module: nn.Module, basis: Basis, delta: SpectralDelta, *, prefix: str = "unet"
) -> dict[str, Tensor]:
    """The state dict of `module` with the delta's shifts in its weights; the module itself is not changed."""
    if any(isinstance(layer, SpectralLayer) for layer in module.modules()):
        raise SvdiffError("the model has shifts in its layers already: detach them before adding those of a delta")
    delta.check(basis, prefix)
    state = module.state_dict()
    for name, shifts in delta.part(prefix).items():
        if name not in state:
            raise SvdiffError(f"the delta shifts {name!r}, which {type(module).__name__} does not have")
        if name in basis:
            transposed = isinstance(module.get_submodule(name.rpartition(".")[0]), TRANSPOSED)
            state[name] = basis[name].shifted_weight(shifts, state[name], transposed=transposed)
        else:
            state[name] = (state[name].float() + shifts.view(state[name].shape)).to(state[name].dtype)
    return state


def lora_factors(factors: Factors, shifts: Tensor, rank: int | None) -> tuple[Tensor, Tensor] | None:
    """`(A (k, N), B (M, k))` with `B A` the `rank` largest changes of `W_δ − W = U diag(σ_δ − σ) Vᵀ`.

    None where nothing changes. Singular directions are orthonormal, so no other matrix of that rank is nearer.
    """
    change = factors.change(shifts)
    largest = change.abs().argsort(descending=True, stable=True)[: rank or len(change)]
    largest = largest[change[largest] != 0]
    if not len(largest):
        return None
    # Both sides get the root of the change, so that half precision suits them equally.
    root = change[largest].abs().sqrt()
    return factors.vh[largest] * root[:, None], factors.u[:, largest] * (root * change[largest].sign())


def export_lora(
    modules: Mapping[str, nn.Module],
    bases: Mapping[str, Basis],
    delta: SpectralDelta,
    path: str | Path,
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    kohya: Mapping[str, str] = KOHYA,
) -> list[str]:
    """Write a LoRA that `load_lora_weights` of diffusers' pipelines and most other tools accept.

    `modules` and `bases` are by prefix (`"unet"`, `"text_encoder"`); `rank` None keeps every change; `kohya`
    are the networks' names in that layout. Shifts that have no place in the format (norms, embeddings, grouped and transposed convolutions) are dropped with a warning;
    their names are returned.
    """
    tensors: dict[str, Tensor] = {}
    dropped: list[str] = []
    for prefix in delta.prefixes():
        if prefix not in modules:
            raise SvdiffError(f"the delta changes the {prefix}, which is not among {', '.join(modules)}")
        delta.check(bases[prefix], prefix)
        for name, shifts in delta.part(prefix).items():
            path_of = name.removesuffix(".weight")
            owner = modules[prefix].get_submodule(path_of)
            if not _has_lora(owner):
                dropped += [f"{prefix}.{name}"] if shifts.any() else []
            elif pair := lora_factors(bases[prefix][name], shifts, rank):
                a, b = (part.to(dtype).contiguous() for part in pair)
                if isinstance(owner, nn.Conv2d):
                    a, b = a.view(len(a), *owner.weight.shape[1:]), b.view(*b.shape, 1, 1)
                tensors |= _named(prefix, path_of, a, b, None if layout == "diffusers" else kohya[prefix])
    if not tensors:
        raise SvdiffError("nothing of this delta can be said as a LoRA: it changes norms or embeddings alone")
    if dropped:
        warnings.warn(
            f"LoRA has no place for {len(dropped)} of the shifts (norms, embeddings), such as {dropped[0]!r}: "
            "dropped. Export plain weights to keep them.",
            stacklevel=2,
        )
    metadata = {key: value for key, value in delta.metadata.items() if key not in ("norms", "fingerprints")}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {"svdiff": json.dumps(metadata, sort_keys=True), "format": "pt"})
        sort_safetensors_metadata(temporary)
    return dropped


def _has_lora(owner: nn.Module) -> bool:
    return isinstance(owner, nn.Linear) or (isinstance(owner, nn.Conv2d) and owner.groups == 1)


def _named(prefix: str, path: str, a: Tensor, b: Tensor, kohya: str | None) -> dict[str, Tensor]:
    """Keys of one layer in a LoRA file; without alphas, which some readers mislay, every tool scales by 1.

    Other tools know CLIP's layers under `text_model`, as files always had them; transformers 5 leaves that out.
    """
    if prefix.startswith("text_encoder") and path.startswith("encoder.layers."):
        path = f"text_model.{path}"
    if kohya is None:
        return {f"{prefix}.{path}.lora_A.weight": a, f"{prefix}.{path}.lora_B.weight": b}
    root = f"{kohya}_{path.replace('.', '_')}"
    return {f"{root}.lora_down.weight": a, f"{root}.lora_up.weight": b}


def changes(
    module: nn.Module, basis: Basis, delta: SpectralDelta, *, prefix: str = "unet"
) -> Iterator[tuple[str, Tensor]]:
    """`(name, W_δ − W)` of every shifted weight, in float32: for comparing deltas with other adapters."""
    base = module.state_dict()
    for name, weight in fused_state_dict(module, basis, delta, prefix=prefix).items():
        if f"{prefix}.{name}" in delta.tensors:
            yield name, weight.float() - base[name].float()

"""Deltas of the baselines (full weights, LoRA, Custom Diffusion): files of ΔW, and loading them as W₀ + sΔW (Fig. 26)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file, sort_safetensors_metadata
from svdiff.models import family_of
from svdiff.spectral import weights_hash
from svdiff.spectral.delta import metadata_key
from svdiff.spectral.tokens import MARK, mix_changes, parse_token_name

FORMAT = "svdiff-weights-delta"
FORMAT_VERSION = "1"


def base_hashes(pipe: Any, networks: Sequence[str]) -> dict[str, str]:
    """`weights_hash` of networks by the metadata keys that spectral deltas use as well."""
    return {metadata_key(name, "base_hash"): weights_hash(getattr(pipe, name)) for name in networks}


def save_weights_delta(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write changes of weights; `metadata` holds `base_hashes`, which say where they fit. Equal content, equal bytes."""
    from safetensors.torch import save_file

    check_finite(path, tensors)
    known = {"format": FORMAT, "format_version": FORMAT_VERSION}
    with atomic_file(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata=dict(metadata) | known)
        sort_safetensors_metadata(temporary)


def check_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise SvdiffError for numbers that are not finite, which a training that diverged leaves behind."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SvdiffError(f"{path}: '{name}' has values that are not finite; train again with lower rates")


def read_weights_delta(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that a baseline wrote. Raises SvdiffError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise SvdiffError(f"{path} cannot be read as safetensors: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("format_version") != FORMAT_VERSION:
        found = f"{metadata.get('format', 'no format')} {metadata.get('format_version', '')}".strip()
        raise SvdiffError(
            f"{path} is not a baseline's delta: its metadata says '{found}', expected '{FORMAT} {FORMAT_VERSION}'"
        )
    check_finite(path, tensors)
    return tensors, metadata


def is_weights_delta(path: str | Path) -> bool:
    """Whether `path` was written by a baseline (full, Custom Diffusion, LoRA), and not by spectral shifts."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return False


class LoadedWeights:
    """A baseline's changes on a pipeline: W₀ + sΔW (Fig. 26). `unload` gives back the base bit for bit."""

    def __init__(self, changes: list[tuple[Parameter, Tensor, int | None]], metadata: dict[str, str]) -> None:
        self.metadata = metadata
        self._changes = changes
        self._base = [parameter.data for parameter, _, _ in changes]

    def set_scale(self, scale: float) -> None:
        """Use W₀ + `scale`·ΔW; 0 is the base, 1 what was trained."""
        for (parameter, _, _), base in zip(self._changes, self._base, strict=True):
            parameter.data = base.clone()
        if scale == 0:  # so that 0 leaves even negative zeros alone
            return
        for (parameter, change, row), base in zip(self._changes, self._base, strict=True):
            where: Any = slice(None) if row is None else row
            parameter.data[where] = (base[where].float() + scale * change.to(base.device)).to(base.dtype)

    def unload(self) -> None:
        """The base's own tensors again."""
        for (parameter, _, _), base in zip(self._changes, self._base, strict=True):
            parameter.data = base


def load_weights_delta(pipe: Any, path: str | Path, scale: float = 1.0) -> LoadedWeights:
    """Put a baseline's delta (full weights, Custom Diffusion or LoRA) on `pipe`, in place.

    Args:
        pipe: the base that it was trained on; nothing else may be attached to it.
        path: what `Method.save` of a baseline wrote.
        scale: s of W₀ + sΔW (Fig. 26); LoRA's product BA counts as ΔW.

    Returns:
        A handle with `set_scale` and `unload`.

    Raises:
        SvdiffError: another kind of file, another base, or weights that the pipeline does not have.
    """
    loaded = load_weights_deltas(pipe, [(path, 1.0)])
    if scale != 1:
        loaded.set_scale(scale)
    return loaded


def load_weights_deltas(pipe: Any, parts: Sequence[tuple[str | Path, float]]) -> LoadedWeights:
    """Put the weighted sum of baselines' deltas on `pipe`: W₀ + Σ wᵢΔWᵢ (Fig. 8). Otherwise as `load_weights_delta`."""
    total: dict[str, Tensor] = {}
    tokens: list[tuple[dict[str, Tensor], float]] = []
    for path, share in parts:
        tensors, metadata = read_weights_delta(path)
        _check_base(pipe, path, metadata)
        tokens.append(({name: tensors.pop(name).float() for name in list(tensors) if MARK in name}, share))
        for name, change in _products(tensors).items():
            scaled = change.float() if share == 1 else share * change.float()
            total[name] = total[name] + scaled if name in total else scaled
    changes: list[tuple[Parameter, Tensor, int | None]] = []
    for name, tensor in total.items():
        network, _, weight = name.partition(".")
        parameter = getattr(pipe, network).get_parameter(weight)
        changes.append((parameter, tensor.reshape(parameter.shape), None))
    for name, tensor in mix_changes(tokens).items():  # after the whole table, should that have been trained as well
        encoder, row = parse_token_name(name)
        changes.append((getattr(pipe, encoder).get_input_embeddings().weight, tensor, row))
    loaded = LoadedWeights(changes, metadata)
    loaded.set_scale(1.0)
    return loaded


def _check_base(pipe: Any, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Raise SvdiffError unless the file was trained on the weights that `pipe` has."""
    networks = [name for name in family_of(pipe).parts if metadata_key(name, "base_hash") in metadata]
    for key, found in base_hashes(pipe, networks).items():
        if found != metadata[key]:
            raise SvdiffError(
                f"{path} was trained on another base ({metadata.get('base_model', 'unknown')}, {key} "
                f"{metadata[key][:12]}) than the one loaded ({found[:12]}); load that base, or train again"
            )


def _products(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Changes by weight name: LoRA's pairs multiplied out to BA, the rest as they are."""
    changes = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            b = tensors[f"{path}.lora_B.weight"]
            changes[f"{path}.weight"] = (b.flatten(1) @ tensor.flatten(1)).reshape(len(b), *tensor.shape[1:])
        elif not name.endswith(".lora_B.weight"):
            changes[name] = tensor
    return changes

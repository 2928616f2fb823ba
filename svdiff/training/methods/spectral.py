"""SVDiff itself (Sec. 3.2): spectral shifts of the denoising network, and of text encoders when asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.models import family_of, scratch
from svdiff.spectral import SpectralShifts, attach, combine, load_basis, select


class SpectralMethod:
    """Shifts on a pipeline's networks."""

    def __init__(self, pipe: Any, config: TrainConfig) -> None:
        parts = family_of(pipe).trained(config.subset, text_encoder=config.text_encoder)
        self.shifts: dict[str, SpectralShifts] = {}
        for name, subset in parts.items():
            module = getattr(pipe, name)
            basis = load_basis(module, scratch() / "bases", names=select(module, subset), rank=config.rank)
            self.shifts[name] = attach(module, basis, subset=subset, rank=config.rank, prefix=name)

    @property
    def base_hash(self) -> str:
        """The bases' hashes, joined: that of the denoising network first."""
        return "+".join(shifts.basis.base_hash for shifts in self.shifts.values())

    def parameters(self) -> dict[str, list[Parameter]]:
        """See `Method`."""
        matrices: dict[str, list[Parameter]] = {"lr": [], "lr_text_encoder": []}
        for part, shifts in self.shifts.items():
            matrices["lr_text_encoder" if part.startswith("text_encoder") else "lr"] += shifts.parameters_spectral()
        return matrices | {"lr_1d": [p for shifts in self.shifts.values() for p in shifts.parameters_1d()]}

    def state(self) -> dict[str, Tensor]:
        """See `Method`."""
        return {f"{part}.{name}": value for part, s in self.shifts.items() for name, value in s.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        for part, shifts in self.shifts.items():
            own = {name.removeprefix(f"{part}."): v for name, v in state.items() if name.startswith(f"{part}.")}
            shifts.load_state_dict(own)

    @torch.no_grad()
    def save(self, path: Path, metadata: dict[str, str], tokens: Mapping[str, Tensor] | None = None) -> None:
        """See `Method`."""
        delta = combine([(shifts.delta(**metadata), 1.0) for shifts in self.shifts.values()])
        replace(delta, tokens=dict(tokens or {})).save(path)

    def detach(self) -> None:
        """See `Method`."""
        for shifts in self.shifts.values():
            shifts.detach()

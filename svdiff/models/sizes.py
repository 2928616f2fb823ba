"""Networks of real size without memory: of well-known bases by a short name, or of any base by its configurations."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdiff.errors import SvdiffError
from svdiff.models.family import FAMILIES, Family, family_class
from svdiff.models.imports import import_diffusers
from svdiff.models.loading import family_at

if TYPE_CHECKING:
    from torch import nn


def families() -> list[type[Family]]:
    """All families."""
    return [family_class(name, name) for name in FAMILIES]


def known_sizes() -> dict[str, type[Family]]:
    """Short names of well-known bases, each with its family."""
    return {name: family for family in families() for name in family.sizes}


def family_named(base: str) -> type[Family]:
    """The family of a well-known base, a diffusers folder or a Hub id. Raises SvdiffError if it is none."""
    from svdiff.config import BaseModelConfig

    known = known_sizes()
    if base not in known and "/" not in base and not Path(base).exists():
        raise SvdiffError(
            f"base '{base}' is no folder here and no Hub id, which would be owner/name; sizes that are known by name: "
            f"{', '.join(known)}"
        )
    return known[base] if base in known else family_at(BaseModelConfig(model=base))


def build(base: str, part: str | None = None, device: str = "meta", **changes: Any) -> nn.Module:
    """A network of a base (`part`, else the denoising one): with no weights on the meta device, else random ones.

    `changes` are entries of a well-known base's configuration that are to be others. Raises SvdiffError for a base that
    is not there, or one without that part.
    """
    known = known_sizes()
    family = known[base] if base in known else family_named(base)
    part = part or family.network_name
    if base in known:
        if part not in family.sizes[base]:
            raise SvdiffError(f"no size of '{part}' is known for {base}; known: {', '.join(family.sizes[base])}")
        kind, settings = family.sizes[base][part]
        return _made(kind, dict(settings) | changes, device)
    return _made(*_configured(base, part), device)


def _configured(base: str, part: str) -> tuple[str, Any]:
    """Class and configuration of a part of a folder or Hub id."""
    from diffusers import AutoencoderKL, DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(base)
        kind = (index.get(part) or [None, None])[1]
        if kind is None:
            raise SvdiffError(f"'{base}' has no {part}")
        return kind, AutoencoderKL.load_config(base, subfolder=part)
    except OSError as error:
        raise SvdiffError(f"the configuration of {part} of '{base}' cannot be read: {error}") from None


def _made(kind: str, settings: dict[str, Any], device: str) -> nn.Module:
    """A module of diffusers or transformers by the name of its class."""
    import torch

    from svdiff.models.meta import WithoutNumbers

    import_diffusers()
    with torch.device(device), WithoutNumbers():
        for library in ("diffusers", "transformers"):
            found = getattr(import_module(library), kind, None)
            if found is not None:
                config = found.config_class(**settings) if library == "transformers" else None
                made: nn.Module = found(config) if config else found.from_config(settings)
                return made
    raise SvdiffError(f"neither diffusers nor transformers has a {kind}")

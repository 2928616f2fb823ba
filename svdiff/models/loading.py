"""Loading the model that is personalised: a diffusers folder or Hub id of a supported family."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError
from svdiff.models.family import Family, family_class, family_of

if TYPE_CHECKING:
    import torch


def check_layout(folder: Path) -> type[Family]:
    """The family of a folder. Raises SvdiffError for another layout, saying what it is instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SvdiffError(
            f"base.model is '{folder}', a folder without model_index.json; expected a diffusers folder "
            "(for the embedded base run `dvc pull models/base`)"
        )
    return _class_of(str(folder), json.loads(index.read_text()))


def _class_of(model: str, index: dict[str, Any]) -> type[Family]:
    """The family that a model_index.json names."""
    return family_class(str(index.get("_class_name")), model)


def family_at(base: BaseModelConfig) -> type[Family]:
    """The family of a base by its model_index.json alone: some kilobytes, before gigabytes.

    Raises SvdiffError for another architecture or a missing folder.
    """
    from diffusers import DiffusionPipeline

    if Path(base.model).is_dir():
        return check_layout(Path(base.model))
    if base.model.startswith((".", "/", "models/")) or base.model.count("/") > 1:
        raise SvdiffError(
            f"base.model '{base.model}' is not a folder here (looked from {Path.cwd()}); "
            "run `dvc pull models/base` for the embedded base, or name a folder or Hub id"
        )
    try:
        index = DiffusionPipeline.load_config(base.model, revision=base.revision, local_files_only=offline())
    except (OSError, ValueError) as error:
        raise SvdiffError(f"base.model '{base.model}' cannot be loaded: {error}") from error
    return _class_of(base.model, index)


def offline() -> bool:
    """Whether the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE") == "1"


def load_pipeline(base: BaseModelConfig, *, dtype: torch.dtype | None = None) -> Any:
    """The base as diffusers' pipeline, in float32 unless `dtype` says otherwise; `family_of` is the view of it for us.

    A local folder is read without touching the network. Raises SvdiffError for another architecture or a missing folder.
    """
    import diffusers
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging

    # Loading takes a second or two: bars are for long work.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    family = family_at(base)
    try:
        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            base.model,
            revision=base.revision,
            dtype=dtype or torch.float32,
            local_files_only=Path(base.model).is_dir() or offline(),
            **family.load_options,
        )
    except (OSError, ValueError) as error:
        raise SvdiffError(f"base.model '{base.model}' cannot be loaded: {error}") from error
    family.prepare(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in family_of(pipe).parts.values():
        part.requires_grad_(False).eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def native_size(base: BaseModelConfig) -> int:
    """Side of a base's native pictures in pixels, from its configurations alone.

    Raises SvdiffError for another architecture or a missing folder.
    """
    from diffusers import AutoencoderKL

    family = family_at(base)
    try:
        configs = {
            name: AutoencoderKL.load_config(
                base.model, subfolder=name, revision=base.revision, local_files_only=offline()
            )
            for name in (family.network_name, "vae")
        }
    except (OSError, ValueError) as error:
        raise SvdiffError(f"base.model '{base.model}' cannot be read: {error}") from error
    return family.native_size(configs)


def scratch() -> Path:
    """Folder for what is not a result: resume states, decompositions, caches. SVDIFF_HOME overrides .svdiff/."""
    return Path(os.environ.get("SVDIFF_HOME", ".svdiff"))

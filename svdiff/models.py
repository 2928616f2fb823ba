"""Loading the model that is personalised: any folder or Hub id with a Stable Diffusion 1.x/2.x layout."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

SUPPORTED = "StableDiffusionPipeline"


def check_layout(folder: Path) -> None:
    """Refuse a folder that is not a Stable Diffusion layout. Raises SvdiffError saying what it is instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SvdiffError(
            f"base.model is '{folder}', a folder without model_index.json; expected a diffusers folder with a "
            "Stable Diffusion layout (for the embedded base run `dvc pull models/base`)"
        )
    _check_class(str(folder), json.loads(index.read_text()))


def _check_class(model: str, index: dict[str, object]) -> None:
    """Raise SvdiffError unless a model_index.json is that of a supported pipeline."""
    found = index.get("_class_name")
    if found != SUPPORTED:
        raise SvdiffError(
            f"base.model '{model}' is a {found}; only {SUPPORTED} (Stable Diffusion 1.x and 2.x: one UNet, one CLIP "
            "text encoder) is supported"
        )


def load_pipeline(base: BaseModelConfig, *, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The base as a pipeline with a DDIM scheduler (Sec. 4), in float32 unless `dtype` says otherwise.

    A local folder is read without touching the network. Raises SvdiffError for another architecture or a missing folder.
    """
    import diffusers.utils.logging
    import torch
    import transformers.utils.logging
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    # Loading takes a second or two: bars are for long work.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    local = Path(base.model).is_dir()
    if local:
        check_layout(Path(base.model))
    elif base.model.startswith((".", "/", "models/")) or base.model.count("/") > 1:
        raise SvdiffError(
            f"base.model '{base.model}' is not a folder here (looked from {Path.cwd()}); "
            "run `dvc pull models/base` for the embedded base, or name a folder or Hub id"
        )
    here = local or os.environ.get("HF_HUB_OFFLINE") == "1"
    try:
        if not local:  # of the Hub: some kilobytes say what it is, before gigabytes
            index = StableDiffusionPipeline.load_config(base.model, revision=base.revision, local_files_only=here)
            _check_class(base.model, index)
        pipe = StableDiffusionPipeline.from_pretrained(
            base.model,
            revision=base.revision,
            dtype=dtype or torch.float32,
            local_files_only=here,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except SvdiffError:
        raise
    except (OSError, ValueError) as error:
        raise SvdiffError(f"base.model '{base.model}' cannot be loaded: {error}") from error
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.requires_grad_(False).eval()
    pipe.vae.requires_grad_(False).eval()
    pipe.text_encoder.requires_grad_(False).eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def image_size(pipe: StableDiffusionPipeline) -> int:
    """Side of the pipeline's native pictures in pixels."""
    return int(pipe.unet.config.sample_size * pipe.vae_scale_factor)


def native_size(base: BaseModelConfig) -> int:
    """Side of a base's native pictures in pixels, from its configuration alone.

    Raises SvdiffError for another architecture or a missing folder.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = Path(base.model)
    if folder.is_dir():
        check_layout(folder)
    try:
        unet = UNet2DConditionModel.load_config(base.model, subfolder="unet", revision=base.revision)
        vae = AutoencoderKL.load_config(base.model, subfolder="vae", revision=base.revision)
    except (OSError, ValueError) as error:
        raise SvdiffError(f"base.model '{base.model}' cannot be read: {error}") from error
    return int(unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))


def scratch() -> Path:
    """Folder for what is not a result: resume states, decompositions, caches. SVDIFF_HOME overrides .svdiff/."""
    return Path(os.environ.get("SVDIFF_HOME", ".svdiff"))

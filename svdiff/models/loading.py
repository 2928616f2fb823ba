"""Loading the model that is personalised: a diffusers folder, Hub id or single file of a supported family."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from svdiff.errors import SvdiffError
from svdiff.models.family import Family, family_class, family_of
from svdiff.models.imports import import_diffusers
from svdiff.words import is_folder

if TYPE_CHECKING:
    import torch

    from svdiff.config import BaseModelConfig

SINGLE_FILES = (".safetensors", ".ckpt")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def check_layout(folder: Path) -> type[Family]:
    """The family of a folder. Raises SvdiffError for another layout, saying what it is instead."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise SvdiffError(
            f"base.model is '{folder}', a folder without model_index.json; expected a diffusers folder "
            "(for the embedded base run `dvc pull models/base`)"
        )
    return family_class(str(json.loads(index.read_text()).get("_class_name")), str(folder))


def family_at(base: BaseModelConfig) -> type[Family]:
    """The family of a base by its model_index.json alone: some kilobytes, before gigabytes.

    Raises SvdiffError for another architecture or a missing folder.
    """
    model = _configured(base)
    if Path(model).is_dir():
        return check_layout(Path(model))
    with _readable(model):
        index = import_diffusers().DiffusionPipeline.load_config(
            model, revision=base.revision, local_files_only=offline()
        )
    return family_class(str(index.get("_class_name")), model)


def _configured(base: BaseModelConfig) -> str:
    """Folder or Hub id with the configuration of a base. Raises SvdiffError for what can be neither."""
    if base.model.endswith(SINGLE_FILES):
        if not Path(base.model).is_file():
            raise SvdiffError(f"base.model '{base.model}' is not a file here (looked from {Path.cwd()})")
        if base.config is None:
            raise SvdiffError(
                f"base.model '{base.model}' is a single file, which does not say what it holds: set base.config to a "
                "diffusers folder or Hub id with the same configuration"
            )
        return base.config
    if is_folder(base.model) and not Path(base.model).is_dir():
        raise SvdiffError(
            f"base.model '{base.model}' is not a folder here (looked from {Path.cwd()}); "
            "run `dvc pull models/base` for the embedded base, or name a folder or Hub id"
        )
    return base.model


def load_words(base: BaseModelConfig) -> Family:
    """A base in a folder as its family sees it, of which only the tokenizers are loaded: for checking tokens and prompts.

    Raises SvdiffError for another architecture or a missing folder.
    """
    import transformers

    family, folder = family_at(base), Path(_configured(base))
    with _readable(base.model):
        parts = json.loads((folder / "model_index.json").read_text())
        tokenizers = {
            name: getattr(transformers, part[1]).from_pretrained(folder / name, local_files_only=True)
            if part[1]
            else None
            for name, part in parts.items()
            if name.startswith("tokenizer")
        }
    return family(SimpleNamespace(**tokenizers))


def offline() -> bool:
    """Whether the Hub is not to be asked, but only its local cache."""
    return os.environ.get("HF_HUB_OFFLINE") == "1"


@contextmanager
def _readable(model: str) -> Iterator[None]:
    """Turn what the libraries raise for missing or broken files into SvdiffError."""
    try:
        yield
    except (OSError, ValueError) as error:
        hint = " (HF_HUB_OFFLINE is 1: only the local cache was looked in)" if offline() else ""
        raise SvdiffError(f"base.model '{model}' cannot be loaded: {error}{hint}") from error


def load_pipeline(base: BaseModelConfig, device: torch.device | None = None) -> Any:
    """The base as diffusers' pipeline, as section `base` of params.yaml asks; `family_of` is our view of it.

    It is on `device`, or on the GPU if there is one. A local folder is read without touching the network. Raises SvdiffError for another architecture or a missing folder.
    """
    diffusers = import_diffusers()
    import torch
    import transformers.utils.logging

    from svdiff.models.meta import WithoutNumbers

    # Loading takes a second or two: bars are for long work.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    family = family_at(base)
    loader, dtype = getattr(diffusers, family.pipeline), getattr(torch, DTYPES[base.precision])
    here, started = offline() or Path(base.model).exists(), time.time()
    with _readable(base.model), WithoutNumbers():
        if base.model.endswith(SINGLE_FILES):
            pipe = loader.from_single_file(
                base.model, config=base.config, torch_dtype=dtype, local_files_only=here, **family.load_options
            )
        else:
            pipe = loader.from_pretrained(
                base.model,
                revision=base.revision,
                variant=base.variant,
                dtype=dtype,
                local_files_only=here,
                **family.load_options,
            )
    family.prepare(pipe)
    pipe.set_progress_bar_config(disable=True)
    for part in family_of(pipe).parts.values():
        part.requires_grad_(False).eval()
    _fit(pipe, base)
    pipe = _placed(pipe, base, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if not base.model.endswith(SINGLE_FILES):
        _note_files(pipe, base, started)
    return pipe


def _note_files(pipe: Any, base: BaseModelConfig, started: float) -> None:
    """Tell `weights_hash` of which files the weights are."""
    import torch
    import transformers

    import svdiff
    from svdiff.spectral.hashing import loaded_from

    versions = [library.__version__ for library in (svdiff, torch, import_diffusers(), transformers)]
    how = json.dumps([base.precision, base.variant, versions])
    for name, part in family_of(pipe).parts.items():
        folder = Path(str(getattr(part.config, "_name_or_path", "")))
        if folder.name == name:
            loaded_from(part, folder.resolve(), how, started, scratch() / "hashes")


def _fit(pipe: Any, base: BaseModelConfig) -> None:
    """Set the size of pictures, and how the autoencoder saves memory."""
    if base.resolution is not None:
        pipe.default_sample_size = native_size(base) // pipe.vae_scale_factor
    if base.vae_slicing:
        pipe.vae.enable_slicing()
    if base.vae_tiling:
        pipe.vae.enable_tiling()


def _placed(pipe: Any, base: BaseModelConfig, device: torch.device) -> Any:
    """The pipeline on its device; on a GPU whole, or by parts as they run."""
    import torch

    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32
        torch.backends.cudnn.allow_tf32 = True
    if device.type == "cpu" or base.offload == "none":
        pipe.to(device)
    else:
        pipe.enable_model_cpu_offload(device=device)
    return pipe


def native_size(base: BaseModelConfig) -> int:
    """Side of a base's pictures in pixels, from its configurations alone.

    Raises SvdiffError for another architecture, a missing folder, or a size that is no whole number of patches.
    """
    family = family_at(base)
    configs = _configs(base, family)
    if base.resolution is None:
        return family.native_size(configs)
    if base.resolution % (side := family.patch_side(configs)):
        raise SvdiffError(
            f"base.resolution is {base.resolution}; expected a multiple of {side} pixels, the side of a patch"
        )
    return base.resolution


def is_distilled(base: BaseModelConfig) -> bool:
    """Whether a base was taught the guided prediction, so that Eq. 9 and negative prompts have no place; as `native_size`."""
    family, folder = family_at(base), Path(_configured(base))
    network, index = _configs(base, family)[family.network_name], folder / "model_index.json"
    return bool(
        network.get("guidance_embeds") or (index.is_file() and json.loads(index.read_text()).get("is_distilled"))
    )


def picture_grid(base: BaseModelConfig) -> int:
    """Pixels that the sides of a base's pictures are multiples of; as `native_size`."""
    family = family_at(base)
    return family.grid(_configs(base, family))


def _configs(base: BaseModelConfig, family: type[Family]) -> dict[str, Any]:
    load_config = import_diffusers().AutoencoderKL.load_config
    model = _configured(base)
    with _readable(model):
        return {
            name: load_config(model, subfolder=name, revision=base.revision, local_files_only=offline())
            for name in (family.network_name, "vae")
        }


def scratch() -> Path:
    """Folder for what is not a result: resume states, decompositions, caches. SVDIFF_HOME overrides .svdiff/."""
    return Path(os.environ.get("SVDIFF_HOME", ".svdiff"))

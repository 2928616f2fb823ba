"""Trainings that a family of base models or a machine cannot do, refused before any work."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

from svdiff.config import BaseModelConfig, TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models.family import Family

if TYPE_CHECKING:
    import torch


def check_family(family: Family, settings: TrainConfig) -> None:
    """Raise SvdiffError for settings that the base has no place for; of the base nothing need be loaded."""
    joint = f"{family.title} has joint attention of picture and text instead"
    if family.attention != "cross" and settings.method == "custom-diffusion":
        raise SvdiffError(
            f"train.method custom-diffusion trains W^K and W^V of cross-attention, and {joint}: choose svdiff, full or lora"
        )
    weighed = [name for name in ("unmix_weight", "single_subject_weight") if getattr(settings, name) > 0]
    if family.attention != "cross" and weighed:
        raise SvdiffError(f"train.{weighed[0]} is a loss on cross-attention maps, and {joint}: set it to 0")
    if settings.fit == "bucket" and weighed:
        raise SvdiffError(
            f"train.{weighed[0]} is a loss on attention maps, which are square, and train.fit is bucket: set fit to crop or "
            "pad, or the weight to 0"
        )
    asked = [name for name in ("text_encoder", "train_token") if getattr(settings, name)]
    if asked and not family.encoder_names:
        raise SvdiffError(
            f"train.{asked[0]} is true, and the text encoder of {family.title} is a language model, which is not "
            "trained: set it to false"
        )
    if settings.token_init != "keep" and not family.encoder_names:
        raise SvdiffError(
            f"train.token_init is {settings.token_init}, and the text encoder of {family.title} is a language model, whose "
            "embeddings are not changed: set it to keep"
        )
    if settings.min_snr_gamma is not None and family.flow:
        raise SvdiffError(
            f"train.min_snr_gamma is {settings.min_snr_gamma}, and {family.title} predicts a flow, which has no such weights: "
            "set it to null"
        )


def check_precision(base: BaseModelConfig, settings: TrainConfig) -> None:
    """Raise SvdiffError for gradients that would vanish, and for weights that are trained beside ones of another precision."""
    if base.precision != "fp32" and settings.method != "svdiff":
        raise SvdiffError(
            f"base.precision is {base.precision} and train.method {settings.method}, which trains numbers in fp32 beside weights "
            f"in {base.precision}: set base.precision to fp32, and train.precision to {base.precision}"
        )
    if base.precision == "fp16" and settings.precision != "fp16":
        raise SvdiffError(
            f"base.precision is fp16 and train.precision {settings.precision}: gradients in fp16 vanish without the "
            "scaling of train.precision fp16; set that, or base.precision to bf16"
        )


def check_compile(settings: TrainConfig, device: torch.device) -> None:
    """Raise SvdiffError for train.compile where it does not work."""
    if not settings.compile:
        return
    recorded = [name for name in ("unmix_weight", "single_subject_weight") if getattr(settings, name) > 0]
    if recorded:
        raise SvdiffError(
            f"train.compile is true and train.{recorded[0]} {getattr(settings, recorded[0])}: attention maps are recorded "
            "by exchanging parts of the network at every step, which a compiled one does not see; set "
            "compile to false, or the weight to 0"
        )
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise SvdiffError(
            f"train.compile is true, and torch.compile needs a C++ compiler on a CPU; none of {', '.join(compilers)} is on "
            "PATH: install one, or set it to false"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SvdiffError(
            "train.compile is true, and torch.compile needs the package triton on a GPU: install it, or set it to false"
        )
    if device.type not in ("cpu", "cuda"):
        raise SvdiffError(f"train.compile is true, and is not tried on {device.type}: set it to false")

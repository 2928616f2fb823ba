"""Trainings that a family of base models cannot do, refused before any work."""

from __future__ import annotations

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Family


def check_family(family: Family, settings: TrainConfig) -> None:
    """Raise SvdiffError for settings that the loaded base has no place for."""
    joint = f"{family.title} has joint attention of picture and text instead"
    if family.attention != "cross" and settings.method == "custom-diffusion":
        raise SvdiffError(
            f"train.method custom-diffusion trains W^K and W^V of cross-attention, and {joint}: choose svdiff, full or lora"
        )
    weighed = [name for name in ("unmix_weight", "single_subject_weight") if getattr(settings, name) > 0]
    if family.attention != "cross" and weighed:
        raise SvdiffError(f"train.{weighed[0]} is a loss on cross-attention maps, and {joint}: set it to 0")
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
    if settings.min_snr_gamma is not None and family.objective.prediction == "flow":
        raise SvdiffError(
            f"train.min_snr_gamma is {settings.min_snr_gamma}, and {family.title} predicts a flow, which has no such weights: "
            "set it to null"
        )
    if str(family.dtype) == "torch.float16" and settings.precision != "fp16":
        raise SvdiffError(
            f"base.precision is fp16 and train.precision {settings.precision}: gradients in fp16 vanish without the "
            "scaling of train.precision fp16; set that, or base.precision to bf16"
        )

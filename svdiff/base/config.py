"""The section `base_training` of params.yaml: everything that decides the embedded base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svdiff.errors import SvdiffError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AutoencoderTraining(_Section):
    """Training of the autoencoder."""

    pool: int = Field(6000, ge=1, description="pictures composed at the start, from which the steps draw")
    steps: int = Field(3000, ge=1, description="optimiser steps of the decoder; the encoder is a linear code")
    batch_size: int = Field(16, ge=2, description="pictures a step")
    lr: float = Field(2e-3, gt=0, description="peak learning rate, after a warm-up, then a cosine to zero")
    channels: tuple[int, int, int, int] = Field((16, 64, 128, 128), description="channels of the resolutions")
    latent_channels: int = Field(32, ge=1, description="numbers a latent position")
    start_from: str | None = Field(
        None,
        description="autoencoder folder to go on from: its code is kept, and widened if it has fewer latent channels; "
        "its decoder is trained further",
    )
    latent_noise: float = Field(0.05, ge=0, description="largest noise on the decoder's input, in deviations")


class TextTraining(_Section):
    """Training of the text encoder on captions alone."""

    steps: int = Field(2000, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=2, description="captions a step")
    lr: float = Field(1.0e-3, gt=0, description="peak learning rate")
    start_from: str | None = Field(None, description="text encoder folder whose weights the training starts from")
    layers: int = Field(3, ge=1, description="layers of the text encoder")
    width: int = Field(192, ge=8, description="width of the text encoder")


class UNetTraining(_Section):
    """Training of the UNet, under the frozen text encoder."""

    steps: int = Field(6000, ge=1, description="optimiser steps; the learning rate decays over them")
    batch_size: int = Field(64, ge=2, description="pictures a step")
    lr: float = Field(1.0e-3, gt=0, description="peak learning rate")
    warmup: int = Field(60, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.6, ge=0, le=1, description="share of the steps at the end over which the rate falls to zero")
    start_from: str | None = Field(
        None,
        description="pipeline folder whose UNet the training starts from; null: from nothing",
    )
    prediction: Literal["epsilon", "v_prediction"] = Field("v_prediction", description="what the UNet predicts")
    channels: tuple[int, ...] = Field((128, 256), description="channels of the resolutions")
    heads: int = Field(4, ge=1, description="attention heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of captions left empty, for guidance")
    ema: float = Field(0.9990, ge=0, lt=1, description="decay of the moving average of the weights")
    pairs: float = Field(0.45, ge=0, le=1, description="share of pictures with two things")
    hands: float = Field(0.35, ge=0, le=1, description="share of things redrawn by a hand, which captions name")
    pool: int = Field(8192, ge=1, description="pictures encoded at a time")
    passes: int = Field(5, ge=1, description="passes over a pool before the next is encoded")


class ClipTraining(_Section):
    """Training of the evaluator that scores pictures against captions."""

    steps: int = Field(2500, ge=1, description="optimiser steps")
    batch_size: int = Field(128, ge=2, description="pairs a step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    width: int = Field(24, ge=8, description="width of the ResNet's stem")
    start_from: str | None = Field(None, description="CLIP folder whose weights the training starts from")
    rivals: int = Field(
        2, ge=0, description="further captions a picture, each wrong in one thing, hand, colour or order"
    )
    dimensions: int = Field(128, ge=8, description="of the common space")
    pool: int = Field(16000, ge=2, description="pictures composed at the start, half of them restyled")


class LpipsTraining(_Section):
    """Training of the backbone of the perceptual distance."""

    net: Literal["alex", "squeeze"] = Field("alex", description="architecture, as the lpips package names it")
    steps: int = Field(500, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=1, description="pictures a step")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")
    pool: int = Field(5000, ge=2, description="pictures composed at the start, half of them restyled")


class BaseTrainingConfig(_Section):
    """How the embedded base and its evaluators are trained."""

    world: str = Field("data/world", description="folder of the picture world")
    things: int | None = Field(24, ge=2, description="train on the first so many things of the world; null: on all")
    seed: int = Field(0, ge=0, description="decides every picture, caption and noise")
    checkpoint_seconds: float = Field(120, gt=0, description="how often the resume state is written")
    autoencoder: AutoencoderTraining = Field(default_factory=AutoencoderTraining, description="the autoencoder")
    text: TextTraining = Field(default_factory=TextTraining, description="the text encoder")
    unet: UNetTraining = Field(default_factory=UNetTraining, description="the UNet")
    clip: ClipTraining = Field(default_factory=ClipTraining, description="the CLIP evaluator")
    lpips: LpipsTraining = Field(default_factory=LpipsTraining, description="the LPIPS evaluator's backbone")


def load_base_training(path: str | Path = "params.yaml") -> BaseTrainingConfig:
    """The section `base_training` of the parameters file; defaults where the file or the section is missing.

    Raises SvdiffError naming the key, the value found and what is allowed.
    """
    path = Path(path)
    section = (yaml.safe_load(path.read_text()) or {}).get("base_training", {}) if path.is_file() else {}
    try:
        return BaseTrainingConfig.model_validate(section or {})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("base_training", *first["loc"]))
        raise SvdiffError(f"{path}: {key} is {first['input']!r}: {first['msg']}") from None

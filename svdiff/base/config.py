"""The section `base_training` of params.yaml: everything that decides the embedded base's weights."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svdiff.errors import SvdiffError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WorldSettings(_Section):
    """The picture world."""

    folder: str = Field("data/world", description="folder of the things' drawings")
    individuals: int = Field(2000, ge=1, description="individuals a style that training may show")
    named: int = Field(64, ge=1, description="of these, with a name of their own, a style")
    held_out: int = Field(160, ge=100, description="individuals a style that nothing is trained on")


class Training(_Section):
    """What every training has."""

    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=2, description="pictures or captions a step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate, after a warm-up, then a cosine to zero")


class AutoencoderTraining(Training):
    """Training of the decoder; the encoder is a linear code that is fitted."""

    steps: int = Field(12000, ge=1, description="optimiser steps of the decoder")
    batch_size: int = Field(64, ge=2, description="pictures a step")
    lr: float = Field(1.5e-3, gt=0, description="peak learning rate")
    channels: tuple[int, int, int, int] = Field((16, 48, 112, 112), description="channels of the resolutions")
    latent_channels: int = Field(48, ge=1, description="numbers a latent position")
    latent_noise: float = Field(0.05, ge=0, description="largest noise on the decoder's input, in deviations")


class TextTraining(Training):
    """Training of the text encoder on captions alone."""

    steps: int = Field(8000, ge=1, description="optimiser steps")
    batch_size: int = Field(256, ge=2, description="captions a step")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    layers: int = Field(3, ge=1, description="layers of the text encoder")
    width: int = Field(192, ge=8, description="width of the text encoder")


class UNetTraining(Training):
    """Training of the UNet, under the frozen text encoder."""

    steps: int = Field(25000, ge=1, description="optimiser steps; the learning rate decays over the last of them")
    batch_size: int = Field(512, ge=2, description="pictures a step")
    lr: float = Field(1.0e-3, gt=0, description="peak learning rate")
    warmup: int = Field(300, ge=0, description="steps over which the rate rises at first")
    decay: float = Field(0.5, ge=0, le=1, description="share of the steps at the end over which the rate falls to zero")
    channels: tuple[int, ...] = Field((128, 256), description="channels of the resolutions")
    heads: int = Field(4, ge=1, description="attention heads")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of captions left empty, for guidance")
    ema: float = Field(0.9995, ge=0, lt=1, description="decay of the moving average of the weights")
    pairs: float = Field(0.3, ge=0, le=1, description="share of pictures with two in them")
    named: float = Field(0.3, ge=0, le=1, description="share of individuals with names of their own")


class ClipTraining(Training):
    """Training of the evaluator that scores pictures against captions."""

    steps: int = Field(8000, ge=1, description="optimiser steps")
    batch_size: int = Field(256, ge=2, description="pairs a step")
    width: int = Field(24, ge=8, description="width of the ResNet's stem")
    rivals: int = Field(2, ge=0, description="further captions a picture, each wrong in one respect")
    dimensions: int = Field(128, ge=8, description="of the common space")


class LpipsTraining(Training):
    """Training of the backbone of the perceptual distance."""

    steps: int = Field(2000, ge=1, description="optimiser steps")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")


class LookAlikeTraining(Training):
    """Training of the identity embedding against look-alikes, after the other."""

    steps: int = Field(4500, ge=1, description="optimiser steps")
    batch_size: int = Field(64, ge=8, multiple_of=8, description="individuals a step, in eights, three pictures each")
    lr: float = Field(6e-4, gt=0, description="peak learning rate")


class IdentityTraining(Training):
    """Training of the embedding that tells individuals apart."""

    steps: int = Field(10000, ge=1, description="optimiser steps")
    batch_size: int = Field(192, ge=2, description="individuals a step, two pictures each")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    channels: tuple[int, int, int, int] = Field((32, 64, 128, 256), description="channels of the stages")
    look_alikes: LookAlikeTraining = Field(default_factory=LookAlikeTraining, description="against look-alikes")


class ProbeTraining(Training):
    """Training of the classifiers that tell whether the base obeys prompts, for the card."""

    steps: int = Field(2500, ge=1, description="optimiser steps")
    lr: float = Field(5e-4, gt=0, description="peak learning rate")


class BaseTrainingConfig(_Section):
    """How the embedded base and its evaluators are trained."""

    seed: int = Field(0, ge=0, description="decides every picture, caption and noise")
    workers: int = Field(6, ge=0, description="processes that draw scenes ahead of a GPU; on a CPU there are none")
    checkpoint_seconds: float = Field(120, gt=0, description="how often the resume state is written")
    world: WorldSettings = Field(default_factory=WorldSettings, description="the picture world")
    autoencoder: AutoencoderTraining = Field(default_factory=AutoencoderTraining, description="the autoencoder")
    text: TextTraining = Field(default_factory=TextTraining, description="the text encoder")
    unet: UNetTraining = Field(default_factory=UNetTraining, description="the UNet")
    clip: ClipTraining = Field(default_factory=ClipTraining, description="the CLIP evaluator")
    lpips: LpipsTraining = Field(default_factory=LpipsTraining, description="the LPIPS evaluator's backbone")
    identity: IdentityTraining = Field(default_factory=IdentityTraining, description="the identity evaluator")
    probes: ProbeTraining = Field(default_factory=ProbeTraining, description="the card's classifiers")


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

"""`params.yaml` as one validated, described model.

Every section is one class; every key has a description, which `svdiff config` prints. An unknown key or a bad value is
refused by name, with what is allowed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from svdiff.base.config import BaseTrainingConfig
from svdiff.errors import SvdiffError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Section(BaseModel):
    """A part of params.yaml. Unknown keys are errors: a typo must not train something else for an hour."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelConfig(Section):
    """The model that is personalised."""

    model: str = Field("models/base", description="diffusers folder or Hub id with a Stable Diffusion layout")
    revision: str | None = Field(None, description="Hub revision; only for a Hub id")


class EvaluatorsConfig(Section):
    """Who scores the pictures."""

    clip_model: str = Field("local-dir:models/clip", description="open_clip model name, or local-dir:<folder>")
    clip_pretrained: str | None = Field(None, description="open_clip weights tag, e.g. laion2b_s34b_b79k")
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field("alex", description="backbone of the LPIPS distance")
    lpips_weights: str | None = Field(
        "models/lpips/backbone.safetensors",
        description="weights of the backbone, used without learned heads; null: the lpips package's own",
    )


class PriorConfig(Section):
    """Prior images (Sec. 3.2): the base model's own pictures of a class word."""

    images: int = Field(64, ge=1, le=10_000, description="pictures a class")
    prompt: str = Field("a {subject}", description="prompt; {subject} becomes the class word")
    steps: int = Field(25, ge=1, le=1000, description="DDIM steps")
    guidance: float = Field(3.0, ge=0, le=50, description="classifier-free guidance scale s of Eq. 9; 1 is none")
    seed: int = Field(0, ge=0, description="first seed; picture i uses seed + i")


class TrainConfig(Section):
    """Fine-tuning of one concept (Eq. 1, 3)."""

    method: Literal["svdiff", "full", "lora", "custom-diffusion"] = Field(
        "svdiff", description="spectral shifts, full weights (DreamBooth), LoRA or Custom Diffusion"
    )
    subset: str = Field("UNet", description="subset of Table 1 (`svdiff subsets`), or a pattern of weight names")
    text_encoder: bool = Field(False, description="train the text encoder as well")
    rank: int | None = Field(None, ge=1, description="keep only the leading k shifts of a weight (Fig. 25)")
    prompt: str = Field("a {subject}", description="instance prompt; {subject} becomes '<token> <class word>'")
    steps: int = Field(400, ge=1, le=1_000_000, description="optimiser steps")
    batch_size: int = Field(1, ge=1, le=256, description="concept pictures a step; as many prior pictures beside")
    accumulation: int = Field(1, ge=1, le=1024, description="batches whose gradients make one step")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate of 2-D and 4-D weights")
    lr_1d: float = Field(1e-6, ge=0, le=10, description="learning rate of 1-D weights (norms)")
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="learning-rate schedule")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    prior_weight: float = Field(1.0, ge=0, description="λ of Eq. 3; 0 trains without prior preservation")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision; shifts stay fp32")
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    seed: int = Field(0, ge=0, description="everything random in the training follows from it")
    save_every: int = Field(50, ge=1, description="steps between resume states; never changes the result")
    validate_every: int = Field(100, ge=1, description="steps between validation pictures; step 0 is the base")
    validation_prompts: list[str] = Field(["a {subject}"], min_length=1, description="rows of the validation grid")
    validation_seeds: list[int] = Field([0, 1], min_length=1, description="columns of the validation grid")


class SampleConfig(Section):
    """Pictures for scoring: every prompt at every seed."""

    prompts: list[str] = Field(min_length=1, description="evaluation prompts with {subject}, unseen in training")
    seeds: list[int] = Field([0, 1, 2, 3], min_length=1, description="one picture a prompt and seed")
    steps: int = Field(25, ge=1, le=1000, description="DDIM steps")
    guidance: float = Field(3.0, ge=0, le=50, description="classifier-free guidance scale s of Eq. 9; 1 is none")
    eta: float = Field(0.0, ge=0, le=1, description="η of DDIM; 0 is deterministic")
    batch_size: int = Field(8, ge=1, le=256, description="pictures sampled together")


class ScoreConfig(Section):
    """Text and image alignment (Fig. 9b)."""

    bootstrap: int = Field(2000, ge=100, le=1_000_000, description="resamples behind the 95 % intervals")
    seed: int = Field(0, ge=0, description="seed of the resampling")


class RankConfig(Section):
    """Rank analysis (Fig. 25)."""

    concepts: list[str] = Field(min_length=1, description="concepts that are trained once a rank")
    ranks: list[int] = Field([1, 4, 16], description="ranks; the full rank is trained as well")
    steps: int = Field(200, ge=1, description="training steps a rank")
    prompts: dict[Literal["reconstruction", "edit"], str] = Field(
        {"reconstruction": "a {subject}", "edit": "a {subject} on a blue background"},
        description="the training prompt and an edited one",
    )
    seeds: list[int] = Field([0, 1, 2, 3], min_length=1, description="pictures a prompt")

    @field_validator("ranks")
    @classmethod
    def _positive(cls, ranks: list[int]) -> list[int]:
        if any(rank < 1 for rank in ranks):
            raise ValueError("ranks are whole numbers from 1")
        return ranks


class TrackingConfig(Section):
    """Where numbers and registered versions go."""

    uri: str = Field("sqlite:///mlruns/mlflow.db", description="MLflow tracking URI; MLFLOW_TRACKING_URI overrides it")
    experiment: str = Field("svdiff", description="MLflow experiment")
    live: Literal["mlflow", "none"] = Field("mlflow", description="where the loss curve can be watched live")


class PromoteConfig(Section):
    """When a challenger becomes champion: both margins must hold, on the same prompts and seeds."""

    image_margin: float = Field(0.0, ge=0, description="image alignment must be better by more than this")
    text_margin: float = Field(0.02, ge=0, description="text alignment may be worse by at most this")


class ReevaluateConfig(Section):
    """When a registered champion, measured again by the same evaluators on the same prompts and seeds, has drifted.

    On one machine nothing random is left, so the change is zero but for the six decimals that scores are kept with;
    other processors and libraries round differently, which the tolerances allow for.
    """

    image_tolerance: float = Field(
        0.005, ge=0, description="image alignment may change by this, in the mean of |change| over pictures"
    )
    text_tolerance: float = Field(
        0.005, ge=0, description="text alignment may change by this, in the mean of |change| over pictures"
    )
    fresh_hours: float = Field(
        12.0, ge=0, description="a result of the same measure is kept this long, so that a killed run goes on; 0: never"
    )
    rollback: bool = Field(
        False, description="put the previous champion back where one drifted or broke and the previous is sound"
    )


class ConceptConfig(Section):
    """One concept: its pictures lie in data/concepts/<name>/."""

    class_word: str = Field(description="coarse class, e.g. dog; one of `classes`")
    token: str = Field("sks", description="special token [V]: a rare word of the base's vocabulary")
    train: dict[str, Any] = Field({}, description="keys of `train` that this concept sets differently")

    @property
    def subject(self) -> str:
        """The concept in words: '[V] class' (Sec. 3.3)."""
        return f"{self.token} {self.class_word}"


class Config(Section):
    """All of params.yaml."""

    base: BaseModelConfig = BaseModelConfig()
    evaluators: EvaluatorsConfig = EvaluatorsConfig()
    classes: list[str] = Field(description="class words in use; each gets prior images")
    concepts: dict[str, ConceptConfig] = Field(description="the concepts, by name")
    prior: PriorConfig = PriorConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig
    score: ScoreConfig = ScoreConfig()
    rank: RankConfig
    tracking: TrackingConfig = TrackingConfig()
    promote: PromoteConfig = PromoteConfig()
    reevaluate: ReevaluateConfig = ReevaluateConfig()
    base_training: BaseTrainingConfig = BaseTrainingConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        for name, concept in self.concepts.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"concept name '{name}': letters, digits, '-', '_' and '.' only")
            if concept.class_word not in self.classes:
                raise ValueError(
                    f"concepts.{name}.class_word is '{concept.class_word}', which is not in classes "
                    f"({', '.join(self.classes)}); add it there, so that its prior images are made"
                )
            self.train_config(name)
        for name in self.rank.concepts:
            if name not in self.concepts:
                raise ValueError(
                    f"rank.concepts names '{name}', which is not among concepts ({', '.join(self.concepts)})"
                )
        return self

    def concept(self, name: str) -> ConceptConfig:
        """The concept called `name`; SvdiffError with the known names if there is none."""
        if name not in self.concepts:
            raise SvdiffError(
                f"no concept '{name}' in params.yaml; known: {', '.join(sorted(self.concepts))}. "
                f"Add it under `concepts:` with a class_word, and its pictures to data/concepts/{name}/"
            )
        return self.concepts[name]

    def train_config(self, name: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """`train` with the concept's own values and `overrides` on top, validated."""
        values = self.train.model_dump() | self.concept(name).train | (overrides or {})
        try:
            return TrainConfig.model_validate(values)
        except ValidationError as error:
            raise ValueError(_readable(error, prefix=f"concepts.{name}.train.")) from None


def _readable(error: ValidationError, prefix: str = "") -> str:
    """One line a mistake: the key, what is wrong with it, what was found."""
    lines = []
    for problem in error.errors():
        where = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            section: Any = Config if not prefix else TrainConfig
            for part in problem["loc"][:-1]:
                field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
                section = field.annotation if field else None
            if "concepts" in problem["loc"] and not prefix:
                section = ConceptConfig
            known = ", ".join(section.model_fields) if hasattr(section, "model_fields") else ""
            lines.append(f"{where}: unknown key" + (f"; known here: {known}" if known else ""))
        elif problem["type"] == "value_error":
            lines.append((f"{where}: " if where else "") + problem["msg"].removeprefix("Value error, "))
        else:
            found = "" if problem["type"] == "missing" else f" (found {problem['input']!r})"
            lines.append(f"{where}: {problem['msg']}{found}")
    return "\n".join(lines)


def describe(section: BaseModel, prefix: str = "") -> list[str]:
    """One line a key: its name, the value in force, what it means."""
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            lines += describe(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name} = {value!r}\n    {field.description}")
    return lines


def load_config(path: str | Path = "params.yaml") -> Config:
    """Read and validate params.yaml. Raises SvdiffError that names each bad key, its value and what is allowed."""
    path = Path(path)
    if not path.is_file():
        raise SvdiffError(f"{path} not found in {Path.cwd()}; run inside a checkout, where params.yaml lies")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SvdiffError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise SvdiffError(f"{path} holds {type(values).__name__}, expected sections such as `concepts:` and `train:`")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise SvdiffError(f"{path}:\n" + _readable(error)) from None

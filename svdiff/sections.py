"""The sections of params.yaml, one class each; `config` puts them together."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from svdiff.errors import SvdiffError
from svdiff.words import check_class_word, check_name, check_template, check_token, did_you_mean, is_folder

Method = Literal["svdiff", "full", "lora", "custom-diffusion"]
# What trains where params.yaml gives a method no rates of its own: the paper's (supplement A, E), and Custom Diffusion's.
METHOD_RATES: dict[Method, dict[str, float]] = {
    "svdiff": {"lr": 1e-3, "lr_1d": 1e-6},
    "full": {"lr": 1e-6, "lr_1d": 1e-6},
    "lora": {"lr": 1e-4, "lr_1d": 2e-3},
    "custom-diffusion": {"lr": 1e-5, "lr_1d": 1e-5},
}
RATES = ("lr", "lr_1d", "lr_text_encoder", "lr_token")  # settings that mean something for one method only
Layout = Literal["left-right", "up-down"]
Fit = Literal["cover", "contain", "cut-out"]


def _distinct(values: list[Any]) -> list[Any]:
    """Refuse a value that is given twice: its pictures would have one file name."""
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]!r} is given twice; expected each once")
    return values


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is not a regular expression: {error}") from None
    return text


Name = Annotated[str, AfterValidator(check_name)]
ClassWord = Annotated[str, AfterValidator(check_class_word)]
Token = Annotated[str, AfterValidator(check_token)]
Prompt = Annotated[str, AfterValidator(check_template)]  # plain words
SubjectPrompt = Annotated[str, AfterValidator(lambda text: check_template(text, ["subject"], ["subject"]))]
AnyPrompt = Annotated[str, AfterValidator(lambda text: check_template(text, ["subject", "first", "second"]))]
PairPrompt = Annotated[str, AfterValidator(lambda text: check_template(text, ["first", "second"], ["first", "second"]))]
Prompts = Annotated[list[AnyPrompt], AfterValidator(_distinct)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Seeds = Annotated[list[Seed], AfterValidator(_distinct)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Steps = Annotated[
    int, Field(ge=1, le=500)
]  # of the 1000 timesteps of training; more than half would start below pure noise
Guidance = Annotated[float, Field(ge=1, le=50)]  # 1 is none; below it diffusers' pipelines and Eq. 9 differ


class Section(BaseModel):
    """A part of params.yaml. Unknown keys are errors: a typo must not train something else for an hour."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def checked(cls, values: dict[str, Any], prefix: str = "") -> Self:
        """The section that `values` make. Raises SvdiffError that names each bad key, its value and what is allowed."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SvdiffError(readable(error, cls, prefix)) from None

    def replaced(self, values: dict[str, Any]) -> Self:
        """A copy with some values changed, validated again."""
        return self.checked(self.model_dump() | values)


class BaseModelConfig(Section):
    """The model that is personalised."""

    model: str = Field(
        "models/base", description="diffusers folder, Hub id or single-file checkpoint of a supported family"
    )
    revision: str | None = Field(None, description="Hub revision; only for a Hub id")
    variant: str | None = Field(None, description="which files of it, e.g. fp16")
    config: str | None = Field(
        None, description="single-file checkpoints: diffusers folder or Hub id with the same configuration"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="numbers that the weights are held in, for training and sampling alike; shifts stay fp32"
    )
    resolution: int | None = Field(None, ge=8, le=8192, description="side of pictures in pixels; null: the base's own")
    offload: Literal["none", "parts"] = Field(
        "none", description="on a GPU, sampling: parts keeps in main memory the networks that are not running"
    )
    vae_slicing: bool = Field(False, description="decode pictures one by one: less memory")
    vae_tiling: bool = Field(False, description="decode pictures in tiles: less memory, for large ones")

    @model_validator(mode="after")
    def _of_the_hub(self) -> Self:
        if self.revision is not None and is_folder(self.model):
            raise ValueError(f"revision '{self.revision}' is given, and model '{self.model}' is a folder: leave it out")
        return self


class EvaluatorsConfig(Section):
    """Who scores the pictures."""

    clip_model: str = Field(
        "models/clip",
        description="folder as open_clip writes it, open_clip's name of a model, or hf-hub:<owner>/<name>",
    )
    clip_pretrained: str | None = Field(
        None, description="with open_clip's name: the tag of its weights, e.g. laion2b_s34b_b79k"
    )
    lpips_net: Literal["alex", "vgg", "squeeze"] = Field("alex", description="backbone of the LPIPS distance")
    lpips_weights: str | None = Field(
        "models/lpips/backbone.safetensors",
        description="weights of the backbone, used without learned heads; null: the lpips package's own",
    )
    identity_model: str | None = Field(
        None,
        description="instance embedding behind the identity score: a transformers folder or Hub id, e.g. "
        "facebook/dinov2-base; null: CLIP's image encoder",
    )

    @property
    def local(self) -> dict[str, str]:
        """Files and folders that it names, by key; names of the Hub are none."""
        named = {
            "clip_model": self.clip_model,
            "lpips_weights": self.lpips_weights,
            "identity_model": self.identity_model,
        }
        return {key: name for key, name in named.items() if name and (key == "lpips_weights" or is_folder(name))}

    @model_validator(mode="after")
    def _of_open_clip(self) -> Self:
        brings_weights = is_folder(self.clip_model) or self.clip_model.startswith("hf-hub:")
        if self.clip_pretrained is not None and brings_weights:
            raise ValueError(
                f"clip_pretrained '{self.clip_pretrained}' is given, and clip_model '{self.clip_model}' brings its weights "
                "along: leave it out"
            )
        if self.clip_pretrained is None and not brings_weights:  # open_clip would draw random weights
            raise ValueError(
                f"clip_model '{self.clip_model}' is no folder here: as open_clip's name of a model it needs the tag of its "
                "weights, clip_pretrained, e.g. laion2b_s34b_b79k"
            )
        return self


class PriorConfig(Section):
    """Prior images (Sec. 3.2): the base model's own pictures of a class word."""

    images: int = Field(64, ge=1, le=10_000, description="pictures a class")
    prompt: SubjectPrompt = Field("a {subject}", description="prompt; {subject} becomes the class word")
    steps: Steps = Field(25, description="DDIM steps")
    guidance: Guidance = Field(3.0, description="classifier-free guidance scale s of Eq. 9; 1 is none")
    eta: float = Field(0.0, ge=0, le=1, description="η of DDIM: 0 is deterministic, 1 injects noise at every step")
    seed: Seed = Field(0, description="first seed; picture i uses seed + i")


class TrainConfig(Section):
    """Fine-tuning of a concept (Eq. 1, 3); pairs and edits as well, but for what `mix` and `edit` set differently."""

    method: Method = Field("svdiff", description="spectral shifts, full weights (DreamBooth), LoRA or Custom Diffusion")
    methods: dict[Method, dict[str, Any]] = Field(
        {}, description="keys of `train` by method; `lr` and `lr_1d` beside it are those of `method` alone"
    )
    subset: str = Field("UNet", description="subset of Table 1 (`svdiff subsets`), or a pattern of weight names")
    text_encoder: bool = Field(False, description="train the text encoder as well")
    rank: int | None = Field(None, ge=1, description="keep only the leading k shifts of a weight (Fig. 25)")
    prompt: SubjectPrompt = Field(
        "a {subject}", description="instance prompt; {subject} becomes '<token> <class word>'"
    )
    steps: int = Field(400, ge=1, le=1_000_000, description="optimiser steps")
    batch_size: int = Field(1, ge=1, le=256, description="concept pictures a step; as many prior pictures beside")
    accumulation: int = Field(1, ge=1, le=1024, description="batches whose gradients make one step")
    lr: float = Field(1e-3, gt=0, le=10, description="learning rate of 2-D and 4-D weights")
    lr_1d: float = Field(1e-6, ge=0, le=10, description="learning rate of 1-D weights (norms)")
    lr_text_encoder: float | None = Field(None, gt=0, le=10, description="of a text encoder's weights; null: `lr`")
    lr_token: float | None = Field(None, gt=0, le=10, description="of special tokens' embeddings; null: `lr`")
    train_token: bool = Field(False, description="train the special token's embedding beside the weights")
    token_init: Literal["keep", "distribution"] = Field(
        "keep",
        description="the special token's embedding at the start: the base's own row, or drawn from the mean and deviation "
        "of the base's names (names.json beside its tokenizer), or of all words where it has none",
    )
    optimizer: Literal["adamw", "adamw-8bit", "prodigy"] = Field(
        "adamw", description="adamw-8bit needs bitsandbytes, prodigy prodigyopt; prodigy wants rates of about 1"
    )
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="save and validate the moving average of what is trained, e.g. 0.99; null: none"
    )
    min_snr_gamma: float | None = Field(
        None, gt=0, description="γ of min-SNR weighting, e.g. 5: easy timesteps count less; null: all count alike"
    )
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="shift of each channel's noise as a whole, e.g. 0.05, for very dark or light pictures",
    )
    schedule: Literal["constant", "cosine", "linear"] = Field("constant", description="learning-rate schedule")
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    prior_weight: float = Field(1.0, ge=0, description="λ of Eq. 3; 0 trains without prior preservation")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["no", "bf16", "fp16"] = Field("no", description="mixed precision; shifts stay fp32")
    gradient_checkpointing: bool = Field(False, description="less memory, more time")
    compile: bool = Field(
        False,
        description="torch.compile the network for training steps: minutes before the first, then less time a step; for thousands of steps",
    )
    seed: Seed = Field(0, description="everything random in the training follows from it")
    save_every: int = Field(50, ge=1, description="steps between resume states; never changes the result")
    validate_every: int = Field(100, ge=1, description="steps between validation pictures; step 0 is the base")
    validation_prompts: Prompts = Field(["a {subject}"], min_length=1, description="rows of the validation grid")
    validation_seeds: Seeds = Field([0, 1], min_length=1, description="columns of the validation grid")
    choose: Literal["best", "last"] = Field(
        "best", description="the delta kept: that of the validation with the lowest fixed-noise loss, or the last one"
    )
    keep_deltas: int = Field(
        3, ge=1, description="deltas of the last validations that are kept in .svdiff beside the chosen one"
    )
    patience: int | None = Field(
        None, ge=1, description="stop after so many validations without a lower fixed-noise loss; null: never"
    )
    fit: Literal["crop", "pad", "bucket"] = Field(
        "crop",
        description="concepts: crop takes the centred square of a picture, pad the whole picture, on white; bucket trains "
        "pictures of up to 2 : 1 in shapes near their own, with as many pixels as the square",
    )
    masks: Literal["ignore", "loss"] = Field(
        "ignore",
        description="concepts: loss weights the loss by dog-mask.png beside dog.jpg, or by the picture's alpha channel, "
        "so that nothing is learned of what is black or transparent",
    )
    flip: bool = Field(
        False, description="concepts: every picture mirrored as well; not for writing or one-sided things"
    )
    jitter: float = Field(
        0.0,
        ge=0,
        le=0.9,
        description="concepts: every picture in other brightness, contrast and saturation, by this share",
    )
    holdout: int = Field(0, ge=0, description="concepts: pictures kept out of training, for the fixed-noise loss alone")
    mix_probability: float = Field(0.6, ge=0, le=1, description="pairs: share of samples that are Cut-Mix-Unmix mixes")
    unmix_weight: float = Field(0.0, ge=0, description="pairs: weight of the unmix loss on attention maps of mixes")
    single_subject_weight: float = Field(0.0, ge=0, description="weight of Eq. 8 on samples that show one subject")
    subject_threshold: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Eq. 8: the subject is where its class word's map exceeds this share of its maximum",
    )
    attention_layers: Pattern = Field(
        "", description="regular expression: cross-attention layers of both losses; '' is all"
    )
    attention_sides: list[int] | None = Field(None, description="side of their maps, e.g. [16, 8]; null is all")


class SampleConfig(Section):
    """Pictures for scoring: every prompt at every seed."""

    prompts: Prompts = Field(min_length=1, description="evaluation prompts with {subject}, unseen in training")
    seeds: Seeds = Field([0, 1, 2, 3], min_length=1, description="one picture a prompt and seed")
    steps: Steps = Field(25, description="DDIM steps")
    guidance: Guidance = Field(3.0, description="classifier-free guidance scale s of Eq. 9; 1 is none")
    eta: float = Field(0.0, ge=0, le=1, description="η of DDIM; 0 is deterministic")
    beta: float = Field(1.0, ge=0, le=1, description="β of Eq. 10; 1 is plain guidance, below it negatives count")
    negatives: list[Prompt] = Field([], description="negative prompts of Eq. 10; none given: the prior prompts")
    drift_pictures: int = Field(
        16,
        ge=0,
        description="pictures of the bare class prompt (`prior.prompt`), from seeds 0, 1, …, that tell whether the class "
        "word has drifted towards the concept; 0: drift is not measured",
    )
    batch_size: int = Field(8, ge=1, le=256, description="pictures sampled together")

    @property
    def sampler(self) -> dict[str, Any]:
        """What `sample_images` is told."""
        return self.model_dump(include={"steps", "guidance", "eta", "batch_size"})

    @field_validator("drift_pictures")
    @classmethod
    def _none_or_several(cls, pictures: int) -> int:
        if pictures == 1:
            raise ValueError("one picture has no variety; expected 0, or at least 2")
        return pictures

    @model_validator(mode="after")
    def _negatives_count(self) -> Self:
        if self.beta < 1 and self.guidance == 1:
            raise ValueError(
                f"beta {self.beta:g} has no effect with guidance 1, which is none: set guidance above 1, or beta 1"
            )
        if self.negatives and self.beta == 1:
            raise ValueError("negatives have no effect with beta 1: set beta below 1 (Eq. 10), e.g. 0.5")
        return self


class ScoreConfig(Section):
    """Text and image alignment (Fig. 9b)."""

    bootstrap: int = Field(2000, ge=100, le=1_000_000, description="resamples behind the 95 % intervals")
    seed: int = Field(0, ge=0, description="seed of the resampling")


class CorrelateConfig(Section):
    """Correlation of the concepts' shifts (Fig. 9a)."""

    second_runs: list[str] = Field(
        [], description="concepts that are trained twice, for the diagonal; it is blank for others"
    )
    lr_1d: float = Field(1e-6, ge=0, le=10, description="learning rate of 1-D weights in the second run")


class RankConfig(Section):
    """Rank analysis (Fig. 25)."""

    concepts: list[str] = Field([], description="concepts that are trained once a rank; [] for none")
    ranks: list[int] = Field([1, 4, 16], description="ranks; the full rank is trained as well")
    steps: int = Field(200, ge=1, description="training steps a rank")
    prompts: dict[Literal["reconstruction", "edit"], SubjectPrompt] = Field(
        {"reconstruction": "a {subject}", "edit": "a {subject} on a blue background"},
        description="the training prompt and an edited one",
    )
    seeds: Seeds = Field([0, 1, 2, 3], min_length=1, description="pictures a prompt")

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
    live: Literal["mlflow", "tensorboard", "wandb", "none"] = Field(
        default_factory=lambda: "mlflow" if find_spec("mlflow") else "none",
        description="where the loss curve can be watched live: mlflow if installed; tensorboard writes to .svdiff/tensorboard",
    )


class PromoteConfig(Section):
    """When a version is served at all, and when it takes the champion's place.

    Differences are paired, picture by picture. One counts where its whole 95 % interval lies beyond the margin: a version
    is better or worse in identity, text alignment or drift for certain, or it is neither.
    """

    identity_margin: float = Field(0.0, ge=0, description="a difference in identity counts beyond this")
    text_margin: float = Field(0.02, ge=0, description="a difference in text alignment counts beyond this")
    drift_margin: float = Field(
        0.05, ge=0, description="a difference in drift (identity of class prompts' pictures) counts beyond this"
    )
    base_text_margin: float = Field(
        0.1, ge=0, description="the same against the untrained base, which always follows a prompt more freely"
    )
    base_drift_margin: float = Field(0.1, ge=0, description="the same for drift against the untrained base")
    pictures: int = Field(8, ge=2, description="fewest pairs of pictures that decide anything")


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

    class_word: ClassWord = Field(description="coarse class, e.g. dog; one of `classes`")
    token: Token = Field("sks", description="special token [V]: a rare word of the base's vocabulary")
    train: dict[str, Any] = Field({}, description="keys of `train` that this concept sets differently")

    @property
    def subject(self) -> str:
        """The concept in words: '[V] class' (Sec. 3.3)."""
        return f"{self.token} {self.class_word}"


class MixConfig(Section):
    """Cut-Mix-Unmix (Sec. 3.3): what pairs are trained on and sampled with."""

    mixes: int = Field(48, ge=1, le=100_000, description="mixed pictures a pair; each has a prior counterpart")
    layouts: list[Layout] = Field(["left-right"], min_length=1, description="drawn for each mix: left-right, up-down")
    split: Literal["even", "random"] = Field("even", description="halves, or a seam anywhere in the middle 40 %")
    fit: Fit = Field(
        "cover",
        description="cover cuts the middle out of a picture, contain shrinks the whole picture, cut-out lays both subjects over "
        "one plain background",
    )
    draws: int = Field(
        1, ge=1, le=1000, description="two pictures are drawn so many times for a mix, and the faintest seam is kept"
    )
    mix_priors: bool = Field(
        True, description="mixes have counterparts, mixes of prior images; else prior images as they are go with them"
    )
    seed: Seed = Field(0, description="everything random in the mixes follows from it")
    prompts: Annotated[list[PairPrompt], AfterValidator(_distinct)] = Field(
        ["a {first} beside a {second}", "a {first} sitting beside a {second}"],
        min_length=1,
        description="evaluation prompts of pairs, in other words than the mixes' own; {first} and {second} become "
        "every two of the subjects",
    )
    validation_prompts: Prompts = Field(
        ["a {subject}", "a {first} beside a {second}"],
        min_length=1,
        description="rows of a pair's validation grid; {subject} becomes each subject",
    )
    train: dict[str, Any] = Field({}, description="keys of `train` that pairs set differently")
    methods: dict[Method, dict[str, Any]] = Field({}, description="keys of `train` by method, for pairs")


class PairConfig(Section):
    """Two or three concepts learned together."""

    concepts: list[str] = Field(min_length=2, max_length=3, description="names under `concepts`")
    train: dict[str, Any] = Field({}, description="keys of `train` that this pair sets differently")


class StartConfig(Section):
    """Where the sampling of an edit starts, and how much noise it is given on the way (Sec. 3.4)."""

    eta: float = Field(ge=0, le=1, description="η of DDIM; 0 injects nothing")
    alpha: float = Field(ge=0, le=1, description="α of Eq. 7: 0 is the inverted picture, 1 random noise: no inversion")


class EditingConfig(Section):
    """Editing of single pictures (Sec. 3.4): what all edits have in common."""

    train: dict[str, Any] = Field({"steps": 120}, description="keys of `train` that edits set differently")
    methods: dict[Literal["svdiff", "full", "lora"], dict[str, Any]] = Field(
        {}, description="keys of `train` by method, for edits"
    )
    starts: dict[Name, StartConfig] = Field(
        {
            "noise": StartConfig(eta=0.0, alpha=1.0),
            "inversion": StartConfig(eta=0.5, alpha=0.0),
            "mixture": StartConfig(eta=0.9, alpha=0.9),
        },
        min_length=1,
        description="each is sampled from; by default the paper's (supplement C): without inversion, with it, and from a "
        "mixture of both for edits that move things",
    )
    seeds: Seeds = Field([0, 1], min_length=1, description="one picture a prompt, start and seed")
    steps: Steps = Field(50, description="DDIM steps, of inversion and of sampling")
    guidance: Guidance = Field(3.0, description="scale s of Eq. 9 in sampling; inversion has none")

    @field_validator("starts")
    @classmethod
    def _free(cls, starts: dict[str, StartConfig]) -> dict[str, StartConfig]:
        if taken := sorted({"input", "autoencoder", "reconstruction"} & starts.keys()):
            raise ValueError(f"scores of other pictures are called {', '.join(taken)}: give the start another name")
        return starts


class EditConfig(Section):
    """One picture and what it shall become."""

    image: str = Field(min_length=1, description="the picture")
    prompt: Prompt = Field(description="what it shows, without a special token")
    targets: list[Prompt] = Field(min_length=1, description="the prompt as it shall be, once an edit")
    train: dict[str, Any] = Field({}, description="keys of `train` that this edit sets differently")

    @model_validator(mode="after")
    def _edited(self) -> EditConfig:
        if self.prompt in self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must differ from each other and from the prompt '{self.prompt}': {self.targets}")
        return self


def readable(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line a mistake in values for `model`: the key, what is wrong with it, what was found."""
    lines = []
    for problem in error.errors():
        where = prefix + ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            section: Any = model
            for part in problem["loc"][:-1]:
                field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
                if field is not None:  # else `part` is a name in a dictionary of sections
                    section = (get_args(field.annotation) or (field.annotation,))[-1]
            known = ", ".join(section.model_fields) if hasattr(section, "model_fields") else ""
            near = did_you_mean(str(problem["loc"][-1]), known.split(", "))
            lines.append(f"{where}: unknown key{near}" + (f" Known here: {known}" if known else ""))
        elif problem["type"] == "value_error":
            lines.append((f"{where}: " if where else "") + problem["msg"].removeprefix("Value error, "))
        else:
            found = "" if problem["type"] == "missing" else f" (found {problem['input']!r}{_quotes(problem)})"
            lines.append(f"{where.removesuffix('.[key]')}: {problem['msg']}{found}")
    return "\n".join(lines)


def _quotes(problem: Any) -> str:
    """Where words were expected and YAML found a number, a date or a truth value: how to write words."""
    expected, found = problem["type"], problem["input"]
    return "; in quotes it is a word" if expected == "string_type" and not isinstance(found, str | list | dict) else ""

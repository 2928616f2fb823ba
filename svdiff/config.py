"""`params.yaml` as one validated, described model.

Every section is one class of `sections`; every key has a description, which `svdiff config` prints. An unknown key or a bad value is
refused by name, with what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from svdiff.catalogue import SECTIONS, Entry, Kind
from svdiff.errors import SvdiffError
from svdiff.sections import (
    METHOD_RATES,
    RATES,
    BaseModelConfig,
    ClassWord,
    ConceptConfig,
    CorrelateConfig,
    EditConfig,
    EditingConfig,
    EvaluatorsConfig,
    MixConfig,
    Name,
    PairConfig,
    PriorConfig,
    PromoteConfig,
    RankConfig,
    ReevaluateConfig,
    SampleConfig,
    ScoreConfig,
    Section,
    StartConfig,
    TrackingConfig,
    TrainConfig,
    readable,
)
from svdiff.words import did_you_mean

__all__ = [
    "BaseModelConfig",
    "ConceptConfig",
    "Config",
    "CorrelateConfig",
    "EditConfig",
    "EditingConfig",
    "EvaluatorsConfig",
    "MixConfig",
    "PairConfig",
    "PriorConfig",
    "PromoteConfig",
    "RankConfig",
    "ReevaluateConfig",
    "SampleConfig",
    "ScoreConfig",
    "Section",
    "StartConfig",
    "TrackingConfig",
    "TrainConfig",
    "describe",
    "load_config",
]


class Config(Section):
    """All of params.yaml."""

    base: BaseModelConfig = BaseModelConfig()
    evaluators: EvaluatorsConfig = EvaluatorsConfig()
    threads: int | None = Field(
        None,
        ge=1,
        description="threads to compute with on a CPU, which decide the last digits of figures; default: one a core",
    )
    classes: list[ClassWord] = Field(description="class words in use; each gets prior images drawn by the base")
    regularisation: dict[ClassWord, str] = Field(
        {}, description="class words in use whose prior images are own pictures, each with their folder"
    )
    concepts: dict[Name, ConceptConfig] = Field({}, description="the concepts, by name")
    pairs: dict[Name, PairConfig] = Field({}, description="concepts learned together, by the pair's name")
    edits: dict[Name, EditConfig] = Field({}, description="edits of single pictures, by name")
    prior: PriorConfig = PriorConfig()
    train: TrainConfig = TrainConfig()
    mix: MixConfig = MixConfig()
    edit: EditingConfig = EditingConfig()
    sample: SampleConfig
    score: ScoreConfig = ScoreConfig()
    correlate: CorrelateConfig = CorrelateConfig()
    rank: RankConfig = RankConfig()
    tracking: TrackingConfig = TrackingConfig()
    promote: PromoteConfig = PromoteConfig()
    reevaluate: ReevaluateConfig = ReevaluateConfig()
    base_training: dict[str, Any] = Field({}, description="how the embedded base is made: read by `svdiff base` alone")

    @model_validator(mode="after")
    def _names_agree(self) -> Config:
        self._check_names()
        self._check_classes()
        self._check_tokens()
        for name, pair in self.pairs.items():
            self._check_pair(name, pair)
        for kind in SECTIONS:
            for name in self._section(kind):
                self.train_config(name)
        for name in self.edits:
            for method in self.edit.methods:
                self.train_config(name, {"method": method})
        for key, names in (
            ("rank.concepts", self.rank.concepts),
            ("correlate.second_runs", self.correlate.second_runs),
        ):
            for name in names:
                if name not in self.concepts:
                    raise ValueError(
                        f"{key} names '{name}', which is not among concepts ({', '.join(self.concepts)})"
                        + did_you_mean(name, self.concepts)
                    )
        return self

    @property
    def class_words(self) -> list[str]:
        """All class words in use, whoever their prior images are from."""
        return [*self.classes, *self.regularisation]

    def _section(self, kind: Kind) -> dict[str, Any]:
        """The entries of one kind by name."""
        found: dict[str, Any] = getattr(self, SECTIONS[kind])
        return found

    def _check_names(self) -> None:
        """A name is a folder of every stage, so it belongs to one entry alone, also where case is not told apart."""
        owners: dict[str, tuple[str, str]] = {}
        for kind, section in SECTIONS.items():
            for name in self._section(kind):
                other, owner = owners.setdefault(name.casefold(), (name, section))
                if (other, owner) != (name, section):
                    raise ValueError(
                        f"'{name}' under {section} and '{other}' under {owner} would share their folders: rename one"
                    )

    def _check_classes(self) -> None:
        folded = [word.casefold() for word in self.class_words]
        if len(set(folded)) < len(folded):
            raise ValueError(
                f"classes and regularisation name one class twice: {', '.join(self.class_words)}; each word once, in one "
                "spelling: under classes the base draws its prior images, under regularisation they are your own"
            )
        for name, concept in self.concepts.items():
            if concept.class_word not in self.class_words:
                raise ValueError(
                    f"concepts.{name}.class_word is '{concept.class_word}', which is not in classes "
                    f"({', '.join(self.class_words)}); add it there, so that its prior images are made"
                )

    def _check_tokens(self) -> None:
        """A special token that prompts or classes have as a word would be trained away from its meaning."""
        texts = [*self.class_words, self.train.prompt, self.prior.prompt, *self.train.validation_prompts]
        texts += [*self.sample.prompts, *self.mix.prompts, *self.mix.validation_prompts, *self.rank.prompts.values()]
        texts += [text for edit in self.edits.values() for text in (edit.prompt, *edit.targets)]
        words = {word for text in texts for word in re.findall(r"\w+", text.casefold())}
        for name, concept in self.concepts.items():
            if concept.token.casefold() in words:
                raise ValueError(
                    f"concepts.{name}.token is '{concept.token}', an ordinary word of classes or prompts; "
                    "expected a rare one, such as sks"
                )

    def _check_pair(self, name: str, pair: PairConfig) -> None:
        unknown = [concept for concept in pair.concepts if concept not in self.concepts]
        if unknown:
            raise ValueError(
                f"pairs.{name}.concepts names '{unknown[0]}', which is not among concepts ({', '.join(self.concepts)})"
                + did_you_mean(unknown[0], self.concepts)
            )
        if len(set(pair.concepts)) < len(pair.concepts):
            raise ValueError(f"pairs.{name}.concepts names one concept twice: {', '.join(pair.concepts)}")
        tokens = [self.concepts[concept].token for concept in pair.concepts]
        if len({token.casefold() for token in tokens}) < len(tokens):  # tokenizers of Stable Diffusion fold case
            raise ValueError(
                f"pairs.{name}: the tokens of {', '.join(pair.concepts)} are {', '.join(tokens)}; concepts that are "
                "learned together need different ones, also in lower case: change `token` of one"
            )

    def entry(self, name: str) -> Entry:
        """The concept, pair or edit called `name`; SvdiffError with the known names if there is none."""
        if name in self.pairs:
            return Entry(name, "pair", {concept: self.concepts[concept] for concept in self.pairs[name].concepts})
        if name in self.edits:
            return Entry(name, "edit")
        return Entry(name, "concept", {name: self.concept(name)})

    def concept(self, name: str) -> ConceptConfig:
        """The concept called `name`; SvdiffError with the known names if there is none."""
        if name not in self.concepts:
            entries = [known for kind in SECTIONS for known in self._section(kind)]
            raise SvdiffError(
                f"no concept, pair or edit '{name}' in params.yaml{did_you_mean(name, entries)} Known: "
                f"{', '.join(sorted(entries)) or 'none'}. A new concept is an entry under `concepts:` with a class_word, "
                f"and its pictures in data/concepts/{name}/"
            )
        return self.concepts[name]

    def pair_of(self, name: str) -> PairConfig:
        """The pair called `name`; SvdiffError with the known names if there is none."""
        if name not in self.pairs:
            raise SvdiffError(
                f"no pair '{name}' in params.yaml; known: {', '.join(sorted(self.pairs)) or 'none'}{did_you_mean(name, self.pairs)} Add it under "
                "`pairs:` with the concepts that it joins"
            )
        return self.pairs[name]

    def edit_of(self, name: str) -> EditConfig:
        """The edit called `name`; SvdiffError with the known names if there is none."""
        if name not in self.edits:
            raise SvdiffError(
                f"no edit '{name}' in params.yaml; known: {', '.join(sorted(self.edits)) or 'none'}{did_you_mean(name, self.edits)} Add it under "
                "`edits:`, or edit a picture at once: svdiff edit IMAGE --prompt … --target …"
            )
        return self.edits[name]

    def train_config(self, name: str, overrides: dict[str, Any] | None = None) -> TrainConfig:
        """`train` with what the entry's kind, the entry itself and `overrides` set differently, validated.

        Rates belong to one method: those beside a `method` are taken for that method alone, others have those under
        `methods:` or `METHOD_RATES`.
        """
        kind = self.entry(name).kind
        of_kind: dict[str, Any] = {}
        by_method: Mapping[Any, dict[str, Any]] = {}
        if kind == "pair":
            of_kind = {"validation_prompts": self.mix.validation_prompts} | self.mix.train
            by_method = self.mix.methods
        elif kind == "edit":
            of_kind = {"prior_weight": 0.0} | self.edit.train
            by_method = self.edit.methods
        entry: dict[str, Any] = self._section(kind)[name].train
        layers = [self.train.model_dump(exclude_unset=True, exclude={"methods"}), of_kind, entry, overrides or {}]
        method: Any = next((layer["method"] for layer in reversed(layers) if "method" in layer), "svdiff")
        values: dict[str, Any] = dict(METHOD_RATES.get(method, {}))
        current = "svdiff"
        for layer, of_method in zip(layers, [self.train.methods, by_method, {}, {}], strict=True):
            current = layer.get("method", current)
            values |= {key: value for key, value in layer.items() if current == method or key not in RATES}
            values |= of_method.get(method, {})
        own = entry | (overrides or {})
        settings = TrainConfig.checked(values | {"method": method}, f"{SECTIONS[kind]}.{name}.train.")
        _check_effect(kind, name, own, settings)
        return settings

    def sample_prompts(self, name: str) -> list[str]:
        """The evaluation prompts of an entry, in its own words."""
        entry = self.entry(name)
        return entry.prompts(self.mix.prompts if entry.kind == "pair" else self.sample.prompts)

    def validation_prompts(self, name: str, settings: TrainConfig) -> list[str]:
        """The prompts that are drawn during a training, in the entry's own words: of an edit the one that it learns."""
        entry = self.entry(name)
        return [self.edits[name].prompt] if entry.kind == "edit" else entry.prompts(settings.validation_prompts)


#: Keys of `train` that say nothing to a kind of entry: what an edit is trained on stands in the edit itself (Sec. 3.4).
WITHOUT_EFFECT: dict[Kind, tuple[str, ...]] = {
    "concept": ("methods", "mix_probability", "unmix_weight"),
    "pair": ("methods", "holdout", "fit", "masks", "flip", "jitter"),
    "edit": (
        "methods",
        "holdout",
        "fit",
        "masks",
        "flip",
        "jitter",
        "prompt",
        "validation_prompts",
        "prior_weight",
        "mix_probability",
        "unmix_weight",
        "single_subject_weight",
        "train_token",
        "token_init",
    ),
}


def _check_effect(kind: Kind, name: str, own: dict[str, Any], settings: TrainConfig) -> None:
    """Raises SvdiffError for a setting of the entry's own that would change nothing."""
    where = f"{SECTIONS[kind]}.{name}.train"
    for key in WITHOUT_EFFECT[kind]:
        if own.get(key):
            raise SvdiffError(f"{where}.{key} is {own[key]!r}, which has no effect on {kind}s: leave it out")
    if kind == "edit" and settings.prior_weight > 0:
        raise SvdiffError(f"edit.train.prior_weight is {settings.prior_weight}; an edit has no class: leave it 0")
    if kind == "edit" and settings.method == "custom-diffusion":
        raise SvdiffError(f"{where}: custom-diffusion trains a special token, and an edit has none; choose another")


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
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8-sig"))  # as DVC reads it
    except (YAMLError, UnicodeDecodeError) as error:
        raise SvdiffError(f"{path} is not YAML: {str(error).partition('To suppress')[0].strip()}") from None
    if not isinstance(values, dict):
        raise SvdiffError(f"{path} holds {type(values).__name__}, expected sections such as `concepts:` and `train:`")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise SvdiffError(f"{path}:\n" + readable(error, Config)) from None

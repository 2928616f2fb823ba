"""`svdiff check`: refuses a params.yaml that the pipeline cannot work with, before DVC removes or runs anything.

Stages whose outputs are named by params.yaml depend on the stage of this command. DVC removes the old outputs of a stage
before its command runs, so what the command itself refuses would be refused too late.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from svdiff.config import Config
from svdiff.data.cutmix import mix_prompts, prior_mix_prompts
from svdiff.errors import SvdiffError
from svdiff.evaluation.evaluators import describe_evaluators
from svdiff.files import write_atomic
from svdiff.models import is_distilled, load_words, native_size
from svdiff.models.compatibility import check_family, check_precision
from svdiff.sections import BaseModelConfig, EvaluatorsConfig
from svdiff.words import did_you_mean, is_folder

OUTPUT = Path("out/check.txt")  # the same whatever params.yaml says, so that a change of it reruns nothing else
EVALUATORS = Path("out/evaluators.json")  # changes with what scores, so that other evaluators rerun what scores


def check(config: Config) -> Path:
    """Write out/check.txt and out/evaluators.json.

    Raises SvdiffError for a base or evaluators that DVC cannot follow or that are not there, or words that the base cannot read.
    """
    _check_base(config.base)
    _check_places(config.evaluators)
    _check_names(config.evaluators)
    for word, folder in config.regularisation.items():
        if not Path(folder).is_dir():
            raise SvdiffError(
                f"regularisation.{word} is '{folder}', which is no folder here (looked from {Path.cwd()}); expected one with "
                "pictures of the class, or leave it out and name the class under `classes`"
            )
    family = load_words(config.base)
    for name, concept in config.concepts.items():
        with _named_in(f"concepts.{name}"):
            family.check_token(concept.token)
    for name in config.pairs:
        family.check_tokens(config.entry(name).tokens)
    for name in [*config.concepts, *config.pairs, *config.edits]:
        settings = config.train_config(name)
        with _named_in(name):
            check_family(family, settings)
            check_precision(config.base, settings)
    native_size(config.base)
    if config.sample.beta < 1 and is_distilled(config.base):
        raise SvdiffError(
            f"sample.beta is {config.sample.beta:g}, and the base is distilled and knows no negative prompts: set it to 1"
        )
    for place, eta in _etas(config):
        with _named_in(place):
            family.check_eta(eta)
    for place, prompt in _prompts(config):
        with _named_in(place):
            family.check_prompt(prompt)
    write_atomic(EVALUATORS, json.dumps(describe_evaluators(config.evaluators), indent=2) + "\n")
    write_atomic(OUTPUT, "params.yaml can be worked with\n")
    return OUTPUT


def check_written(config: Config, params: Path) -> None:
    """Every key that dvc.yaml names stands in params.yaml: defaults are known here, and not to DVC.

    Keys of entries that there are none of (`foreach` over nothing) are not asked for. Raises SvdiffError with the lines to add.
    """
    pipeline = params.resolve().parent / "dvc.yaml"
    if not pipeline.is_file():
        return
    read = YAML(typ="safe")
    written = read.load(params.read_text(encoding="utf-8-sig"))
    values, lacking = config.model_dump(mode="json"), dict[str, Any]()
    for key in sorted(_named(read.load(pipeline.read_text(encoding="utf-8"))["stages"], values)):
        section, _, inner = key.partition(".")
        if not inner and section not in written:
            lacking.setdefault(section, {})
        elif inner and inner not in (written.get(section) or {}):
            lacking.setdefault(section, {})[inner] = values[section][inner]
    if lacking:
        lines = "\n".join(f"{section}: {json.dumps(keys, ensure_ascii=False)}" for section, keys in lacking.items())
        raise SvdiffError(
            f"{params} leaves out what dvc.yaml follows, and DVC knows no defaults. Write there, to leave all as it is:\n{lines}"
        )


def _named(stages: dict[str, Any], values: dict[str, Any]) -> set[str]:
    """Keys of params.yaml that stages name by themselves, not by an entry."""
    found: set[str] = set()
    for stage in stages.values():
        over = stage.get("foreach", "")[2:-1]
        if over.count("."):
            found.add(over)
        section, _, key = over.partition(".")
        if stage.get("frozen") or (over and not (values[section][key] if key else values[section])):
            continue
        body = stage.get("do", stage)
        found.update(key for key in body.get("params", []) if "$" not in key)
        found.update(key for key in re.findall(r"\$\{([\w.]+)\}", str(body)) if not re.match(r"(item|key)\b", key))
    return found


def _check_base(base: BaseModelConfig) -> None:
    """DVC follows the base by its files."""
    for key, name in {"model": base.model, "config": base.config or ""}.items():
        if name and not Path(name).exists() and not is_folder(name):
            folder = f"models/{name.rpartition('/')[2]}"
            raise SvdiffError(
                f"base.{key} is '{name}', a Hub id, and the pipeline follows a base by its files: bring it into a folder, "
                f"`hf download {name} --local-dir {folder}`, and set base.{key}: {folder}"
            )


def _check_names(evaluators: EvaluatorsConfig) -> None:
    """Weights that open_clip has none of would end the stage `score`, after all that is trained and drawn."""
    model, tag = evaluators.clip_model, evaluators.clip_pretrained
    if is_folder(model) or model.startswith("hf-hub:") or not tag or Path(tag).is_file() or not find_spec("open_clip"):
        return
    from open_clip.pretrained import is_pretrained_cfg, list_pretrained_tags_by_model

    if not is_pretrained_cfg(model, tag):
        known = list_pretrained_tags_by_model(model)
        raise SvdiffError(
            f"evaluators.clip_pretrained is '{tag}'; expected weights that open_clip has of clip_model '{model}': "
            f"{', '.join(known) or 'it knows no such model'}{did_you_mean(tag, known)}"
        )


def _check_places(evaluators: EvaluatorsConfig) -> None:
    """The stage of this command depends on models/, whole."""
    for key, path in evaluators.local.items():
        if not Path(os.path.normpath(path)).is_relative_to("models"):
            raise SvdiffError(
                f"evaluators.{key} is '{path}', and the pipeline follows evaluators by the files in models/: copy it there"
            )


@contextmanager
def _named_in(place: str) -> Iterator[None]:
    """Say of what is refused where it comes from."""
    try:
        yield
    except SvdiffError as error:
        raise SvdiffError(f"{place}: {error}") from None


def _etas(config: Config) -> Iterator[tuple[str, float]]:
    """Each η that something is sampled with, with its place in params.yaml."""
    if config.classes:
        yield "prior.eta", config.prior.eta
    yield "sample.eta", config.sample.eta
    if config.edits:
        yield from ((f"edit.starts.{name}.eta", start.eta) for name, start in config.edit.starts.items())


def _prompts(config: Config) -> Iterator[tuple[str, str]]:
    """All prompts that the pipeline reads, each with the place in params.yaml that it comes from."""
    for name in [*config.concepts, *config.pairs]:
        entry, settings = config.entry(name), config.train_config(name)
        for template in settings.prompt, config.prior.prompt:
            yield from ((name, prompt) for prompt in entry.class_prompts(template))
        for template in (settings.prompt, *settings.validation_prompts):
            yield from ((name, prompt) for prompt in entry.prompts([template]))
        yield from ((name, prompt) for prompt in config.sample_prompts(name))
    for name in config.pairs:
        entry, settings = config.entry(name), config.train_config(name)
        first, second = entry.subjects[0], entry.subjects[-1]
        classes = [concept.class_word for concept in entry.concepts.values()]
        for layout in config.mix.layouts:
            for words in mix_prompts(first, second, layout=layout):
                yield f"pairs.{name}", settings.prompt.replace("{subject}", words)
        negatives = prior_mix_prompts(classes[0], classes[-1], template=config.prior.prompt, layouts=config.mix.layouts)
        yield from ((f"pairs.{name}", prompt) for prompt in negatives)
    for name, edit in config.edits.items():
        yield from ((f"edits.{name}", prompt) for prompt in (edit.prompt, *edit.targets))
    for name in config.rank.concepts:
        for template in config.rank.prompts.values():
            yield from (("rank.prompts", prompt) for prompt in config.entry(name).prompts([template]))
    yield from (("sample.negatives", prompt) for prompt in config.sample.negatives)

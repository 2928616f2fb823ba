"""The order of the stages of dvc.yaml, from pictures to a registered version, for those who run them one by one."""

from __future__ import annotations

from svdiff.catalogue import Entry, Kind
from svdiff.config import Config

OWN: dict[Kind, list[str]] = {
    "concept": ["train", "sample", "score", "register"],
    "pair": ["mix", "train-pair", "sample-pair", "score-pair", "register-pair"],
    "edit": ["train-edit", "edit"],
}


def shared_stages(config: Config, name: str) -> list[str]:
    """The check of params.yaml and the prior images of the classes that a name needs; an edit needs none of those."""
    words = dict.fromkeys(concept.class_word for concept in config.entry(name).concepts.values())
    return ["check", *(f"{'own-prior' if word in config.regularisation else 'prior'}@{word}" for word in words)]


def own_stages(config: Config, name: str) -> list[str]:
    """Stages of one name alone, after those it shares with others. Raises SvdiffError for an unknown name."""
    return [f"{stage}@{name}" for stage in OWN[config.entry(name).kind]]


def stage_of(entry: Entry, step: str) -> str:
    """The stage that takes a step (`train`, `sample` …) of an entry: `sample-pair@two-cats`."""
    return next(f"{stage}@{entry.name}" for stage in OWN[entry.kind] if stage.partition("-")[0] == step)


def analysis_stages(config: Config) -> list[str]:
    """Stages that look at everything together."""
    second_runs = [f"second-run@{concept}" for concept in config.correlate.second_runs]
    return [*second_runs, "correlate", *(f"rank@{concept}" for concept in config.rank.concepts), "report"]

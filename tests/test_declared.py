"""What a stage opens and reads of params.yaml while it runs is what dvc.yaml says: on the tiny base, in this process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from svdiff.config import Config, load_config

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = """
base: {model: base}
classes: [dog]
concepts:
  one: {class_word: dog, token: sks}
prior: {images: 2, steps: 1}
train: {steps: 2, validate_every: 2, save_every: 1, validation_seeds: [0]}
sample: {prompts: ["a {subject} on a red background"], seeds: [0], steps: 1, drift_pictures: 2}
tracking: {live: none}
rank: {concepts: []}
"""
#: Sections whose values decide nothing that a stage writes: where the curve is shown.
NEUTRAL = {"tracking"}
#: Who is asked for: the entry that a stage is named after stands in the sections of entries, with all others.
NAMES = {"classes", "concepts", "pairs", "edits"}

_opened: set[Path] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str) and not arguments[2] & os.O_WRONLY:
        _opened.add(Path(os.path.abspath(arguments[0])))


sys.addaudithook(_note)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[set[Path], set[str]]]:
    """Files that Python opens, and sections of params.yaml that are read, while this is entered."""
    global _opened
    _opened, sections = set(), set()
    plain = Config.__getattribute__

    def reading(config: Config, name: str) -> Any:
        if name in Config.model_fields:
            sections.add(name)
        return plain(config, name)

    with monkeypatch.context() as patched:
        patched.setattr(Config, "__getattribute__", reading)
        try:
            yield _opened, sections
        finally:
            _opened = None


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("declared")
    (root / "base").symlink_to(tiny_base)
    (root / "params.yaml").write_text(PARAMS)
    (root / "data/concepts/one").mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((40, 40), 40 + number).convert("RGB").save(root / f"data/concepts/one/{number}.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        patched.setenv("SVDIFF_HOME", str(root / ".svdiff"))
        yield root


def run_stage(stage: str, config: Config) -> None:
    from svdiff.sampling.prior import make_prior_images
    from svdiff.sampling.stage import sample_entry
    from svdiff.training import train

    {
        "prior": lambda: make_prior_images(config, "dog"),
        "train": lambda: train(config, "one"),
        "sample": lambda: sample_entry(config, "one"),
    }[stage]()


def declared(stage: str, kind: str) -> list[str]:
    """Paths of a stage of `one` as dvc.yaml names them, filled in."""
    paths = []
    for entry in STAGES[stage]["do"].get(kind, []):
        path = entry if isinstance(entry, str) else next(iter(entry))
        for written, meant in (("base.model", "base"), ("item.class_word", "dog"), ("key", "one"), ("item", "dog")):
            path = path.replace(f"${{{written}}}", meant)
        assert "$" not in path
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    "stage", ["prior", "train", "sample"]
)  # in this order: each reads what the one before has made
def test_a_stage_opens_and_reads_what_it_declares(
    project: Path, tiny_base: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config()
    with recorded(monkeypatch) as (opened, sections):
        run_stage(stage, config)
    inside = {path.relative_to(project) for path in opened if project in path.parents and path.is_file()}
    inside |= {Path("base") / path.relative_to(tiny_base) for path in opened if tiny_base in path.parents}
    inside = {path for path in inside if path.parts[0] != ".svdiff"}
    allowed = [Path(path) for kind in ("deps", "outs", "plots", "metrics") for path in declared(stage, kind)]
    undeclared = {path for path in inside if not any(path == known or known in path.parents for known in allowed)}
    assert inside, "nothing was recorded"
    assert {str(path) for path in undeclared if not re.search(r"/\.", f"/{path}")} == set()
    named = {parameter.partition(".")[0] for parameter in STAGES[stage]["do"]["params"]}
    assert sections - NEUTRAL - NAMES - named == set()
    assert sections & named, "nothing was recorded"

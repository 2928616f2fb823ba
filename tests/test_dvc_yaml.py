"""dvc.yaml agrees with the code: what a stage calls exists, it depends on the code that it runs, and nothing typed reaches a shell."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from svdiff.check import check_written
from svdiff.config import Config, load_config
from svdiff.errors import SvdiffError
from svdiff.experiments import cells

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
BODIES: dict[str, Any] = {name: stage.get("do", stage) for name, stage in STAGES.items()}

#: The module whose function a stage's command calls.
ENTRY = {
    "prior": "svdiff.sampling.prior",
    "own-prior": "svdiff.sampling.prior",
    "mix": "svdiff.data.mixes",
    "train": "svdiff.training.stage",
    "train-pair": "svdiff.training.stage",
    "train-edit": "svdiff.training.stage",
    "sample": "svdiff.sampling.stage",
    "sample-pair": "svdiff.sampling.stage",
    "score": "svdiff.evaluation.score",
    "score-pair": "svdiff.evaluation.score",
    "edit": "svdiff.editing.stage",
    "correlate": "svdiff.evaluation.correlation",
}
#: Modules that decide no result: how settings are read (their values are `params`), files written, names found, curves shown.
NEUTRAL = r"svdiff(\.(errors|secrets|files|words|config|sections|catalogue|peaks))?|svdiff\.data\.prior|svdiff\.training\.tracking"
#: What a stage imports and does not use: the baselines' file format comes with what puts it on a pipeline, and so on.
UNUSED = {
    "prior": r"svdiff\.spectral.*|svdiff\.data\.(concepts|reading)",  # the hash of the base's weights names a cache; own pictures
    "own-prior": r"svdiff\.spectral.*|svdiff\.sampling\.(images|noise|guidance|inversion)",  # draws nothing
    "mix": r"svdiff\.spectral\..*",  # hashes no weights
    "sample": r"svdiff\.data\.(cutmix|foreground)",  # prompts of mixes are negatives of pairs
    "sample-pair": r"svdiff\.data\.foreground",  # cuts subjects out of the pictures of mixes
    "correlate": r"svdiff\.(data|models|sampling|training)(\..*)?",  # `second-run` trains
    "edit": r"svdiff\.(data|training)(\..*)?",  # trains nothing: `train-edit` has
}


@cache
def imports() -> Any:
    import grimp

    return grimp.build_graph("svdiff", cache_dir=None)


def code_of(module: str) -> set[str]:
    """The module and all modules of svdiff that it imports, in however many steps, but for what decides no result."""
    return {name for name in {module, *imports().find_upstream_modules(module)} if not re.fullmatch(NEUTRAL, name)}


@pytest.mark.parametrize(
    ("patterns", "entry", "unused"),
    [
        (cells.TRAINING, "train", r"svdiff\.sampling.*"),  # draws validation pictures, which no cell shows
        (cells.DRAWING, "sample", UNUSED["sample"]),
        (cells.DRAWING, "sample-pair", r"svdiff\.data\.(cutmix|foreground)"),  # negatives are in the key themselves
        (cells.SCORING, "score", "-"),
        (cells.SCORING, "score-pair", "-"),
    ],
)
def test_a_cell_of_an_experiment_depends_on_all_the_code_that_decides_its_result(
    patterns: tuple[str, ...], entry: str, unused: str
) -> None:
    covered = {path.relative_to(cells.PACKAGE) for pattern in patterns for path in cells.PACKAGE.glob(pattern)}
    code = {name for name in code_of(ENTRY[entry]) if not re.fullmatch(unused, name)}
    files = {Path(*name.split(".")[1:]) for name in code}
    assert (
        sorted(str(f) for f in files if f.with_suffix(".py") not in covered and f / "__init__.py" not in covered) == []
    )


def is_covered(module: str, dependencies: list[str]) -> bool:
    path = module.replace(".", "/")
    return any(dep in (path, f"{path}.py") or path.startswith(f"{dep}/") for dep in dependencies)


@pytest.mark.parametrize("stage", ENTRY)
def test_a_stage_depends_on_all_the_code_that_decides_its_result(stage: str) -> None:
    code = {name for name in code_of(ENTRY[stage]) if not re.fullmatch(UNUSED.get(stage, "-"), name)}
    assert sorted(name for name in code if not is_covered(name, BODIES[stage]["deps"])) == []


@pytest.mark.parametrize("stage", BODIES)
def test_code_dependencies_exist_and_are_none_of_the_command_line(stage: str) -> None:
    code = [dep for dep in BODIES[stage].get("deps", []) if dep.startswith(("svdiff", "flows"))]
    assert code, "a stage that does not depend on its code is never rerun when the code changes"
    assert [dep for dep in code if not (ROOT / dep).exists()] == []
    assert [dep for dep in code if dep == "svdiff" or dep.startswith("svdiff/cli")] == []


@pytest.mark.parametrize("stage", BODIES)
def test_parameters_are_keys_of_the_model_and_stand_in_params(stage: str) -> None:
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    for parameter in BODIES[stage].get("params", []):
        section, *keys = parameter.split(".")
        assert section in Config.model_fields
        found = values[section]
        for key in keys if "$" not in parameter else ():
            found = found[key]  # DVC refuses a parameter that is not in the file


@pytest.mark.parametrize("stage", BODIES)
def test_commands_exist_and_no_text_of_params_reaches_the_shell(stage: str) -> None:
    from flows.__main__ import app as flows_app
    from svdiff.cli import COMMANDS

    command = BODIES[stage]["cmd"]
    assert "$" not in command
    for part in command.split(" && "):
        found = re.match(r"(svdiff|python -m flows) ([a-z-]+)", part)
        assert found is not None
        flows_commands = {c.name or c.callback.__name__ for c in flows_app.registered_commands if c.callback}
        assert found[2] in (flows_commands if "flows" in found[1] else COMMANDS)


EVERY_KIND = """
classes: [teddy bear, child's toy]
concepts:
  bear: {class_word: teddy bear}
  toy: {class_word: child's toy}
pairs: {both: {concepts: [bear, toy]}}
edits: {one: {image: one.png}}
"""
SELECTIONS = {
    "of every kind": EVERY_KIND + "rank: {concepts: [bear]}",
    "without rank": EVERY_KIND + "rank: {concepts: []}",
    "one concept": "classes: [dog]\nconcepts: {a: {class_word: dog}}\nrank: {concepts: []}",
    "edits alone": "classes: []\nedits: {one: {image: one.png}}\nrank: {concepts: []}",
    "nothing": "classes: []\nrank: {concepts: []}",
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_any_selection_of_entries_is_a_pipeline(tmp_path: Path, selection: str) -> None:
    """As DVC resolves it."""
    from dvc.parsing import DataResolver
    from dvc.repo import Repo

    (tmp_path / "params.yaml").write_text(
        SELECTIONS[selection] + "\nbase: {model: models/base}\ncorrelate: {second_runs: []}\n"
    )
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    repo = Repo.init(str(tmp_path), no_scm=True)
    stages = DataResolver(repo, str(tmp_path), yaml.safe_load((tmp_path / "dvc.yaml").read_text())).resolve()["stages"]
    repo.close()
    names = {stage for stage in stages if "@" in stage}
    entries = yaml.safe_load(SELECTIONS[selection])
    assert {n for n in names if n.startswith("prior@")} == {f"prior@{word}" for word in entries["classes"]}
    assert {n for n in names if n.startswith("train@")} == {f"train@{name}" for name in entries.get("concepts", {})}
    assert {n for n in names if n.startswith("rank@")} == {f"rank@{name}" for name in entries["rank"]["concepts"]}
    assert {"correlate", "report"} <= stages.keys()


OPTIONAL = [name for name, field in Config.model_fields.items() if not field.is_required()]


@pytest.mark.parametrize(
    "left_out",
    [
        *(pytest.param(name, marks=() if name in ("edit", "train") else pytest.mark.slow) for name in OPTIONAL),
        *("sample.eta", "edit.starts", "mix.prompts", "rank.concepts"),
    ],
)
def test_what_params_yaml_leaves_out_is_said_with_the_lines_that_dvc_wants(tmp_path: Path, left_out: str) -> None:
    """DVC knows no defaults: it would stop at every command, or after hours at the stage that reads the key."""
    from dvc.dependency.param import ParamsDependency
    from dvc.repo import Repo

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    section, _, key = left_out.partition(".")
    if key:
        values[section].pop(key)
    else:
        values.pop(section, None)
    if section == "concepts":
        values |= {"pairs": {}, "rank": {"concepts": []}}
    params = tmp_path / "params.yaml"
    params.write_text(yaml.safe_dump(values))
    (tmp_path / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text())
    try:
        check_written(load_config(params), params)
    except SvdiffError as error:
        lines = yaml.safe_load(str(error).partition("\n")[2])
        for name, keys in lines.items():
            values[name] = values.get(name, {}) | keys
        params.write_text(yaml.safe_dump(values))
        assert left_out.split(".")[0] in lines
    check_written(load_config(params), params)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        for stage in repo.index.stages:
            for dependency in stage.deps:
                if isinstance(dependency, ParamsDependency) and not stage.frozen:
                    dependency.get_hash()  # raises where a key is missing


def test_a_class_word_is_handed_over_beside_the_shell(tmp_path: Path) -> None:
    """DVC runs a command in a shell; NAME comes through the environment."""
    (tmp_path / "params.yaml").write_text('classes: ["$(touch evil) \'x"]\n')
    print_name = f"{sys.executable} -c \"import os; open('name', 'w').write(os.environ['DVC_STAGE'])\""
    stage = {"foreach": "${classes}", "do": {"cmd": print_name}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"prior": stage}}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=tmp_path, check=True)
    assert (tmp_path / "name").read_text() == "prior@$(touch evil) 'x"
    assert not (tmp_path / "evil").exists()

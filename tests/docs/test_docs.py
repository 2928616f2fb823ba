"""The docs say what is there: every command, option, file and name of the code in them exists, and the site builds by itself."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("svdiff", "python -m flows")


@cache
def text_of(page: Path) -> str:
    """A page's text."""
    return page.read_text()


def blocks(text: str) -> Iterator[str]:
    """Lines of indented or fenced code."""
    fenced = False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def spans(text: str) -> list[str]:
    """What stands between backticks, in prose; but for CONTRIBUTING's table of quotes."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"(?m)^\| \*\*.*$", "", text))


def calls(page: Path, *, complete: bool) -> list[list[str]]:
    """Calls of our programs on a page, as words: whole lines of code, or what prose mentions."""
    found = []
    for part in (blocks if complete else spans)(text_of(page)):
        line = re.sub(r"^(\$ |[A-Z_]+=\S+ )*", "", part)
        if line.startswith(tuple(program + " " for program in PROGRAMS)):
            found += [shlex.split(command, comments=True) for command in line.split(" && ")]
    return [words for words in found if words[0] == "svdiff" or words[:3] == ["python", "-m", "flows"]]


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The click command that the words call, and what is left of them. Raises KeyError for one that is not there."""
    import typer

    from svdiff.cli import COMMANDS, load

    if words[0] == "svdiff":
        if words[1].startswith("--"):
            from svdiff.cli import app

            return typer.main.get_command(app), words[1:]
        if words[1] not in COMMANDS:
            raise KeyError(words[1])
        command, rest = load(words[1]), words[2:]
    else:
        flows: Any = typer.main.get_group(importlib.import_module("flows.__main__").app)
        command, rest = flows.commands[words[3]], words[4:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def options_of(command: Any) -> set[str]:
    """Every spelling of every option."""
    return {"--help", *(name for param in command.params for name in (*param.opts, *param.secondary_opts))}


def alternatives(words: list[str]) -> Iterator[list[str]]:
    """`up|down` is two calls."""
    for place, word in enumerate(words):
        if "|" in word:
            for choice in word.split("|"):
                yield from alternatives([*words[:place], choice, *words[place + 1 :]])
            return
    yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_in_the_docs_exist_and_take_what_they_are_given(page: Path) -> None:
    import click

    for words in calls(page, complete=True):
        command, rest = find_command(words)
        try:
            command.make_context(" ".join(words), [word for word in rest if word != "…"])
        except click.exceptions.Exit:  # --help, --version
            pass
        except (click.UsageError, click.exceptions.NoArgsIsHelpError) as error:
            pytest.fail(f"{page.name}: `{' '.join(words)}`: {error.format_message()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_prose_mentions_exist_with_their_options(page: Path) -> None:
    for mentioned in calls(page, complete=False):
        for words in alternatives(mentioned):
            if words[1] in ("…", "COMMAND"):
                continue
            command, rest = find_command(words)
            unknown = {word.partition("=")[0] for word in rest if word.startswith("-")} - options_of(command)
            assert not unknown, f"{page.name}: `{' '.join(words)}` has no {unknown}"


def test_a_command_that_is_not_there_is_found_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("    svdiff trian x\n\nand `svdiff train --fast x`\n")
    with pytest.raises(KeyError):
        find_command(calls(page, complete=True)[0])
    command, rest = find_command(calls(page, complete=False)[0])
    assert set(rest) - options_of(command) == {"--fast", "x"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_of_the_code_in_the_docs_exist(page: Path) -> None:
    for span in spans(
        re.sub(r"(?m)^\| \*\*.*$", "", text_of(page))
    ):  # but other projects' files, which the table quotes
        if re.fullmatch(r"(svdiff|flows|tests|benchmarks|examples|docs)/[\w/.-]*\w", span):
            assert (ROOT / span).exists(), f"{page.name}: `{span}`"
        if re.fullmatch(r"(svdiff|flows)(\.\w+)+", span) and not span.startswith("svdiff.champion"):
            assert exists(span), f"{page.name}: `{span}`"
        if match := re.fullmatch(r"python -m (benchmarks\.\w+)", span):
            assert (ROOT / f"{match[1].replace('.', '/')}.py").exists(), span


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    module, _, attribute = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ImportError:
        return hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_of_params_yaml_in_examples_exist(page: Path) -> None:
    from svdiff.sections import TrainConfig

    keys = set(re.findall(r"train: \{([^}]+)\}", text_of(page)))
    for given in keys:
        TrainConfig.checked(yaml.safe_load(f"{{{given}}}"))


def test_tokens_in_examples_are_words_of_the_embedded_base() -> None:
    from svdiff.base.words import SPECIAL_WORDS

    texts = [text_of(page) for page in (*PAGES, *(ROOT / "examples").glob("*.py"))]
    tokens = {token for text in texts for token in re.findall(r"(?m)^ *token: (\w+)|--token (\w+)", text)}
    assert {a or b for a, b in tokens} - set(SPECIAL_WORDS) == set()
    assert tokens


def test_quotes_of_our_code_in_contributing_are_still_right() -> None:
    rows = [line.split(" | ")[-1] for line in text_of(ROOT / "CONTRIBUTING.md").splitlines() if line.startswith("| **")]
    assert len(rows) == 8
    for row in rows:
        [(file, quote)] = re.findall(r"`([^`]+)`: `{1,2}(.+?)`{1,2} \|$", row)
        assert quote in (ROOT / file).read_text(), f"{file} no longer says: {quote}"


def test_every_stage_is_in_the_picture_of_the_pipeline() -> None:
    picture = unescape((ROOT / "docs/pictures/pipeline.svg").read_text())
    drawn = set(re.findall(r"<title>([\w-]+)</title>", picture))
    params, stages = (yaml.safe_load((ROOT / name).read_text()) for name in ("params.yaml", "dvc.yaml"))
    asked = {"second-run": params["correlate"]["second_runs"], "own-prior": params.get("regularisation")}
    empty = {stage for stage, entries in asked.items() if not entries}
    assert drawn == set(stages["stages"]) - empty, "draw it again: make dag"


def test_every_room_has_a_page_in_the_reference() -> None:
    documented = "".join(text_of(page) for page in PAGES if page.parent.name == "reference")
    rooms = {f"{folder.parent.name}.{folder.name}" for package in ("svdiff", "flows") for folder in (ROOT / package).glob("*/")
             if (folder / "__init__.py").is_file()}  # fmt: skip
    assert rooms - set(re.findall(r"::: ([\w.]+)", documented)) == {"svdiff.cli"}


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 25
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+rel=\"?(?:stylesheet|preconnect|icon)[^>]+href=\"?(?:https?:)?//"
    )
    assert not [page for page in pages if loaded.search(page.read_text())]


def test_every_yes_beside_other_trainers_names_tests_that_exist() -> None:
    known = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    rows = [line.strip("|").split("|") for line in text_of(ROOT / "docs/comparison.md").splitlines() if "|" in line]
    features = {row[0].strip(): row[1].strip() for row in rows if row[0].strip() and not row[0].startswith("-")}
    assert len(features) > 40
    for feature, ours in features.items():
        named = re.findall(r"`(test_\w+)`", ours)
        assert named or ours == "no", f"{feature}: names no test"
        assert set(named) <= known, f"{feature}: there is no {', '.join(set(named) - known)}"

"""The command line: at once, and in words for people."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svdiff.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def svdiff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command as a person does; exit status, what it says, and what it complains of."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svdiff", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
            raise SystemExit(0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    monkeypatch.chdir(ROOT)
    return call


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['svdiff', '--help']\nfrom svdiff.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'pandas', 'mlflow', 'prefect') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"
    for command in (
        "prior",
        "mix",
        "train",
        "sample",
        "score",
        "correlate",
        "rank",
        "report",
        "plan",
        "doctor",
        "subsets",
        "delta",
        "base",
        "attention",
        "strip",
        "compare-pairs",
    ):
        assert f" {command} " in done.stdout


def test_an_unknown_concept_is_refused_with_what_was_perhaps_meant(svdiff) -> None:
    status, _, error = svdiff("train", "--concept", "openmoji-dgo")
    assert status == 2
    assert "no concept, pair or edit 'openmoji-dgo'" in error
    assert "did you mean 'openmoji-dog'" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "give one name"),
        (("train", "openmoji-dog", "--concept", "openmoji-dog"), "give one name"),
        (("sample", "--delta", "openmoji-dog"), "--delta without --prompt"),
        (("sample", "openmoji-dog", "--delta", "openmoji-dog", "--prompt", "a dog"), "either NAME or --delta"),
        (("sample", "openmoji-dog", "--prompt", "a dog", "--negative", "a cat"), "beta"),
        (("sample", "openmoji-dog", "--prompt", "a dog", "--beta", "3"), "beta"),
        (("attention", "dog-and-cat", "--prompt", "a {subject}"), "is 2 prompts"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(svdiff, arguments, words: str) -> None:
    status, _, error = svdiff(*arguments)
    assert status == 2
    assert words in error


def test_outside_a_checkout_it_says_so(svdiff, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = svdiff("report")
    assert status == 2
    assert "params.yaml not found" in error

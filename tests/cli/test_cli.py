"""The command line: at once, and in words for people."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def svdiff(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "svdiff.cli", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


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


def test_an_unknown_concept_is_refused_without_a_traceback() -> None:
    done = svdiff("train", "--concept", "dragon")
    assert done.returncode == 2
    assert "no concept 'dragon'" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_does_not_go_together_is_said_before_anything_is_loaded() -> None:
    for arguments, words in (
        (("train",), "give one name"),
        (("train", "openmoji-dog", "--concept", "openmoji-dog"), "give one name"),
        (("sample", "--delta", "openmoji-dog"), "--delta without --prompt"),
        (("sample", "openmoji-dog", "--delta", "openmoji-dog", "--prompt", "a dog"), "either NAME or --delta"),
        (("sample", "openmoji-dog", "--prompt", "a dog", "--negative", "a cat"), "--negative needs --beta"),
        (("sample", "openmoji-dog", "--prompt", "a dog", "--beta", "3"), "beta"),
        (("attention", "dog-and-cat", "--prompt", "a {subject}"), "is 2 prompts"),
    ):
        done = svdiff(*arguments)
        assert done.returncode == 2, arguments
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    done = svdiff("report", cwd=tmp_path)
    assert done.returncode == 2
    assert "params.yaml not found" in done.stderr

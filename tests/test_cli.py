"""The command line: at once, and in words for people."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    ):
        assert f" {command} " in done.stdout


def test_an_unknown_concept_is_refused_without_a_traceback() -> None:
    done = svdiff("train", "--concept", "dragon")
    assert done.returncode == 2
    assert "no concept 'dragon'" in done.stderr
    assert "Traceback" not in done.stderr


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    done = svdiff("report", cwd=tmp_path)
    assert done.returncode == 2
    assert "params.yaml not found" in done.stderr

"""Which room imports which: the contracts of pyproject.toml, and what the parameter space rests on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_contracts_of_pyproject_are_kept() -> None:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_parameter_space_is_imported_with_torch_and_safetensors_alone() -> None:
    code = "import svdiff.spectral, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    others = {
        "diffusers",
        "transformers",
        "accelerate",
        "peft",
        "pandas",
        "matplotlib",
        "PIL",
        "pydantic",
        "yaml",
        "typer",
    }
    assert not others & set(done.stdout.split())


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports the files of folders without __init__.py by their names alone, and collects neither of two."""
    folders = [
        folder for folder in (ROOT / "tests").rglob("*") if folder.is_dir() and "__pycache__" not in folder.parts
    ]
    names = [
        path.name
        for folder in (ROOT / "tests", *folders)
        if not (folder / "__init__.py").is_file()
        for path in folder.glob("*.py")
        if path.name != "conftest.py"
    ]
    assert sorted(names) == sorted(set(names))

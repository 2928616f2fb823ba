"""The wheel in an environment of its own, outside of any checkout: what `pip install svdiff` gives."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
WITHOUT_THE_WORKFLOW = """
import sys
sys.modules |= dict.fromkeys(("prefect", "mlflow", "dvc"))  # importing them fails
import svdiff.editing.stage, svdiff.evaluation.score, svdiff.models, svdiff.sampling.stage, svdiff.spectral, svdiff.training
print(svdiff.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel; the packages that it needs are those of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("svdiff", "flows"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    programs = folder / "environment" / "bin"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(programs.parent)], check=True)
    python = str(programs / "python")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    [packages] = programs.parent.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    shutil.rmtree(source)
    return programs


def run(installed: Path, folder: Path, *command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_commands_answer_outside_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    assert "Personalise diffusion models" in run(installed, tmp_path, "svdiff", "--help")
    assert "322856" in run(installed, tmp_path, "svdiff", "subsets", "--base", "sd15")


def test_the_library_does_without_the_workflows_packages(installed: Path, tmp_path: Path) -> None:
    where = Path(run(installed, tmp_path, "python", "-c", WITHOUT_THE_WORKFLOW).strip())
    assert installed.parent in where.parents


def test_what_is_no_code_comes_along(installed: Path) -> None:
    [package] = installed.parent.glob("lib/python*/site-packages/svdiff")
    data = [
        path.relative_to(ROOT / "svdiff") for path in (ROOT / "svdiff").rglob("*") if path.suffix in (".html", ".typed")
    ]
    assert len(data) >= 2
    assert [path for path in data if not (package / path).is_file()] == []

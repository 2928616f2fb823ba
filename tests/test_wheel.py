"""The wheel in an environment of its own, outside of any checkout: what `pip install svdiff` gives."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

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


def run(installed: Path, folder: Path, *command: str, expected: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
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


def required(requirements: list[str], extras: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of what pip would install for these requirements, with the extras asked of each."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield canonicalize_name(requirement.name), tuple(requirement.extras)


@pytest.fixture
def plain(installed: Path, tmp_path: Path) -> Iterator[Path]:
    """The programs of an environment that `pip install svdiff` makes: of other packages what it declares, and theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo, done = list(required(project["dependencies"])), set()
    [packages] = installed.parent.glob("lib/python*/site-packages")
    others = tmp_path / "others"
    others.mkdir()
    while todo:
        if (asked := todo.pop()) in done:
            continue
        done.add(asked)
        try:
            found = distribution(asked[0])
        except PackageNotFoundError:
            continue  # as torch's own for other machines
        todo += required(found.requires or [], asked[1])
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (others / top).exists():
                (others / top).symlink_to(found.locate_file(top))
    everything = (packages / "others.pth").read_text()
    (packages / "others.pth").write_text(str(others))
    yield installed
    (packages / "others.pth").write_text(everything)


def test_a_plain_install_trains_draws_and_edits(plain: Path, tiny_base: Path, tmp_path: Path) -> None:
    """With the library's own dependencies alone: from pictures to a pair, a picture, an edit and a LoRA."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 90
    for name in ("rex", "tom"):
        (tmp_path / "data/concepts" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data/concepts" / name / "0.png")
    params = {
        "base": {"model": str(tiny_base)},
        "classes": ["cat", "dog"],
        "concepts": {"rex": {"class_word": "dog"}, "tom": {"class_word": "cat", "token": "zwx"}},
        "pairs": {"both": {"concepts": ["rex", "tom"]}},
        "prior": {"images": 2, "steps": 2},
        "train": {"steps": 2},
        "sample": {"prompts": ["a {subject}"], "seeds": [0], "steps": 2},
        "edit": {"steps": 2, "train": {"steps": 2}},
    }
    (tmp_path / "params.yaml").write_text(json.dumps(params))
    assert run(plain, tmp_path, "python", "-c", "import importlib.util as u; print(u.find_spec('mlflow'))") == "None\n"
    assert "without the workflow" in run(plain, tmp_path, "svdiff", "doctor", expected=1)
    assert "rex: fix first" in run(plain, tmp_path, "svdiff", "data", "check", "rex")
    for words in ("prior dog", "prior cat", "mix both", "train rex", "train both"):
        assert "wrote out/" in run(plain, tmp_path, "svdiff", *words.split())
    asked = ("sample", "--delta", "both", "--prompt", "a dog", "--steps", "2")
    [picture] = run(plain, tmp_path, "svdiff", *asked).splitlines()
    assert Image.open(tmp_path / picture.removeprefix("wrote ")).size == (16, 16)
    edit = ("edit", "data/concepts/rex/0.png", "--prompt", "a dog", "--target", "a cat", "--output", "edited")
    run(plain, tmp_path, "svdiff", *edit)  # with a warning that nothing scores it
    assert list((tmp_path / "edited").rglob("*.png")) != []
    delta = "out/train/rex/delta.safetensors"
    run(plain, tmp_path, "svdiff", "export", delta, "--lora", "--base", str(tiny_base), "--output", "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_size > 0

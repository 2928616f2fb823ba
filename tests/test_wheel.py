"""The wheel in an environment of its own, outside of any checkout: what `pip install svdiff` gives."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import site
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import httpx
import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from flows.services.supervision import answers

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


def run(programs: Path, folder: Path, *command: str, expected: int = 0) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [programs / command[0], *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == expected, done.stdout + done.stderr
    return done.stdout + (done.stderr if expected else "")


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


@contextmanager
def only(installed: Path, folder: Path, *extras: str) -> Iterator[Path]:
    """The programs of the environment that `pip install 'svdiff[…]'` makes: of other packages what it declares, and theirs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    todo = list(required([*project["dependencies"], *(text for extra in extras for text in optional[extra])]))
    done = set[tuple[str, tuple[str, ...]]]()
    [packages] = installed.parent.glob("lib/python*/site-packages")
    others = folder / "others"
    others.mkdir()
    while todo:
        if (asked := todo.pop()) in done:
            continue
        done.add(asked)
        if asked[0] == "svdiff":  # an extra that brings another one
            todo += required([text for extra in asked[1] for text in optional[extra]])
            continue
        try:
            found = distribution(asked[0])
        except PackageNotFoundError:
            continue  # as torch's own for other machines
        todo += required(found.requires or [], asked[1])
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (others / top).exists():
                (others / top).symlink_to(found.locate_file(top))
        for program in found.entry_points.select(group="console_scripts", name="dvc"):
            script = f"#!{installed}/python\nfrom {program.module} import {program.attr}\n{program.attr}()\n"
            (installed / program.name).write_text(script)
            (installed / program.name).chmod(0o755)
    everything = (packages / "others.pth").read_text()
    (packages / "others.pth").write_text(str(others))
    try:
        yield installed
    finally:
        (packages / "others.pth").write_text(everything)


@pytest.fixture
def plain(installed: Path, tmp_path: Path) -> Iterator[Path]:
    with only(installed, tmp_path) as programs:
        yield programs


def write_project(folder: Path, base: Path, **others: object) -> None:
    """A person's folder of two concepts, a pair and settings that take seconds."""
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 90
    for name in ("rex", "tom"):
        (folder / "data/concepts" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "data/concepts" / name / "0.png")
    params = {
        "base": {"model": str(base)},
        "classes": ["cat", "dog"],
        "concepts": {"rex": {"class_word": "dog"}, "tom": {"class_word": "cat", "token": "zwx"}},
        "pairs": {"both": {"concepts": ["rex", "tom"]}},
        "prior": {"images": 2, "steps": 2},
        "train": {"steps": 2},
        "sample": {"prompts": ["a {subject}"], "seeds": [0], "steps": 2},
        "edit": {"steps": 2, "train": {"steps": 2}},
    }
    (folder / "params.yaml").write_text(json.dumps(params | others))


def test_a_plain_install_trains_draws_and_edits(plain: Path, tiny_base: Path, tmp_path: Path) -> None:
    """With the library's own dependencies alone: from pictures to a pair, a picture, an edit and a LoRA."""
    write_project(tmp_path, tiny_base)
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


@pytest.fixture(scope="module")
def checkout(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone with data and base."""
    root = tmp_path_factory.mktemp("clone") / "svdiff"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    run(installed, root, "svdiff", "sync")
    return root


def test_with_evaluation_it_scores_and_reports(installed: Path, checkout: Path, tmp_path: Path) -> None:
    models = checkout / "models"
    evaluators = {
        "clip_model": str(models / "clip"),
        "identity_model": str(models / "identity"),
        "lpips_weights": str(models / "lpips/backbone.safetensors"),
    }
    write_project(tmp_path, models / "base", evaluators=evaluators, pairs={})
    with only(installed, tmp_path, "evaluation") as programs:
        for words in ("prior dog", "prior cat", "train rex", "train tom", "sample rex", "sample tom", "score rex",
                      "score tom", "correlate", "report"):  # fmt: skip
            run(programs, tmp_path, "svdiff", *words.split())
        assert (tmp_path / "out/report/index.html").is_file()
        assert "svdiff[workflow]" in run(programs, tmp_path, "svdiff", "registry", "list", expected=2)
        assert "svdiff[serve]" in run(programs, tmp_path, "svdiff", "serve", expected=2)


def test_with_the_workflow_a_clone_runs_stages_and_has_a_registry(
    installed: Path, checkout: Path, tmp_path: Path
) -> None:
    with only(installed, tmp_path, "workflow") as programs:
        assert "svdiff[evaluation]" in run(programs, checkout, "svdiff", "doctor", expected=1)
        run(programs, checkout, "svdiff", "sync")
        run(programs, checkout, "python", "-m", "flows", "init")
        run(programs, checkout, "dvc", "repro", "--single-item", "check")
        assert "champion" in run(programs, checkout, "svdiff", "registry", "list")


def test_with_serve_it_draws_over_http(installed: Path, tiny_base: Path, tmp_path: Path) -> None:
    write_project(tmp_path, tiny_base)
    with only(installed, tmp_path, "serve") as programs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [programs / "svdiff", "serve", "--port", str(port)]
        with (tmp_path / "server.log").open("w") as log:
            server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not answers(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
            asked = {"model": "base", "prompt": "a dog", "size": "16x16"}
            done = httpx.post(f"http://127.0.0.1:{port}/v1/images/generations", json=asked, timeout=600)
        finally:
            server.terminate()
            server.wait()
    assert done.status_code == 200, done.text
    assert Image.open(io.BytesIO(base64.b64decode(done.json()["data"][0]["b64_json"]))).size == (16, 16)

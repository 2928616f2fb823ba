from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from world_parts import tiny_world, write_polygons

from svdiff.base.individuals import _artist
from svdiff.base.styles import STYLES
from svdiff.base.world import World


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_polygons(tmp_path_factory.mktemp("data") / "world")


@pytest.fixture(scope="session")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny world's individuals are drawn once for all tests, whichever process of a run they are in."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "sprites"
    folder.mkdir(exist_ok=True)
    if not any(folder.iterdir()):
        for style in STYLES:
            if style.package == "dicebear-styles":
                _artist(style.name)  # read here once: each process that draws would read all of them
    return folder


@pytest.fixture(scope="session")
def world(world_folder: Path, sprites: Path) -> World:
    return tiny_world(world_folder, sprites)


@pytest.fixture
def home(tmp_path: Path, sprites: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Change to another folder of resume states."""

    def change(name: str) -> None:
        folder = tmp_path / name / "base"
        folder.mkdir(parents=True)
        (folder / "sprites").symlink_to(sprites)
        monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / name))

    return change


@pytest.fixture(autouse=True)
def scratch(home: Callable[[str], None]) -> None:
    """Resume states of a test go nowhere else."""
    home("home")

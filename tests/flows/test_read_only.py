"""A checkout that cannot be written: each command works, or says in one sentence what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import Project

ROOT = Path(__file__).parents[2]
SENTENCE = "; work in a checkout of your own that can be written, or mend the permissions. Nothing finished is lost"
WORKS = ["svdiff config", "svdiff cache"]
REFUSED = [
    "svdiff sync",
    "svdiff plan",
    "svdiff score dog",
    "svdiff sample dog --prompt x",
    "svdiff strip scale out/train/dog/delta.safetensors --prompt x",
    "flows init",
    "flows list",
    "flows register dog",
    "flows promote dog --reason x",
    "flows reevaluate",
    "flows prune",
    "flows serve",
]
#: Root may write where the permissions say no, but not into a file system that is mounted so.
AS_ROOT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder in which it can write nothing."""
    before = ["unshare", "-m", "bash", "-c", AS_ROOT, str(folder)] if os.geteuid() == 0 else []
    inside = ["env", "-C", str(folder), f"PYTHONPATH={ROOT}", sys.executable, "-m", *command]
    return subprocess.run([*before, *inside], capture_output=True, text=True, check=False)


@pytest.fixture
def folder(dvc_project: Path) -> Path:
    Project(dvc_project).register()
    read_only = dvc_project.parent / "read-only"
    shutil.copytree(dvc_project, read_only)
    if os.geteuid():
        for path in [*read_only.rglob("*"), read_only]:
            path.chmod(path.stat().st_mode & ~0o222)
    elif run(read_only, "this").returncode == 1 and "mount" in run(read_only, "this").stderr:
        pytest.skip("root that may not mount cannot be refused anything")
    return read_only


@pytest.mark.slow
def test_a_checkout_that_cannot_be_written_is_used_or_refused_in_one_sentence(folder: Path) -> None:
    said = {}
    for command in [*WORKS, *REFUSED]:
        module, *arguments = command.split()
        done = run(folder, "svdiff.cli" if module == "svdiff" else module, *arguments)
        assert "Traceback" not in done.stderr, command
        said[command] = (done.returncode, done.stderr.strip().splitlines()[-1:])
    assert {command: said[command][0] for command in WORKS} == dict.fromkeys(WORKS, 0)
    assert {command: said[command][0] for command in REFUSED} == dict.fromkeys(REFUSED, 2)
    assert {command: said[command][1] for command in REFUSED if not said[command][1][0].endswith(SENTENCE)} == {}

"""A version made again from its lineage alone: equal, or refused or different for a reason that is said."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from miniature import Project

from flows.pipeline.lineage import upstream
from flows.pipeline.reproduce import Reproduction, reproduce
from flows.registry.concepts import fetch, find
from flows.registry.runs import read_lineage
from svdiff.errors import SvdiffError

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
GIT = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]


def test_upstream_is_what_a_stage_needs_in_order() -> None:
    stages = {
        "report": {"deps": [{"path": "out/b"}], "outs": [{"path": "out/report"}]},
        "b": {"deps": [{"path": "out/a"}, {"path": "code.py"}], "outs": [{"path": "out/b/x"}, {"path": "out/b/y"}]},
        "a": {"outs": [{"path": "out/a"}]},
        "other": {"outs": [{"path": "out/abc"}]},
    }
    assert list(upstream(stages, ["b"])) == ["a", "b"]
    assert list(upstream(stages, ["report"])) == ["a", "b", "report"]


class Checkout:
    """A DVC project whose pictures are in DVC, trained up to the registry."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run("git", "rm", "-r", "-q", "--cached", "data")
        self.dvc("add", "-q", "data")
        stages = (root / "dvc.yaml").read_text()  # a training depends on its code as well
        (root / "dvc.yaml").write_text(stages.replace('["data/concepts/${key}"', '[stage.py, "data/concepts/${key}"'))
        self.commit("pictures into DVC")

    def run(self, *command: str) -> None:
        done = subprocess.run(command, cwd=self.root, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def dvc(self, *arguments: str) -> None:
        self.run(sys.executable, "-m", "dvc", *arguments)

    def commit(self, message: str) -> None:
        self.run("git", "add", ".")
        self.run(*GIT, "commit", "-q", "-m", message)

    def train(self) -> None:
        self.dvc("repro", "prior@dog", "train@dog", "sample@dog", "score@dog", "register@dog")

    def reproduce(self, which: str = "dog@1") -> Reproduction:
        tracking = Project(self.root).tracking
        version = find(tracking, which)
        lineage = read_lineage(tracking, version)
        return reproduce(self.root, which, lineage, lambda folder: fetch(tracking, version, folder)[0], say=print)


@pytest.fixture
def checkout(dvc_project: Path) -> Checkout:
    made = Checkout(dvc_project)
    made.train()
    return made


def test_equal_bit_for_bit_whatever_the_workspace_is_by_now(checkout: Checkout) -> None:
    """The commit is not the newest any more, the pictures are others and the delta is gone: lineage suffices."""
    tracking = Project(checkout.root).tracking
    lineage = read_lineage(tracking, find(tracking, "dog"))
    assert list(lineage["stages"])[-3:] == ["train@dog", "sample@dog", "score@dog"]
    assert lineage["git_dirty"] == "false"
    stage = checkout.root / "stage.py"
    stage.write_text(stage.read_text().replace("/ 1000", "/ 999"))
    shutil.copy(checkout.root / "data/concepts/dog/0.png", checkout.root / "data/concepts/dog/9.png")
    checkout.dvc("add", "-q", "data")
    checkout.commit("everything is different")
    shutil.rmtree(checkout.root / "out")
    done = checkout.reproduce()
    assert done.equal
    assert not done.differences
    assert not (checkout.root / "out").exists()
    assert list((checkout.root / ".svdiff/reproduce").iterdir()) == []


def test_a_difference_is_named(checkout: Checkout) -> None:
    """A training that depends on what no record knows is found out."""
    stage = checkout.root / "stage.py"
    stage.write_text(stage.read_text().replace("/ 1000", "/ 1000 + time.time() % 1"))
    checkout.commit("the training looks at the clock")
    checkout.train()
    done = checkout.reproduce("dog@2")
    assert not done.equal
    assert "1 of 1 tensors, most in unet.conv_in.weight, by up to" in done.differences[0]


def test_a_dirty_tree_is_refused_until_it_is_committed(checkout: Checkout) -> None:
    stage = checkout.root / "stage.py"
    stage.write_text(stage.read_text() + "# not committed\n" + "print(1)\n")
    pictures = checkout.root / "data/concepts/dog"
    (pictures / "0.png").unlink()
    checkout.train()
    with pytest.raises(SvdiffError, match="dog@2 was registered from a dirty tree"):
        checkout.reproduce("dog@2")
    checkout.dvc("commit", "-f", "-q", "data.dvc")
    checkout.commit("what was trained with")
    checkout.run(sys.executable, "-m", "flows", "register", "dog")
    assert checkout.reproduce("dog@2").equal


def test_a_commit_that_a_shallow_clone_lacks_is_named_with_the_way_to_it(checkout: Checkout) -> None:
    tracking = Project(checkout.root).tracking
    lineage = read_lineage(tracking, find(tracking, "dog"))
    checkout.run(*GIT, "commit", "-q", "--allow-empty", "-m", "later")
    shallow = checkout.root.parent / "shallow"
    checkout.run("git", "clone", "-q", "--depth", "1", f"file://{checkout.root}", str(shallow))
    with pytest.raises(SvdiffError, match=rf"{lineage['git_commit']}.*`git fetch --unshallow` brings it"):
        reproduce(shallow, "dog@1", lineage, lambda folder: folder, say=print)


def test_a_base_that_neither_git_nor_dvc_has_is_taken_from_here_if_it_is_the_same(dvc_project: Path) -> None:
    checkout = Checkout(dvc_project)
    base = checkout.root / "models/large"
    base.mkdir(parents=True)
    (base / "weights").write_text("trained on these")
    (checkout.root / ".gitignore").write_text((checkout.root / ".gitignore").read_text() + "/models\n")
    stages = (checkout.root / "dvc.yaml").read_text()
    (checkout.root / "dvc.yaml").write_text(stages.replace("[stage.py, ", "[stage.py, models/large, "))
    checkout.commit("a base as the how-to says")
    checkout.train()
    assert checkout.reproduce().equal
    assert (base / "weights").read_text() == "trained on these"
    (base / "weights").write_text("others")
    with pytest.raises(SvdiffError, match=r"models/large with hash \S+ is neither in the DVC cache nor .* nor here in"):
        checkout.reproduce()


def test_data_that_is_gone_is_named(checkout: Checkout) -> None:
    shutil.rmtree(checkout.root / ".dvc/cache/files")
    shutil.rmtree(checkout.root / "data/concepts/dog")
    with pytest.raises(SvdiffError, match=r"data/concepts/dog with hash \S+ is neither in the DVC cache nor"):
        checkout.reproduce()

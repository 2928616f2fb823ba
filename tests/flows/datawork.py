"""Two people's clones of one project for tests: pictures in DVC, a shared remote, stages that only copy, a real MLflow registry."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from miniature import Project, registered

from flows.pipeline.sync import sync
from svdiff.config import load_config

ROOT = Path(__file__).parents[2]
GIT = {f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
Pictures = dict[str, bytes]  # by file name
Catalogue = dict[str, Pictures]  # by concept

STAGES = """
stages:
  train:
    foreach: ${concepts}
    do:
      cmd: mkdir -p out/made && cat data/concepts/${key}/* > out/made/${key}
      deps: ["data/concepts/${key}"]
      params: ["concepts.${key}"]
      outs: ["out/made/${key}"]
"""


class Clone:
    """A clone and what somebody does in it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def origin(cls, folder: Path) -> Clone:
        """The first clone, of a new bare repository with one concept, and an empty DVC remote beside it."""
        subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(folder / "origin")], check=True)
        clone = cls(folder / "one")
        subprocess.run(["git", "clone", "--quiet", str(folder / "origin"), str(clone.root)], check=True, stderr=-3)
        clone.git("checkout", "--quiet", "-b", "main")
        from dvc.repo import Repo

        with Repo.init(str(clone.root)):
            pass
        (clone.root / ".dvc/config").write_text(
            f"[core]\n    remote = store\n    analytics = false\n['remote \"store\"']\n    url = {folder / 'remote'}\n"
        )
        for name in (".gitattributes", ".gitignore"):
            (clone.root / name).write_bytes((ROOT / name).read_bytes())
        with open(clone.root / ".gitignore", "a") as ignored:
            ignored.write("/out\n/mlruns\n/.dvc/tmp\n")
        (clone.root / "dvc.yaml").write_text(STAGES)
        clone.write_params(
            {"classes": [], "concepts": {}, "sample": {"prompts": ["a {subject}"]}, "rank": {"concepts": []}}
        )
        clone.add("first", {"0.png": b"first"})
        clone.sync()
        clone.commit()
        clone.push()
        return clone

    def clone(self, name: str) -> Clone:
        """A fresh clone of the same origin, without data."""
        other = Clone(self.root.parent / name)
        subprocess.run(["git", "clone", "--quiet", str(self.root.parent / "origin"), str(other.root)], check=True)
        return other

    def git(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["git", *arguments], cwd=self.root, env=os.environ | GIT, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"git {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m …`, as a person types it."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=self.root, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done

    # ---- what lies here --------------------------------------------------------------------------------------------------

    def folder(self, name: str) -> Path:
        return self.root / "data/concepts" / name

    def pictures(self, name: str) -> Pictures:
        return {path.name: path.read_bytes() for path in self.folder(name).glob("*")}

    @property
    def params(self) -> dict[str, Any]:
        values: dict[str, Any] = yaml.safe_load((self.root / "params.yaml").read_text())
        return values

    def write_params(self, values: dict[str, Any]) -> None:
        (self.root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def catalogue(self) -> Catalogue:
        """The concepts of params.yaml and their pictures."""
        return {name: self.pictures(name) for name in self.params["concepts"]}

    # ---- what a person does ----------------------------------------------------------------------------------------------

    def write(self, name: str, pictures: Pictures) -> None:
        """Make the folder hold these pictures and no others."""
        self.folder(name).mkdir(parents=True, exist_ok=True)
        for path in self.folder(name).iterdir():
            if path.name not in pictures:
                path.unlink()
        for file, content in pictures.items():
            (self.folder(name) / file).write_bytes(content)

    def add(self, name: str, pictures: Pictures) -> None:
        self.write(name, pictures)
        values = self.params
        values["classes"].append(f"kind {name}")
        values["concepts"][name] = {"class_word": f"kind {name}", "token": "sks"}
        self.write_params(values)

    def remove(self, name: str) -> None:
        for path in self.folder(name).iterdir():
            path.unlink()
        self.folder(name).rmdir()
        self.forget(name)

    def forget(self, name: str) -> None:
        """Take a concept out of params.yaml alone."""
        values = self.params
        values["classes"].remove(values["concepts"].pop(name)["class_word"])
        self.write_params(values)

    def rename(self, old: str, new: str) -> None:
        self.folder(old).rename(self.folder(new))
        pictures = self.pictures(new)
        self.forget(old)
        self.add(new, pictures)

    def sync(self) -> list[str]:
        return list(sync(self.root, load_config(self.root / "params.yaml")))

    def sync_killed(self, seconds: float) -> None:
        """Begin `sync`, and kill -9 it after a while."""
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                self.sync()
            os._exit(0)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def commit(self) -> str:
        """Commit everything; the commit's name."""
        self.git("add", "-A")
        self.git("commit", "--quiet", "--allow-empty", "-m", "work")
        return self.git("rev-parse", "HEAD").stdout.strip()

    def push(self) -> bool:
        """Pictures to the DVC remote and commits to origin, which may have newer ones."""
        with self._dvc() as repo:
            repo.push(all_commits=True)  # of every commit that git is about to push
        return self.git("push", "--quiet", "origin", "HEAD:main", check=False).returncode == 0

    def pull(self) -> bool:
        """Merge origin; given up where both sides changed the same."""
        if self.git("pull", "--quiet", "--no-rebase", "--no-edit", "origin", "main", check=False).returncode == 0:
            return True
        self.git("merge", "--abort")
        return False

    def reproduce(self) -> None:
        """`dvc repro`, then a version of each concept, as the stage `register` makes it."""
        with self._dvc() as repo:
            repo.reproduce()

    def train_base(self, weights: bytes) -> None:
        """Make the output of the frozen stage `base-model`, and have DVC record it."""
        path = self.root / "models/base"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(weights)
        with self._dvc() as repo:
            repo.commit("base-model", force=True)

    def made(self, name: str) -> bytes:
        return (self.root / "out/made" / name).read_bytes()

    def register(self, name: str) -> float:
        """Register what was made of a concept; the value in its delta."""
        value = int(hashlib.sha256(self.made(name)).hexdigest()[:6], 16) / 2**24
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it to the store that this process used last
        Project(self.root).register(name, value=value)
        return value

    def versions(self, name: str) -> int:
        return len(registered(self.root, name))

    @contextlib.contextmanager
    def _dvc(self) -> Iterator[Any]:
        from dvc.repo import Repo

        with Repo(str(self.root)) as repo:
            here = Path.cwd()
            os.chdir(self.root)
            try:
                yield repo
            finally:
                os.chdir(here)


def some_pictures(chance: random.Random) -> Pictures:
    """One to four pictures; contents come back now and then, as pictures in the cache do."""
    return {f"{chance.randrange(5)}.png": bytes([chance.randrange(6)]) * 8 for _ in range(chance.randint(1, 4))}

"""Trains a registered version again from its lineage alone, and compares it bit for bit.

A clone of this repository at the version's commit, with the version's own entries of dvc.lock, gets its inputs from
the DVC cache or remote by hash, or from here what neither git nor DVC has, such as a large base. DVC must find nothing
changed in it; then the training runs again, without any resume state or run cache, by the code of that commit. Equal means
equal files: same shifts, same metadata.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flows.pipeline.lineage import git, makers_of, packages
from flows.pipeline.order import stage_of
from flows.pipeline.process_tree import running
from svdiff.catalogue import Entry
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file
from svdiff.models import scratch

Say = Callable[[str], None]
TAIL = 20  # lines of a failed command that are shown


@dataclass(frozen=True)
class Reproduction:
    """What came of making a version again; `differences` is empty if and only if the files are equal."""

    version: str
    registered: str  # SHA-256 of the registered delta
    made: str
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether both files are the same, byte for byte."""
        return self.registered == self.made


def reproduce(
    root: Path,
    which: str,
    lineage: dict[str, Any],
    fetch: Callable[[Path], Path],
    *,
    into: Path | None = None,
    say: Callable[[str], None],
) -> Reproduction:
    """Train a version again from its lineage in a clone of `root`, and compare.

    Args:
        root: a checkout of the repository that the version comes from.
        which: the version's name, for messages.
        lineage: what was recorded of it.
        fetch: puts the registered delta into a folder, and returns its path.
        into: folder for the clone, which then stays there; default one that is removed.
        say: called with a line for each step, and with the lines of the training.

    Raises:
        SvdiffError: the lineage does not suffice (no commit, a dirty tree), or what it names is not to be had any more.
    """
    commit = _usable_commit(root, which, lineage)
    stage = _training_stage(which, lineage)
    with _clone(root, which, commit, into) as clone:
        say(f"{which}: clone at {commit[:12]} in {clone}")
        _share(root, clone)
        (clone / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": lineage["stages"]}, sort_keys=False))
        _bring_inputs(root, clone, stage, lineage, say)
        say(f"{which}: training again ({stage})")
        _dvc(clone, "repro", "--single-item", "--force", "--no-run-cache", "--no-commit", stage, say=say)
        made = clone / "out" / "train" / lineage["concept"] / "delta.safetensors"
        return _compare(which, lineage, fetch, made)


def _usable_commit(root: Path, which: str, lineage: dict[str, Any]) -> str:
    """The commit of a lineage that says everything. Raises SvdiffError for one that does not, or is not here."""
    commit = str(lineage["git_commit"])
    if commit == "none":
        raise SvdiffError(f"{which} was registered outside git: nobody knows the code that made it")
    if lineage["git_dirty"] != "false":
        raise SvdiffError(
            f"{which} was registered from a dirty tree: files that git tracks differed from commit {commit[:12]}, and "
            f"nobody knows how. Commit them, and `python -m flows register {lineage['concept']}` records it"
        )
    if git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        shallow = git(root, "rev-parse", "--is-shallow-repository") == "true"
        fetch = "git fetch --unshallow" if shallow else "git fetch"
        raise SvdiffError(
            f"{which} comes from commit {commit}, which this repository does not have; `{fetch}` brings it"
        )
    return commit


def _training_stage(which: str, lineage: dict[str, Any]) -> str:
    stages = makers_of(lineage["stages"], [f"out/train/{lineage['concept']}"])
    if not stages:
        entry = Entry(lineage["concept"], "pair" if len(lineage["concepts"]) > 1 else "concept")
        raise SvdiffError(
            f"{which} was registered without DVC's record of its training, so that its inputs are not known; "
            f"`dvc repro {stage_of(entry, 'register')}` registers with it"
        )
    return stages[0]


@contextmanager
def _clone(root: Path, which: str, commit: str, into: Path | None) -> Iterator[Path]:
    """A clone of `root` at `commit` that shares its objects; removed at the end unless a place was named."""
    folder = (into or root / scratch() / "reproduce" / which).resolve()
    if into is None:
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was killed
    elif folder.exists():
        raise SvdiffError(f"{folder} exists; name a folder that is not there yet")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        for command in (
            ["clone", "--quiet", "--shared", "--no-checkout", str(root), str(folder)],
            ["-C", str(folder), "checkout", "--quiet", "--detach", commit],
        ):
            done = subprocess.run(["git", *command], capture_output=True, text=True)
            if done.returncode:
                raise SvdiffError(f"`git {' '.join(command)}` failed: {done.stderr.strip()}")
        yield folder
    finally:
        if into is None:
            shutil.rmtree(folder, ignore_errors=True)


def _share(root: Path, clone: Path) -> None:
    """Let the clone use this checkout's DVC cache, its local DVC settings, and its decompositions: all are by content."""
    local = root / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy2(local, clone / ".dvc" / "config.local")
    cache = _run(root, sys.executable, "-m", "dvc", "cache", "dir").stdout.strip()
    _dvc(clone, "config", "--local", "cache.dir", str((root / cache).resolve()))
    bases = (root / scratch()).resolve() / "bases"
    if bases.is_dir():
        (clone / ".svdiff").mkdir()
        (clone / ".svdiff" / "bases").symlink_to(bases)


def _bring_inputs(root: Path, clone: Path, stage: str, lineage: dict[str, Any], say: Say) -> None:
    """Check out what the training reads, from the cache, the remote or else `root`, and let DVC compare it with the record."""
    lacking = {}  # what DVC does not have, and what to say should `root` not have it either
    for dependency in lineage["stages"][stage].get("deps", []):
        path = dependency["path"]
        if git(clone, "ls-files", "--", path):
            continue  # code: the commit has it
        say(f"bringing {path} ({dependency.get('hash', 'md5')} {dependency.get('md5', '?')[:12]})")
        if (
            _dvc(clone, "checkout", "--force", path, check=False).returncode
            and (done := _dvc(clone, "pull", "--force", path, check=False)).returncode
        ):
            lacking[path] = (
                f"{path} with hash {dependency.get('md5')} is neither in the DVC cache nor to be had from the remote, nor "
                f"here in {root}; push it from a machine that has it, or put it there. DVC says:\n{_tail(done)}"
            )
            if not (root / path).exists():
                raise SvdiffError(lacking[path])
            if not (clone / path).exists():  # a path from the root of the disk is the same in both
                (clone / path).parent.mkdir(parents=True, exist_ok=True)
                (clone / path).symlink_to((root / path).resolve())
    # DVC prints `{}` for a stage without changes; its own outputs are missing, as they should be.
    status = json.loads(_dvc(clone, "status", "--json", stage).stdout or "{}")
    changed = {
        path: how
        for part in status.get(stage, [])
        if isinstance(part, dict)
        for path, how in part.get("changed deps", {}).items()
    }
    for path in lacking.keys() & changed:
        raise SvdiffError(lacking[path])
    if changed:
        raise SvdiffError(
            f"commit {lineage['git_commit'][:12]} has other inputs of {stage} than were recorded when it was trained: "
            f"{', '.join(f'{path} ({how})' for path, how in changed.items())}; it was trained before that commit"
        )


def _compare(which: str, lineage: dict[str, Any], fetch: Callable[[Path], Path], made: Path) -> Reproduction:
    registered, found = str(lineage["delta_sha256"]), sha256_file(made)
    if registered == found:
        return Reproduction(which, registered, found)
    with tempfile.TemporaryDirectory() as folder:
        differences = differing(fetch(Path(folder)), made)
    here, then = packages(), lineage["packages"]
    differences += [f"{name} was {then.get(name)}, is {here[name]}" for name in here if then.get(name) != here[name]]
    return Reproduction(which, registered, found, differences or ["the bytes alone: tensors and metadata are equal"])


def differing(registered: Path, made: Path) -> list[str]:
    """What two safetensors files differ in: tensors with the largest difference, and keys of the metadata."""
    from safetensors import safe_open

    with safe_open(str(registered), "pt") as a, safe_open(str(made), "pt") as b:
        names, others = set(a.keys()), set(b.keys())
        found = [f"tensor {name} is in one file only" for name in sorted(names ^ others)]
        apart = {}
        for name in sorted(names & others):
            one, two = a.get_tensor(name), b.get_tensor(name)
            if one.shape != two.shape or not one.equal(two):
                apart[name] = float("inf") if one.shape != two.shape else float((one - two).abs().max())
        if apart:
            worst = max(apart, key=lambda name: apart[name])
            found.append(f"{len(apart)} of {len(names)} tensors, most in {worst}, by up to {apart[worst]:.3g}")
        old, new = a.metadata() or {}, b.metadata() or {}
        found += [f"metadata {key}" for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return found


def _dvc(clone: Path, *arguments: str, check: bool = True, say: Say | None = None) -> subprocess.CompletedProcess[str]:
    """A dvc command in the clone, with the clone's own code before any that is installed."""
    done = _run(clone, sys.executable, "-m", "dvc", *arguments, say=say)
    if check and done.returncode:
        raise SvdiffError(f"`dvc {' '.join(arguments)}` failed in {clone}:\n{_tail(done)}")
    return done


def _run(folder: Path, *command: str, say: Say | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end, with `say` line by line and all in stdout; an interruption leaves no process behind."""
    lines = []
    with (
        tempfile.TemporaryFile("w+") as errors,
        running(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if say else errors,
            text=True,
        ) as process,
    ):
        for line in process.stdout or ():
            lines.append(line)
            if say:
                say(line.rstrip())
        status = process.wait()
        errors.seek(0)
        return subprocess.CompletedProcess(command, status, "".join(lines), errors.read())


def _environment(folder: Path) -> dict[str, str]:
    """Stages of the clone see its code, its own scratch folder and an MLflow store of their own."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("SVDIFF_HOME", "SVDIFF_FLOW_RUN_ID", "SVDIFF_FLOW_RUN_URL")
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    python = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    return kept | {"PATH": path, "PYTHONPATH": python, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlruns/mlflow.db"}


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(f"  {line}" for line in (done.stdout + done.stderr).splitlines()[-TAIL:])

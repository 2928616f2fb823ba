"""Mends what a killed DVC left half-written.

DVC writes its own files in place: killed meanwhile, it leaves a `rwlock`, dvc.lock or .dvc file that stops every later command.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.pipeline.lineage import git
from flows.pipeline.record import read_record, write_record
from svdiff.data.concepts import CONCEPTS
from svdiff.files import write_atomic

LOCK = "dvc.lock"
CONFLICT = "<<<<<<< "  # git's, for a person to solve


def mend_checkout(root: Path) -> list[str]:
    """`mend` the checkout at `root`, for commands that have no open repository."""
    from dvc.repo import Repo, lock_repo

    with Repo(str(root)) as repo, lock_repo(repo):
        return list(mend(repo, root.resolve()))


def mend(repo: Any, root: Path) -> Iterator[str]:
    """Replace unreadable files of DVC, saying of each what was done; `repo` is locked.

    dvc.lock and .dvc files come back as the last commit has them, and what was recorded since is found in DVC's run cache. What
    lies here then counts as changed here, since nobody can tell any more, so that no picture is replaced. The unreadable file
    is kept in .dvc/tmp.
    """
    for folder in (Path(repo.tmp_dir), Path(repo.tmp_dir) / "exps"):  # of this checkout, and of its experiments
        yield from _mend_rwlock(repo, folder)
    for path in [root / LOCK, *(root / CONCEPTS).glob("*.dvc")]:
        if path.is_file() and not _is_readable(path):
            name = path.relative_to(root).as_posix()
            _forget(root, name)
            yield f"{name}: unreadable, as a killed command leaves it; {_put_back(root, path, name)}"


def _mend_rwlock(repo: Any, folder: Path) -> Iterator[str]:
    """The record of running commands. DVC writes it under a lock of its own, so an unreadable one is a killed command's."""
    from dvc.lock import make_lock
    from dvc.rwlock import RWLOCK_FILE, RWLOCK_LOCK

    path, hardlink = folder / RWLOCK_FILE, repo.config["core"].get("hardlink_lock", False)
    if not path.exists():
        return
    with make_lock(str(folder / RWLOCK_LOCK), tmp_dir=str(folder), hardlink_lock=hardlink):
        try:
            json.loads(path.read_bytes())
            return
        except ValueError:
            path.unlink()
    yield f"{path.name}: unreadable, as a killed command leaves it; removed"


def _is_readable(path: Path) -> bool:
    """Whether DVC can read a dvc.lock or .dvc file, or git waits for somebody to solve a conflict in it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if CONFLICT in text:
        return True
    try:
        content = YAML(typ="safe").load(text)
    except YAMLError:
        return False
    if not isinstance(content, dict):
        return False
    if path.name == LOCK:
        return "schema" in content and isinstance(content.get("stages", {}), dict)
    outs = content.get("outs")
    return isinstance(outs, list) and all(isinstance(out, dict) and "path" in out for out in outs)


def _put_back(root: Path, path: Path, name: str) -> str:
    """Take the last commit's file, if it has one; what was done, in words."""
    aside = root / ".dvc/tmp" / f"{path.name}.unreadable"
    os.replace(path, aside)
    committed = git(root, "show", f"HEAD:./{name}")
    if committed is not None:
        write_atomic(path, committed + "\n")
    done = "taken away" if committed is None else "the last commit's is back"
    return f"{done}, and what it held is in {aside.relative_to(root).as_posix()}"


def _forget(root: Path, name: str) -> None:
    """What was seen of the paths that a file records says nothing any more."""
    of_concepts = CONCEPTS.as_posix() + "/"
    record = read_record(root)
    kept = {
        path: seen
        for path, seen in record.items()
        if f"{path}.dvc" != name and (name != LOCK or path.startswith(of_concepts))
    }
    if kept != record:
        write_record(root, kept)

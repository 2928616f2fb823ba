"""Where a version comes from: git commit, DVC's hash of the pictures, what DVC recorded of the stages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from svdiff.files import sha256_tree


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def git_state(root: Path) -> dict[str, str]:
    """`git_commit` and `git_dirty` of the checkout; commit `none` outside git.

    Dirty means that a tracked file differs from the commit. dvc.lock does not count: DVC rewrites it while
    the pipeline runs, and what it says is recorded with the version anyway.
    """
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": "none", "git_dirty": "true"}
    but_lock = ":(exclude,glob)**/dvc.lock"
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", but_lock)
    return {"git_commit": commit, "git_dirty": "false" if changed == "" else "true"}


def locked_stages(root: Path, concept: str) -> dict[str, Any]:
    """What dvc.lock says of the stages of `concept`: commands, dependencies, parameters, outputs, their hashes."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    stages = (yaml.safe_load(lock.read_text()) or {}).get("stages", {})
    return {name: stage for name, stage in stages.items() if name.split("@")[-1] == concept}


def data_hash(root: Path, concept: str) -> str:
    """Hash of the concept's pictures: `md5:…` as DVC recorded it for training, else `sha256:…` of them."""
    folder = f"data/concepts/{concept}"
    for dependency in locked_stages(root, concept).get(f"train@{concept}", {}).get("deps", []):
        if dependency["path"] == folder and "md5" in dependency:
            return f"md5:{dependency['md5']}"
    return f"sha256:{sha256_tree(root / folder)}" if (root / folder).exists() else "none"

"""Where results come from: git commit, DVC's hash of the pictures, what dvc.lock records of the stages.

Everything that a version needs to be made again is one file, `lineage/lineage.json` of its training's run: the commit, the
parameters in force, the entries of dvc.lock of its own stages and of those upstream of them, and the packages.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from svdiff.data.concepts import concept_folder
from svdiff.files import sha256_tree

if TYPE_CHECKING:
    from flows.pipeline.results import Results
    from svdiff.catalogue import Entry
    from svdiff.config import Config

OWN_STAGES = ("out/train", "out/sample", "out/score")  # whose outputs a version is made of
SECTIONS = ("base", "evaluators", "prior", "mix", "train", "sample", "score")
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "open_clip_torch",
    "lpips",
    "safetensors",
    "numpy",
)
Stages = dict[str, dict[str, Any]]


def git(root: Path, *arguments: str) -> str | None:
    """What git says, None where it fails or there is none."""
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
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": "none", "git_dirty": "true"}
    but_lock = ":(exclude,glob)**/dvc.lock"
    changed = git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", but_lock)
    return {"git_commit": commit, "git_dirty": "false" if changed == "" else "true"}


def read_lock(root: Path) -> Stages:
    """The stages of dvc.lock by name: commands, dependencies, parameters, outputs, their hashes. Not to be changed."""
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    status = lock.stat()
    return _parse_lock(lock, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _parse_lock(lock: Path, modified: int, size: int) -> Stages:
    # As yaml.safe_load, by libyaml where it is: with hundreds of concepts the file has tens of thousands of lines.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(lock.read_text(), Loader=loader) or {}
    stages: Stages = content.get("stages", {})
    return stages


def upstream(stages: Stages, ends: Iterable[str]) -> Stages:
    """The stages `ends` and all that they depend on, each after those it needs."""
    makers = {out["path"]: name for name, stage in stages.items() for out in stage.get("outs", [])}
    found: Stages = {}

    def visit(name: str) -> None:
        if name in found:
            return
        for dependency in stages[name].get("deps", []):
            for path, maker in makers.items():
                if maker != name and (path == dependency["path"] or path.startswith(dependency["path"] + "/")):
                    visit(maker)
        found[name] = stages[name]

    for end in ends:
        visit(end)
    return found


def makers_of(stages: Stages, folders: Iterable[str]) -> list[str]:
    """Names of the stages that write into `folders`."""
    wanted = tuple(folders)
    return [
        name
        for name, stage in stages.items()
        if any(out["path"] == f or out["path"].startswith(f + "/") for out in stage.get("outs", []) for f in wanted)
    ]


def data_hashes(root: Path, entry: Entry) -> dict[str, str]:
    """Hash of each concept's pictures: `md5:…` as DVC recorded it for the entry's own training, else `sha256:…` of them."""
    stages = read_lock(root)
    own = makers_of(stages, [f"out/mix/{entry.name}", f"out/train/{entry.name}"])  # a pair's pictures go into its mixes
    known = {d["path"]: d.get("md5") for name in own for d in stages[name].get("deps", [])}
    hashes = {}
    for name in entry.concepts:
        folder = concept_folder(name)
        md5, path = known.get(folder.as_posix()), root / folder
        hashes[name] = f"md5:{md5}" if md5 else f"sha256:{sha256_tree(path)}" if path.exists() else "none"
    return hashes


def describe_lineage(config: Config, results: Results) -> dict[str, Any]:
    """The lineage of what the stages of one name left, as lineage.json."""
    stages = read_lock(results.root)
    ends = makers_of(stages, [f"{folder}/{results.concept}" for folder in OWN_STAGES])
    return {
        "concept": results.concept,
        **git_state(results.root),
        "base": config.base.model_dump() | {"hash": results.base_hash},
        "data": data_hashes(results.root, results.entry),
        "delta_sha256": results.delta_sha256,
        "train": results.training.get("config", {}),
        "params": config.model_dump(mode="json", include=set(SECTIONS)),
        "concepts": {name: concept.model_dump(mode="json") for name, concept in results.entry.concepts.items()},
        "stages": upstream(stages, ends),
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Versions of what computes."""
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        name: installed(name) for name in PACKAGES
    }


def outputs(stages: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Hash of every output by its path."""
    return {
        out["path"]: f"{out.get('hash', 'md5')}:{out.get('md5', '')}"
        for s in stages.values()
        for out in s.get("outs", [])
    }

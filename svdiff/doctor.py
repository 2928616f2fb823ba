"""`svdiff doctor`: what this machine or checkout lacks, each with its fix."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from svdiff.errors import SvdiffError

GIB = 1024**3
DISK = 2 * GIB
MEMORY = 4 * GIB


class Finding(NamedTuple):
    """One thing looked at."""

    ok: bool
    what: str
    fix: str = ""


def examine(params: Path) -> list[Finding]:
    """Look at the interpreter, packages, tools, disk, memory, params.yaml, concept folders and the base."""
    import psutil

    findings = [
        Finding(sys.version_info >= (3, 11), f"Python {sys.version.split()[0]}", "use Python 3.11 or newer"),
        *_workflow(),
    ]
    free = shutil.disk_usage(Path.cwd()).free
    findings.append(Finding(free > DISK, f"{free / GIB:.1f} GiB of disk free", f"free at least {DISK / GIB:.0f} GiB"))
    memory = psutil.virtual_memory().available
    findings.append(
        Finding(memory > MEMORY, f"{memory / GIB:.1f} GiB of memory available", f"{MEMORY / GIB:.0f} GiB are needed")
    )
    return [*findings, *_checkout(params)]


def _workflow() -> list[Finding]:
    """The workflow's tools, and the pins that matter to it and that pip does not enforce after the fact."""
    if find_spec("prefect") is None and not Path("dvc.yaml").exists():
        return [Finding(True, "the library without the workflow, which `pip install 'svdiff[workflow]'` adds")]
    findings = [
        _tool(name, fix)
        for name, fix in (("git", "install git"), ("dvc", "activate the environment: `. .venv/bin/activate`"))
    ]
    for package, below, why in (
        ("fastapi", (0, 151), "the Prefect server does not start with a newer one"),
        ("sqlalchemy", (2, 1), "Prefect schedules nothing with a newer one"),
    ):
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(False, f"{package} is not installed", "pip install 'svdiff[workflow]'"))
            continue
        ok = tuple(int(part) for part in found.split(".")[:2]) < below
        limit = ".".join(map(str, below))
        findings.append(Finding(ok, f"{package} {found}", f"pip install '{package}<{limit}': {why}"))
    return findings


def _tool(name: str, fix: str) -> Finding:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return Finding(found is not None, f"{name} command", fix)


def _checkout(params: Path) -> list[Finding]:
    """params.yaml, the concept folders it names, the base and the evaluators."""
    from svdiff.check import check_written
    from svdiff.config import load_config
    from svdiff.data.concepts import concept_folder, load_concept_images, load_picture
    from svdiff.evaluation.evaluators import PACKAGES
    from svdiff.models import check_layout

    try:
        config = load_config(params)
        check_written(config, params)
    except SvdiffError as error:
        return [Finding(False, str(params), str(error))]
    findings = [Finding(True, f"{params}: {len(config.concepts)} concepts")]
    for name in config.concepts:
        try:
            count = len(load_concept_images(concept_folder(name)))
            findings.append(Finding(True, f"{concept_folder(name)}: {count} pictures"))
        except SvdiffError as error:
            findings.append(Finding(False, str(concept_folder(name)), f"{error} (or `svdiff sync`)"))
    for edit in config.edits.values():
        try:
            load_picture(edit.image)
            findings.append(Finding(True, edit.image))
        except SvdiffError as error:
            findings.append(Finding(False, edit.image, f"{error} (or `svdiff sync`)"))
    for package in PACKAGES:
        if find_spec(package) is None:
            missing = f"{package} is not installed, without which nothing is scored"
            findings.append(Finding(False, missing, "pip install 'svdiff[evaluation]'"))
    local = [config.base.model] if config.base.model.startswith("models/") else []
    for path in (*local, *config.evaluators.local.values()):
        findings.append(Finding(Path(path).exists(), path, f"dvc pull {path}"))
    if config.base.model in local and Path(config.base.model).exists():
        try:
            check_layout(Path(config.base.model))
        except SvdiffError as error:
            findings.append(Finding(False, config.base.model, str(error)))
    return findings

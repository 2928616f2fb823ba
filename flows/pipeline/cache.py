"""DVC's cache and remote: where they lie, and objects in the cache that nothing refers to."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.pipeline.lineage import git
from svdiff.errors import SvdiffError

RECORDS = (".dvc", "dvc.lock")  # ends of the names of files that name objects
OBJECT = re.compile(r"""md5"?: "?([0-9a-f]{32}(?:\.dir)?)""")  # in those files, and in the list of a folder's files


def dvc_places(root: Path) -> Iterator[tuple[str, Path]]:
    """DVC's cache, and its default remote if that is a folder."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(str(root))
    except NotDvcRepoError:
        return
    with repo:
        yield "DVC cache", Path(repo.cache.local_cache_dir)
        remote = repo.config["core"].get("remote")
        url = repo.config["remote"].get(remote, {}).get("url", "")
        if url and "://" not in url:
            yield f"DVC remote '{remote}'", Path(url)


def unused_objects(root: Path, also: Iterable[str] = ()) -> list[Path]:
    """Files of the cache that no commit, experiment, stash or workspace of the checkout names, nor any text of `also`.

    They are named in dvc.lock and .dvc files, which are read as they are: pipelines of old commits need not make sense
    with anything of today. Raises SvdiffError where the cache is not the checkout's alone, another command uses it, or git
    cannot say what its commits name.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo, repo.lock:
            return _unused(root.resolve(), repo.cache.local, also)
    except DvcException as error:
        raise SvdiffError(f"DVC: {error}") from error


def remove_unused_objects(root: Path, also: Iterable[str] = ()) -> None:
    """Remove what `unused_objects` finds; the remote is never touched."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo, repo.lock:
        for path in _unused(root.resolve(), repo.cache.local, also):
            path.chmod(0o600)  # DVC's files are read-only, and some systems do not remove those
            path.unlink()


def _unused(root: Path, cache: Any, also: Iterable[str]) -> list[Path]:
    if not Path(cache.path).resolve().is_relative_to(root):
        raise SvdiffError(
            f"other checkouts may use the cache at {cache.path}; `dvc gc --projects …` prunes a shared one"
        )
    named = set(OBJECT.findall("\n".join([*_records(root), *also])))
    for folder in [oid for oid in named if oid.endswith(".dir")]:
        with suppress(FileNotFoundError):  # not here, or removed with its files by somebody
            named |= set(OBJECT.findall(Path(cache.oid_to_path(folder)).read_text()))
    return [Path(cache.oid_to_path(oid)) for oid in cache.all() if oid not in named]


def _records(root: Path) -> Iterator[str]:
    """All dvc.lock and .dvc files: of the workspace, of experiments at work, of everything that git can find again."""
    for workspace in (root, root / ".dvc" / "tmp" / "exps"):
        for folder, folders, files in os.walk(workspace):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (Path(folder, file).read_text() for file in files if file.endswith(RECORDS))
    objects = git(root, "rev-list", "--all", "--reflog", "--objects")
    if objects is None and any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise SvdiffError(
            f"git cannot say what the commits of {root} name, and any of them may name what lies in the cache; "
            f"`git -C {root} rev-list --all` says why"
        )
    blobs = [line.split()[0] for line in (objects or "").splitlines() if line.endswith(RECORDS)]
    if blobs:
        command = ["git", "cat-file", "--batch"]
        found = subprocess.run(command, cwd=root, input="\n".join(blobs).encode(), capture_output=True, check=True)
        yield found.stdout.decode(errors="replace")

"""DVC's cache and remote: where they lie, and objects in the cache that nothing refers to."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from svdiff.errors import SvdiffError


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


def unused_objects(root: Path) -> list[Path]:
    """Files of the cache that `dvc gc --workspace --all-commits --all-experiments` would remove. Raises SvdiffError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo, _quiet():
            with repo.lock:
                kinds = repo.used_objs(all_commits=True, all_experiments=True, force=True).values()
            used = {o.value for objects in kinds for o in objects}
            cache = repo.cache.local
            return [Path(cache.oid_to_path(oid)) for oid in cache.all() if oid not in used]
    except DvcException as error:
        raise SvdiffError(f"DVC: {error}") from error


def remove_unused_objects(root: Path) -> None:
    """Remove what `unused_objects` finds; the remote is never touched."""
    from dvc.repo import Repo

    with Repo(str(root)) as repo, _quiet():
        repo.gc(workspace=True, all_commits=True, all_experiments=True, force=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """DVC tells of every stage of every commit that was not run then, and of every object that it removes."""
    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

"""Brings what DVC tracks into this checkout: what is missing, and what git has moved on from; never over a change made here.

Each concept folder has a .dvc file of its own beside it, so that branches which each add a concept merge. `dvc pull` cannot
tell whether a person or a commit changed a folder; a record of what was last seen here can.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flows.pipeline import merge
from flows.pipeline.mend import LOCK, mend
from flows.pipeline.record import read_record, write_record
from svdiff.data.concepts import CONCEPTS, concept_folder
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config

Action = Literal["nothing", "bring", "track", "removed"]


@dataclass(frozen=True)
class Source:
    """A file or folder that the pipeline starts from: the output of a .dvc file, or of a frozen stage."""

    path: Path  # from the root of the checkout
    target: str  # its .dvc file, or its stage as dvc.yaml:name, from the root as well
    recorded: str  # its hash in the .dvc file or dvc.lock
    here: str | None  # hash of what lies here; None: nothing does
    touched: bool  # whether what lies here changed after that file was written
    out: Any = field(compare=False, default=None)  # DVC's own object

    @property
    def of_concept(self) -> bool:
        """Whether it is a person's pictures."""
        return CONCEPTS in self.path.parents


def decide(source: Source, seen: list[str]) -> Action:
    """What is to be done about a source; `seen` are its hashes here when it last agreed with the record.

    There are none in a fresh clone, and two where an exchange of one for the other was interrupted.
    """
    if source.here == source.recorded:
        return "nothing"
    if source.here is None:
        return "removed" if source.of_concept and len(seen) == 1 else "bring"
    moved_on = source.here in seen and (len(seen) > 1 or not source.touched)
    return "bring" if moved_on else "track"


def sync(root: Path, config: Config) -> Iterator[str]:
    """Bring, follow and track data and base in the checkout at `root`, saying of each what was done.

    What is missing comes from the DVC cache or remote; what git records differently by now is replaced if it is as git
    recorded it before; what was changed here is tracked as it is, as are new folders of concepts in params.yaml. Killed at
    any moment and started again, it goes on, also where the kill left a file of DVC half-written.

    Raises:
        SvdiffError: something cannot be fetched, or the folder of a concept of params.yaml was removed here.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    root = root.resolve()
    merge.install(root)
    try:
        with Repo(str(root)) as repo, lock_repo(repo):
            yield from mend(repo, root)
            yield from _bring(repo, root, config)
    except DvcException as error:
        raise SvdiffError(f"data cannot be brought into this checkout: {_reasons(error)}") from error


def _bring(repo: Any, root: Path, config: Config) -> Iterator[str]:
    seen = read_record(root)
    sources = list(_sources(repo, root))
    actions = {source: decide(source, seen.get(source.path.as_posix(), [])) for source in sources}
    named = _named_folders(config)
    _check_removed([source for source, action in actions.items() if action == "removed"], named)

    missing = [str(root / source.path) for source, action in actions.items() if action == "bring"]
    if missing:
        repo.fetch(targets=missing)
    # Of a folder that this commit says nothing of, too, while it lies here: another commit may have it otherwise.
    record = {path: hashes for path, hashes in seen.items() if (root / path).exists()}
    record |= {source.path.as_posix(): seen.get(source.path.as_posix(), []) for source in sources}
    for source, action in actions.items():
        path, now = source.path.as_posix(), [source.recorded]
        if action == "bring":
            if source.here:
                record[path] = [source.here, source.recorded]
                write_record(root, record)
            _exchange(source.out, root / source.path)
            yield f"{path}: brought" if source.here is None else f"{path}: brought up to date with {source.target}"
        elif action == "track":
            repo.commit(str(root / source.target), force=True)
            now = [str(source.here)]
            yield f"{path}: changed here; what is here counts, and {source.target} says so now"
        elif action == "removed":
            repo.remove(str(root / source.target))
            now = []
            yield f"{path}: removed here, so {source.target} is removed as well; git has it"
        record[path] = now
        write_record(root, record)

    tracked = {source.path for source in sources}
    for folder in sorted(named - tracked):
        if (root / folder).is_dir():
            said, hashes = _track_new(repo, root, folder)
            yield said
            record[folder.as_posix()] = hashes
            write_record(root, record)


def _sources(repo: Any, root: Path) -> Iterator[Source]:
    """Everything that no stage makes in passing: outputs of .dvc files and of frozen stages, with their hashes."""
    for stage in repo.index.stages:
        if not (stage.is_data_source or stage.frozen):
            continue
        record = Path(stage.path) if stage.is_data_source else Path(stage.path).with_name(LOCK)
        for out in stage.outs:
            if not out.hash_info:
                continue  # made nowhere yet
            path, file = (Path(name).relative_to(root) for name in (out.fs_path, stage.path))
            target = file.as_posix() if stage.is_data_source else f"{file.as_posix()}:{stage.name}"
            here = out.get_hash().value if out.exists else None
            touched = here is not None and _last_change(root / path) > record.stat().st_ctime_ns
            yield Source(path, target, out.hash_info.value, here, touched, out)


def _last_change(path: Path) -> int:
    """When a file, or anything in a folder, was last changed. Unlike the time of modification, nothing sets this time back."""
    return max(entry.lstat().st_ctime_ns for entry in [path, *path.rglob("*")])


def _named_folders(config: Config) -> set[Path]:
    """Folders of pictures that params.yaml names: of concepts, and of edits' pictures where those lie among concepts."""
    pictures = [Path(os.path.normpath(edit.image)).parent for edit in config.edits.values()]
    return {concept_folder(name) for name in config.concepts} | {path for path in pictures if path.parent == CONCEPTS}


def _check_removed(removed: Iterable[Source], named: set[Path]) -> None:
    problems = [
        f"{source.path.as_posix()} was removed here, and params.yaml still names it. Fix: take it out of params.yaml, or "
        f"`dvc checkout {source.target}` brings it back"
        for source in removed
        if source.path in named
    ]
    if problems:
        raise SvdiffError("\n".join(problems))


def _track_new(repo: Any, root: Path, folder: Path) -> tuple[str, list[str]]:
    """What was done about a new folder, and its hash."""
    from dvc.exceptions import DvcException

    name = folder.as_posix()
    try:
        [stage] = repo.add(str(root / folder))
    except DvcException as error:  # such as a link to a folder outside: it can be trained on all the same
        return f"{name}: new, and DVC cannot track it, so nothing trained on it can be reproduced: {error}", []
    return f"{name}: new; tracked by {name}.dvc, which belongs into git with params.yaml", [
        out.hash_info.value for out in stage.outs
    ]


def _exchange(out: Any, final: Path) -> None:
    """Put what is recorded of a DVC output at `final`: it appears whole or not at all."""
    from dvc_data.hashfile.checkout import CheckoutError, checkout

    made, replaced = (final.with_name(f".{final.name}.{word}") for word in ("brought", "replaced"))
    _delete(made)
    _delete(replaced)
    final.parent.mkdir(parents=True, exist_ok=True)
    try:
        checkout(str(made), out.fs, out.get_obj(), out.cache, force=True)
    except (CheckoutError, FileNotFoundError) as error:
        raise SvdiffError(
            f"{out.def_path} with hash {out.hash_info.value} is neither in the DVC cache nor to be had from the remote. "
            "Fix: `dvc push` on a machine that has it, or `dvc remote list` for where it was sought"
        ) from error
    if final.exists():
        os.replace(final, replaced)
    os.replace(made, final)
    _delete(replaced)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reasons(error: BaseException | None) -> str:
    """What an error and its causes say."""
    said = []
    while error is not None:
        said.append(str(error))
        error = error.__cause__
    return ": ".join(dict.fromkeys(said))

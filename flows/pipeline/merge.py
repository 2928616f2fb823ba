"""Merges params.yaml and dvc.lock entry by entry: branches that each add a concept change neighbouring lines, which git cannot merge.

Git calls `python -m flows.pipeline.merge BASE OURS THEIRS`, where .gitattributes says so and `install` has told it how, and
merges by lines, as ever, where this fails.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

DRIVER = "{python} -m flows.pipeline.merge %O %A %B 2>/dev/null || git merge-file -L ours -L base -L theirs %A %O %B"
ABSENT = object()


class Conflict(Exception):
    """Both sides changed one value differently."""


def choose(base: Any, ours: Any, theirs: Any) -> Any:
    """The side that changed. Raises Conflict where both did, differently."""
    if ours == theirs or theirs == base:
        return ours
    if ours == base:
        return theirs
    raise Conflict


def merge_params(base: Any, ours: Any, theirs: Any) -> Any:
    """What changed on one side, or else mappings key by key and lists item by item, in `ours`. Raises Conflict."""
    try:
        return choose(base, ours, theirs)
    except Conflict:
        if isinstance(ours, MutableMapping) and isinstance(theirs, MutableMapping):
            base = base if isinstance(base, MutableMapping) else {}
            for key in dict.fromkeys([*ours, *theirs]):
                _put(ours, key, merge_params(*(side.get(key, ABSENT) for side in (base, ours, theirs))))
            return ours
        if all(isinstance(side, MutableSequence) for side in (base, ours, theirs)):
            for item in [item for item in ours if item in base and item not in theirs]:
                ours.remove(item)
            ours.extend(item for item in theirs if item not in ours and item not in base)
            return ours
        raise


def merge_locks(base: Any, ours: Any, theirs: Any) -> Any:
    """Stage by stage; one that both sides ran differently is left out, for without a record it runs again."""
    for name in dict.fromkeys([*ours, *theirs]):
        try:
            _put(ours, name, choose(*(side.get(name, ABSENT) for side in (base, ours, theirs))))
        except Conflict:
            del ours[name]
    return ours


def _put(mapping: Any, key: Any, value: Any) -> None:
    if value is ABSENT:
        mapping.pop(key, None)
    elif key in mapping:
        mapping[key] = value
    else:  # before the last, which the comment on the next section belongs to
        _drop_last_comment(value)
        mapping.insert(max(len(mapping) - 1, 0), key, value)


def _drop_last_comment(value: Any) -> None:
    """Take from an entry the lines beneath it, which are about what follows it in its own file."""
    while isinstance(value, CommentedMap | CommentedSeq) and value:
        key = next(reversed(value)) if isinstance(value, CommentedMap) else len(value) - 1
        for comment in filter(None, value.ca.items.get(key, [])):
            comment.value = comment.value.partition("\n")[0] + "\n"
        value = value[key]


def merge_files(base: Path, ours: Path, theirs: Path) -> None:
    """Write the merge of three versions of a file to `ours`. Raises Conflict."""
    yaml = YAML()
    yaml.preserve_quotes = True
    before, here, there = (yaml.load(path.read_text(encoding="utf-8")) or {} for path in (base, ours, theirs))
    if "stages" in here:  # dvc.lock
        here["stages"] = merge_locks(before.get("stages", {}), here["stages"], there.get("stages", {}))
    else:
        yaml.indent(mapping=2, sequence=4, offset=2)
        yaml.width = 4096  # type: ignore[assignment]
        here = merge_params(before, here, there)
    with open(ours, "w", encoding="utf-8") as stream:
        yaml.dump(here, stream)


def install(root: Path) -> None:
    """Tell the git of the checkout at `root` how to merge these files."""
    command = DRIVER.format(python=f'"{Path(sys.executable).as_posix()}"')
    subprocess.run(["git", "config", "merge.svdiff.driver", command], cwd=root, check=False, capture_output=True)


def main(arguments: list[str]) -> int:
    """Exit status 1 where lines have to be merged."""
    try:
        merge_files(*map(Path, arguments))
    except Conflict:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

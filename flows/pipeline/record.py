"""What was last seen in this checkout: hashes by path, by which `sync` tells a person's change from a commit's."""

from __future__ import annotations

import json
from pathlib import Path

from svdiff.files import write_atomic

RECORD = Path(".dvc/tmp/svdiff-seen.json")


def read_record(root: Path) -> dict[str, list[str]]:
    """Hashes by path, from the root; none in a fresh clone."""
    path = root / RECORD
    content: dict[str, list[str]] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def write_record(root: Path, record: dict[str, list[str]]) -> None:
    """Keep what was seen."""
    write_atomic(root / RECORD, json.dumps({path: seen for path, seen in record.items() if seen}, indent=1) + "\n")

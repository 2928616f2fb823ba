"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import locale
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def use_utf8() -> None:
    """Start this command anew in Python's UTF-8 mode where the locale has another encoding: every file here is UTF-8."""
    if sys.flags.utf8_mode or locale.getencoding().lower() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def check_writable(path: str | Path) -> None:
    """Before work whose result goes to `path`: raises OSError where neither it nor its folder can be made."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(final: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `final`; on success it is synced and renamed into place, else removed.

    Without `sync` a power cut may leave a file of zeros, which is for files that prove themselves when they are read.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{final.stem}-", suffix=final.suffix, dir=final.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; what we publish gets the permissions any other new file would have.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if sync:
            _fsync(temporary)
        os.replace(temporary, final)
        if sync:
            _fsync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(final: str | Path, content: str | bytes) -> None:
    """Write `content` to `final`: after a crash the file is the old one or the new one, never a part."""
    with atomic_file(final) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_dir(final: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `final`; on success it replaces `final`, else it is removed."""
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for path in temporary.rglob("*"):
            if path.is_file():
                _fsync(path)
        if final.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{final.name}-old-", dir=final.parent))
            os.replace(final, retired / final.name)
            os.replace(temporary, final)
            shutil.rmtree(retired)
        else:
            os.replace(temporary, final)
        _fsync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sort_safetensors_metadata(path: str | Path) -> None:
    """Bring the metadata of a safetensors file into the order of its keys, in place.

    The writer keeps metadata in a hash map, so the same content makes other bytes every time; sorted, equal content has
    equal hashes.
    """
    with open(path, "r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise ValueError(f"header of {path} would grow from {length} to {len(ordered)} bytes")
        stream.seek(8)
        stream.write(ordered.ljust(length))


TEXTS = ("file", "first", "model", "name", "path", "prior_prompt", "prompt", "second", "start")  # columns of tables


def read_table(source: Path | IO[str]) -> pd.DataFrame:
    """A CSV file that a stage wrote. Texts are texts, also `nan`, `null` and `012`; an empty cell is no number."""
    import pandas as pd

    return pd.read_csv(source, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=[""])


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_tree(root: str | Path) -> str:
    """Hex SHA-256 of a file, or of a folder's files: relative names and bytes, in name order."""
    root = Path(root)
    if root.is_file():
        return sha256_file(root)
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()

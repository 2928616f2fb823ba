"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from svdiff.files import atomic_dir, atomic_file, read_table, sha256_tree, write_atomic


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "value"
    write_atomic(target, "old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_dir(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_dir(target) as folder:
        (folder / "b").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with atomic_dir(tmp_path / "out") as folder:
            (folder / name).write_text(name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["second"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "value"
    write_atomic(target, "old")
    code = (
        "import sys, time\nfrom svdiff.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as t:\n"
        "    t.write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    assert target.read_text() == "old"


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_the_tree_hash_sees_names_and_bytes_but_not_order(tmp_path: Path) -> None:
    hashes = []
    for index, (names, content) in enumerate([("ab", "x"), ("ba", "x"), ("ac", "x"), ("ab", "y")]):
        root = tmp_path / str(index)
        root.mkdir()
        for name in names:
            (root / name).write_text(content)
        hashes.append(sha256_tree(root))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


@pytest.mark.parametrize("text", ["nan", "null", "NA", "None", "012", "1e3", "true", "a, b"])
def test_texts_of_tables_come_back_as_they_were_written(tmp_path: Path, text: str) -> None:
    import pandas as pd

    table = pd.DataFrame({"prompt": [text], "start": [text], "first": [text], "seed": [3], "score": [float("nan")]})
    table.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table, check_dtype=False)


def test_every_table_is_read_so() -> None:
    code = [path for package in ("svdiff", "flows") for path in Path(__file__).parents[1].glob(f"{package}/**/*.py")]
    assert [path.name for path in code if "pd.read_csv" in path.read_text(encoding="utf-8")] == ["files.py"]

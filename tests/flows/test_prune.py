"""What takes the disk, and that pruning takes just what nothing refers to."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from miniature import Project, write_train

from flows.pipeline.cache import remove_unused_objects, unused_objects
from flows.registry import prune
from flows.registry.concepts import model_id
from flows.registry.prune import find_unused
from flows.registry.storage import disk_usage, human
from svdiff.errors import SvdiffError


def found(project: Project) -> dict[str, list[str]]:
    return {part.name: [thing.where for thing in part.found] for part in find_unused(project.tracking, project.root)}


def write(path: Path, size: int = 1000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def test_sizes_for_people() -> None:
    assert [human(n) for n in (0, 999, 1000, 1_234_567, 10**13)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "10.0 TB"]


def test_every_store_is_counted_once(project: Project) -> None:
    project.register()
    write(project.root / ".svdiff/state/train-abc/state.pt", 5000)
    (project.root / ".svdiff/state/train-abc/again.pt").hardlink_to(project.root / ".svdiff/state/train-abc/state.pt")
    write(project.root / ".svdiff/bases/h/w.safetensors", 7000)
    found = disk_usage(project.tracking, project.root)
    places = [Path(usage.where) for usage in found]
    assert not [(one, other) for one in places for other in places if one in other.parents]
    by_name = {usage.what: usage for usage in found}
    assert by_name["resume states of trainings"].bytes == 5000
    assert by_name["decompositions of bases"].bytes == 7000
    assert by_name["MLflow artifacts"].bytes > 0
    assert by_name["MLflow database"].files == 1


def test_finished_states_go_and_others_stay(project: Project) -> None:
    key = "f" * 64
    project.register(train_key=key)
    finished = write(project.root / f".svdiff/state/train-{key[:24]}/state.pt").parent
    going_on = write(project.root / f".svdiff/state/train-{'a' * 24}/state.pt").parent
    [part] = [p for p in find_unused(project.tracking, project.root) if p.name == "resume states"]
    assert [thing.where for thing in part.found] == [str(finished)]
    assert part.found[0].bytes == 1000
    assert finished.exists()  # nothing happens before it is asked for
    part.remove()
    assert not finished.exists()
    assert going_on.exists()


@pytest.mark.slow
def test_deleted_runs_and_models_of_no_version_go(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = project.register(value=1, identity=0.5), project.register(value=2, identity=0.4)
    client = project.tracking.client
    stray = client.create_run(project.tracking.experiment_id)
    client.log_text(stray.info.run_id, "x" * 5000, "notes.txt")
    client.delete_run(stray.info.run_id)
    orphan = model_id(client.get_model_version("dog", str(second.version)))
    client.delete_model_version("dog", str(second.version))
    assert found(project)["MLflow"] == [stray.info.run_id]  # the model is young: it may be about to be registered
    monkeypatch.setattr(prune, "DAY", -1.0)
    [part] = [p for p in find_unused(project.tracking, project.root) if p.name == "MLflow"]
    assert {thing.where for thing in part.found} == {stray.info.run_id, orphan}
    assert sum(thing.bytes for thing in part.found) > 5000
    part.remove()
    assert found(project)["MLflow"] == []
    kept = client.get_model_version("dog", str(first.version))
    assert client.get_run(kept.run_id).info.lifecycle_stage == "active"
    assert client.list_artifacts(first.run_id, "scores")

    client.delete_run(first.run_id)  # a registered version needs it
    [part] = [p for p in find_unused(project.tracking, project.root) if p.name == "MLflow"]
    assert part.found == []
    assert first.run_id in part.problem


def test_bases_in_use_stay(project: Project) -> None:
    project.register(base_hash="a" * 64)
    (project.root / "out/train/dog/delta.safetensors").unlink()  # the registry alone refers to its base
    write_train(project.root, "dog2", value=1, base_hash="b" * 64)  # trained, not registered
    for name in "abcd":
        folder = write(project.root / ".svdiff/bases" / (name * 64) / "w.safetensors").parent
        os.utime(folder, None if name == "c" else (0, 0))  # whatever was used this week stays
    [part] = [p for p in find_unused(project.tracking, project.root) if p.name == "decompositions"]
    assert [Path(thing.where).name for thing in part.found] == ["d" * 64]
    folder = project.root / ".svdiff/bases" / ("d" * 64)
    with FileLock(folder / "lock"):  # somebody begins to use it
        part.remove()
    assert folder.exists()
    part.remove()
    assert not folder.exists()
    assert found(project)["decompositions"] == []


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


def store(root: Path, content: str) -> Path:
    """An object of DVC's cache, as the output `out/x` in dvc.lock; where it lies."""
    oid = hashlib.md5(content.encode()).hexdigest()
    lock = {"schema": "2.0", "stages": {"x": {"cmd": "x", "outs": [{"path": "out/x", "hash": "md5", "md5": oid}]}}}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))
    path = root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o444)
    return path


def test_objects_that_git_can_find_again_stay_whatever_old_commits_look_like(dvc_project: Path) -> None:
    """Named by a branch, a stash, a commit that was taken back, or the workspace; one commit's pipeline is nonsense."""
    kept = [store(dvc_project, "first")]
    git(dvc_project, "add", "dvc.lock")
    git(dvc_project, "commit", "-m", "first")
    pipeline = (dvc_project / "dvc.yaml").read_text()
    (dvc_project / "dvc.yaml").write_text("stages: {train: {foreach: '${gone}', do: {cmd: 'x ${item.nothing}'}}}")
    kept.append(store(dvc_project, "of nonsense"))
    git(dvc_project, "commit", "-am", "nonsense")
    git(dvc_project, "branch", "other")
    git(dvc_project, "reset", "--hard", "HEAD~1")
    kept.append(store(dvc_project, "taken back"))
    git(dvc_project, "commit", "-am", "to be taken back")
    git(dvc_project, "reset", "--hard", "HEAD~1")
    kept.append(store(dvc_project, "stashed"))
    git(dvc_project, "stash")
    kept.append(store(dvc_project, "workspace"))
    experiment = dvc_project / ".dvc/tmp/exps/tmp1"
    experiment.mkdir(parents=True)
    inside = store(dvc_project, "of an experiment at work")
    (dvc_project / "dvc.lock").rename(experiment / "dvc.lock")
    folder = json.dumps([{"md5": hashlib.md5(b"in a folder").hexdigest(), "relpath": "a.png"}])
    listed = store(dvc_project, "in a folder")
    listing = store(dvc_project, folder)
    listing.rename(listing.with_name(listing.name + ".dir"))
    record = f"outs:\n- md5: {hashlib.md5(folder.encode()).hexdigest()}.dir\n  path: pictures\n"
    (dvc_project / "data/pictures.dvc").write_text(record)
    junk = store(dvc_project, "overwritten before any commit")
    store(dvc_project, "workspace")
    assert (dvc_project / "dvc.yaml").read_text() == pipeline

    assert unused_objects(dvc_project) == [junk]
    remove_unused_objects(dvc_project)
    assert not junk.exists()
    assert all(path.exists() for path in [*kept, inside, listed, listing.with_name(listing.name + ".dir")])
    assert unused_objects(dvc_project) == []


def test_inputs_of_a_registered_version_stay_though_its_lock_was_never_committed(dvc_project: Path) -> None:
    project, pictures = Project(dvc_project), store(dvc_project, "pictures")
    picture = {"path": "data/concepts/dog", "hash": "md5", "md5": hashlib.md5(b"pictures").hexdigest()}
    train = {"cmd": "x", "deps": [picture], "outs": [{"path": "out/train/dog", "hash": "md5", "md5": "0" * 32}]}
    (dvc_project / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {"train@dog": train}}))
    project.register()
    junk = store(dvc_project, "of another training")
    store(dvc_project, "workspace")
    [part] = [p for p in find_unused(project.tracking, dvc_project) if p.name == "DVC"]
    assert [thing.where for thing in part.found] == [str(junk)]
    part.remove()
    assert pictures.exists()


def test_where_git_says_nothing_nothing_is_pruned(dvc_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a git program, or in somebody else's checkout: no answer does not say that no commit names anything."""
    store(dvc_project, "of an old commit")
    git(dvc_project, "add", "dvc.lock")
    git(dvc_project, "commit", "-m", "old")
    (dvc_project / "dvc.lock").unlink()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SvdiffError, match="git cannot say what the commits"):
        unused_objects(dvc_project)


def test_a_cache_that_others_share_is_not_pruned(dvc_project: Path, tmp_path: Path) -> None:
    store(dvc_project, "of another project")
    (dvc_project / ".dvc/cache").rename(tmp_path / "shared")
    (dvc_project / ".dvc/config.local").write_text(f"[cache]\n    dir = {tmp_path / 'shared'}\n")
    with pytest.raises(SvdiffError, match="other checkouts may use the cache"):
        unused_objects(dvc_project)


@pytest.mark.slow
def test_dvc_objects_of_no_commit_go_and_the_rest_can_be_checked_out(dvc_project: Path) -> None:
    def dvc(*arguments: str) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` of the stages
        command = [sys.executable, "-m", "dvc", *arguments]
        subprocess.run(command, cwd=dvc_project, env=os.environ | {"PATH": path}, check=True, capture_output=True)

    project = Project(dvc_project)
    dvc("repro", "prior@dog")
    (dvc_project / ".marks/x").touch()
    stage = dvc_project / "stage.py"
    stage.write_text(stage.read_text().replace("write_text(stage)", "write_text(stage * 2)"))
    dvc("repro", "-f", "prior@dog")
    [part] = [p for p in find_unused(project.tracking, dvc_project) if p.name == "DVC"]
    assert not part.problem
    assert len(part.found) == 2  # the folder and its file, of the first run
    part.remove()
    assert found(project)["DVC"] == []
    (dvc_project / "out/prior/dog/done.txt").unlink()
    dvc("checkout", "-f", "out/prior/dog")
    assert (dvc_project / "out/prior/dog/done.txt").read_text() == "prior" * 2
    status = subprocess.run(
        [sys.executable, "-m", "dvc", "status", "--json", "prior@dog"], cwd=dvc_project, capture_output=True, check=True
    )
    assert json.loads(status.stdout or "{}") == {}

"""What takes the disk, and that pruning takes just what nothing refers to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from champions import Champions
from miniature import Project

from flows.registry import prune
from flows.registry.concepts import model_id
from flows.registry.prune import find_unused
from flows.registry.storage import disk_usage, human


def found(project: Project) -> dict[str, list[str]]:
    return {
        part.name: [thing.where for thing in part.found]
        for part in find_unused(project.tracking, project.config, project.root)
    }


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
    by_name = {usage.what: usage for usage in disk_usage(project.tracking, project.root)}
    assert by_name["resume states of trainings"].bytes == 5000
    assert by_name["decompositions of bases"].bytes == 7000
    assert by_name["MLflow artifacts"].bytes > 0
    assert by_name["MLflow database"].files == 1


def test_finished_states_go_and_others_stay(project: Project) -> None:
    key = "f" * 64
    project.register(train_key=key)
    finished = write(project.root / f".svdiff/state/train-{key[:24]}/state.pt").parent
    going_on = write(project.root / f".svdiff/state/train-{'a' * 24}/state.pt").parent
    [part] = [p for p in find_unused(project.tracking, project.config, project.root) if p.name == "resume states"]
    assert [thing.where for thing in part.found] == [str(finished)]
    assert part.found[0].bytes == 1000
    assert finished.exists()  # nothing happens before it is asked for
    part.remove()
    assert not finished.exists()
    assert going_on.exists()


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
    [part] = [p for p in find_unused(project.tracking, project.config, project.root) if p.name == "MLflow"]
    assert {thing.where for thing in part.found} == {stray.info.run_id, orphan}
    assert sum(thing.bytes for thing in part.found) > 5000
    part.remove()
    assert found(project)["MLflow"] == []
    kept = client.get_model_version("dog", str(first.version))
    assert client.get_run(kept.run_id).info.lifecycle_stage == "active"
    assert client.list_artifacts(first.run_id, "scores")

    client.delete_run(first.run_id)  # a registered version needs it
    [part] = [p for p in find_unused(project.tracking, project.config, project.root) if p.name == "MLflow"]
    assert part.found == []
    assert first.run_id in part.problem


@pytest.mark.slow
def test_bases_in_use_stay(project: Project, tiny_base: Path, tiny_pipe) -> None:
    from svdiff.spectral import weights_hash

    champions = Champions(project.root, tiny_base, "dog")
    bases = {"of params.yaml": weights_hash(tiny_pipe.unet), "of a registered delta": "b" * 64, "of nothing": "c" * 64}
    champions.register("dog")
    (champions.root / "out/train/dog/delta.safetensors").unlink()  # the registry alone refers to its base
    for name in bases.values():
        write(champions.root / ".svdiff/bases" / name / "w.safetensors")
    assert [Path(where).name for where in found(champions)["decompositions"]] == ["c" * 64]


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
    [part] = [p for p in find_unused(project.tracking, project.config, dvc_project) if p.name == "DVC"]
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

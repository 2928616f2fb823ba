"""Registered versions: once a delta, complete, with their lineage; whatever crashes or races."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from miniature import BASE_HASH, Project, write_params, write_results
from mlflow import MlflowClient

from flows.pipeline.lineage import data_hashes
from flows.pipeline.results import read_results
from flows.registry import register as registry
from flows.registry.concepts import find, list_concepts, model_id, read_concept, read_concepts
from flows.registry.promotion import aliases_of, champion_of
from flows.registry.runs import TRAIN_KEY
from svdiff.catalogue import Entry
from svdiff.config import ConceptConfig, load_config
from svdiff.errors import SvdiffError

ROOT = Path(__file__).parents[2]


def versions(project: Project, concept: str = "dog") -> list[int]:
    found = project.tracking.client.search_model_versions(f"name = '{concept}'")
    return sorted(int(version.version) for version in found)


def test_first_version_is_champion_with_lineage_and_a_complete_run(project: Project) -> None:
    done = project.register()
    client = project.tracking.client
    version = client.get_model_version_by_alias("dog", "champion")
    assert (int(version.version), done.new, done.decision.promoted) == (1, True, True)
    assert version.tags["delta_sha256"] == project.results().delta_sha256
    assert version.tags["base_hash"] == BASE_HASH
    assert version.tags["class_word"] == "dog"
    assert version.tags["token"] == "sks"
    assert version.tags["subset"] == "UNet"
    assert {"git_commit", "git_dirty", "data_hash", "train_key"} <= set(version.tags)
    assert "`a sks dog`" in version.description
    assert "| identity | 0.6500 |" in version.description

    stored = {path.name for path in (project.root / "mlruns" / "artifacts").rglob("*") if path.is_file()}
    assert {"concept_model.py", "delta.safetensors", "concept.json", "MLmodel", "input_example.json"} <= stored
    assert not [name for name in stored if name.endswith(".pkl")]

    run = client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.001"
    assert [(data.dataset.name, data.dataset.digest) for data in run.inputs.dataset_inputs] == [("dog", "none")]
    assert run.data.metrics["identity"] == pytest.approx(0.65)
    stored_model = client.get_logged_model(model_id(version))
    assert {m.key for m in stored_model.metrics} >= {"identity", "text_alignment"}
    assert [m.step for m in client.get_metric_history(done.run_id, "loss")] == list(range(1, 21))
    assert [m.step for m in client.get_metric_history(done.run_id, "fixed_noise_loss")] == [20]
    files = {
        f.path for folder in ("samples", "scores", "validation") for f in client.list_artifacts(done.run_id, folder)
    }
    assert {"samples/trained.png", "samples/base.png", "scores/images.csv", "validation/step-00000.png"} <= files


def test_same_delta_registers_once(project: Project) -> None:
    first, second = project.register(), project.register()
    assert (second.version, second.run_id, second.new) == (first.version, first.run_id, False)
    assert versions(project) == [1]
    assert len(project.tracking.client.search_runs([project.tracking.experiment_id])) == 1


def test_same_delta_on_another_base_is_another_version(project: Project) -> None:
    """The base hash is part of a delta's identity even if the file's bytes said otherwise."""
    project.register()
    done = project.register(base_hash="c" * 64)
    assert done.new
    assert done.version == 2
    assert done.decision.promoted
    assert "another base" in done.decision.reason


def test_the_live_run_of_the_training_is_taken_up_and_closed(project: Project) -> None:
    """A killed and resumed training leaves its run open: registration completes it instead of starting another.

    Nor is anything of the curve lost where the server was away from step 10 on, or doubled.
    """
    client = project.tracking.client
    live = client.create_run(project.tracking.experiment_id, tags={TRAIN_KEY: "k"})
    client.log_metric(live.info.run_id, "loss", 0.7, step=10)
    client.log_param(live.info.run_id, "lr", "0.001")
    done = project.register(train_key="k")
    assert done.run_id == live.info.run_id
    run = client.get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert sorted(m.step for m in client.get_metric_history(done.run_id, "loss")) == list(range(10, 21))
    assert [m.step for m in client.get_metric_history(done.run_id, "fixed_noise_loss")] == [20]


def test_a_run_claimed_by_another_delta_is_left_alone(project: Project) -> None:
    """Two trainings of one key can differ where arithmetic is not deterministic: each delta has its own run."""
    first, second = project.register(value=0.1, train_key="k"), project.register(value=0.2, train_key="k")
    assert first.run_id != second.run_id


@pytest.mark.parametrize(
    "where",
    [
        "_log_model",
        *(
            pytest.param(where, marks=pytest.mark.slow)
            for where in ("runs.training_run", "mlflow.register_model", "runs.log_scores", "decide")
        ),
    ],
)
def test_a_crash_anywhere_is_completed_by_the_next_call(
    project: Project, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Die right after each step that leaves something behind; run again; end as if nothing had happened."""
    owner, name = (mlflow, "register_model") if where.startswith("mlflow") else (registry, where)
    if where.startswith("runs."):
        owner, name = registry.runs, where.removeprefix("runs.")
    real = getattr(owner, name)

    def dies_afterwards(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies_afterwards)
        with pytest.raises(KeyboardInterrupt):
            project.register()
    mlflow.end_run()
    done = project.register()
    assert versions(project) == [1]
    assert champion_of(project.tracking, "dog") == done.version == 1
    client = project.tracking.client
    assert len(client.search_runs([project.tracking.experiment_id])) == 1
    assert len(client.search_logged_models([project.tracking.experiment_id])) == 1
    assert client.get_run(done.run_id).info.status == "FINISHED"


def test_two_machines_that_registered_at_once_agree_on_one_version(project: Project) -> None:
    """Without the local lock (another machine) both may create a version; everybody then keeps the lower."""
    results = project.results()
    run_id = registry.runs.training_run(project.tracking, project.config, results)
    logged = registry._log_model(project.tracking, project.config, results, run_id)
    for _ in range(3):
        tags = registry.version_tags(project.config, results)
        mlflow.register_model(f"models:/{logged.model_id}", "dog", tags=tags)
    assert versions(project) == [1, 2, 3]
    found: list[int] = []

    def find() -> None:
        version = registry.find_version(project.tracking, results)
        assert version is not None
        found.append(int(version.version))

    threads = [threading.Thread(target=find) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1, 1, 1]
    assert versions(project) == [1]


def test_a_new_scoring_of_the_same_delta_is_logged_without_a_new_version(project: Project) -> None:
    done = project.register(identity=0.5)
    again = project.register(identity=0.6)
    assert again.version == done.version
    run = project.tracking.client.get_run(done.run_id)
    assert run.data.metrics["identity"] == pytest.approx(0.75)
    version = project.tracking.client.get_model_version("dog", str(done.version))
    assert float(version.tags["identity"]) == pytest.approx(0.75)
    assert "| identity | 0.7500 |" in version.description


def test_flow_run_is_linked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_FLOW_RUN_ID", "f-1")
    done = project.register()
    assert project.tracking.client.get_run(done.run_id).data.tags["prefect.flow_run_id"] == "f-1"


@pytest.mark.parametrize("missing", ["train/dog/delta.safetensors", "score/dog/metrics.json", "sample/dog/images.csv"])
def test_missing_results_name_the_file_and_the_stage(project: Project, missing: str) -> None:
    project.results()
    (project.root / "out" / missing).unlink()
    with pytest.raises(SvdiffError, match=rf"out/{missing}.*dvc repro {missing.split('/')[0]}@dog"):
        read_results(project.config, "dog", project.root)


def test_stages_of_pairs_have_names_of_their_own_and_edits_are_not_registered(tmp_path: Path) -> None:
    config = load_config(ROOT / "params.yaml")
    (pair,), (edit, *_) = config.pairs, config.edits
    with pytest.raises(SvdiffError, match=f"`dvc repro train-pair@{pair}`"):
        read_results(config, pair, tmp_path)
    with pytest.raises(SvdiffError, match=f"'{edit}' is an edit, and edits are not registered"):
        read_results(config, edit, tmp_path)


def test_pictures_of_a_pair_are_those_of_its_own_mixes(tmp_path: Path) -> None:
    """Not those that one of its concepts was trained on by itself, later."""

    def stage(md5: str, out: str) -> dict[str, Any]:
        return {"deps": [{"path": "data/concepts/dog", "md5": md5}], "outs": [{"path": out}]}

    stages = {
        "mix@both": stage("mixed", "out/mix/both"),
        "train@dog": stage("alone", "out/train/dog/delta.safetensors"),
    }
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
    dog = {"dog": ConceptConfig(class_word="dog", token="sks")}
    assert data_hashes(tmp_path, Entry("both", "pair", dog)) == {"dog": "md5:mixed"}
    assert data_hashes(tmp_path, Entry("dog", "concept", dog)) == {"dog": "md5:alone"}


def test_a_file_that_is_no_delta_is_refused(project: Project) -> None:
    results = project.results()
    results.delta.write_bytes(b"not a delta")
    with pytest.raises(SvdiffError, match=r"delta\.safetensors cannot be read"):
        registry.register(project.tracking, project.config, results)
    assert project.tracking.client.search_registered_models() == []


def test_list_shows_champions_and_scores(project: Project) -> None:
    project.register("dog", identity=0.5)
    project.register("dog", value=0.2, identity=0.4)
    project.register("dog2")
    entries = list_concepts(project.tracking)
    assert [(e.concept, e.champion, e.challenger) for e in entries] == [("dog", 1, 2), ("dog2", 1, None)]
    assert entries[0].identity == pytest.approx(0.65)


def run_flows(root: Path, *arguments: str, **kwargs: object) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.Popen(
        [sys.executable, "-m", "flows", *arguments],
        cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def test_the_catalogue_is_whole(project: Project) -> None:
    """Aliases and tags of both kinds; no deleted version, nothing that is registered beside models."""
    client = project.tracking.client
    for value in (0.1, 0.2, 0.3):
        project.register(value=value, identity=value + 0.2)
    project.register("dog2")
    client.delete_model_version("dog", "2")
    client.set_registered_model_tag("dog2", "colour", "brown")
    mlflow.genai.register_prompt("greeting", "hello {{name}}")
    dog, dog2 = read_concepts(project.tracking)
    assert (dog.name, sorted(dog.versions), dog.aliases) == ("dog", [1, 3], {"champion": 3})
    assert dog.champion.tags["delta_sha256"]
    assert (dog2.name, dog2.tags) == ("dog2", {"colour": "brown"})


@pytest.mark.slow
def test_racing_processes_on_a_fresh_checkout_make_one_store_and_one_version(tmp_path: Path) -> None:
    """Three `register` processes at once, and no database yet: the hardest start there is."""
    write_params(tmp_path, "dog")
    write_results(tmp_path, "dog")
    racers = [run_flows(tmp_path, "register", "dog") for _ in range(3)]
    outputs = [racer.communicate(timeout=300)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], outputs
    assert sum("version 1 registered" in output for output in outputs) == 1, outputs
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert [int(v.version) for v in client.search_model_versions("name = 'dog'")] == [1]
    assert len(client.search_experiments(filter_string="name = 'svdiff'")) == 1
    record = json.loads((tmp_path / "out/register/dog.json").read_text())
    assert record["version"] == 1
    import sqlite3

    assert sqlite3.connect(tmp_path / "mlruns/mlflow.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.slow
def test_register_killed_midway_then_run_again(tmp_path: Path) -> None:
    """kill -9 at several moments; the last run through completes the one version."""
    write_params(tmp_path, "dog")
    write_results(tmp_path, "dog")
    assert run_flows(tmp_path, "init").wait(120) == 0
    for seconds in (5, 6, 7):  # seconds until the kill: importing, logging, registering
        victim = run_flows(tmp_path, "register", "dog")
        try:
            victim.wait(seconds)
        except subprocess.TimeoutExpired:
            victim.kill()
            victim.wait()
    final = run_flows(tmp_path, "register", "dog")
    output = final.communicate(timeout=300)[0]
    assert final.returncode == 0, output
    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert len(client.search_model_versions("name = 'dog'")) == 1
    assert len(client.search_runs([client.get_experiment_by_name("svdiff").experiment_id])) == 1


@pytest.mark.parametrize("name", ["dog:1", "a/b", "", "..", "dog'", "it is", "犬"])
def test_what_is_no_name_of_a_concept_is_refused(project: Project, name: str) -> None:
    with pytest.raises(SvdiffError, match=r"expected letters, digits.*a version of one is teapot@2"):
        read_concept(project.tracking, name)


def test_a_version_that_is_not_there_is_refused_with_those_that_are(project: Project) -> None:
    project.register()
    for version in ("2", "0", "-1", "²", "v1", "1@1", "challenger", "9" * 30):
        with pytest.raises(SvdiffError, match=f"'dog' has no version '{version}'; there are: 1, champion"):
            find(project.tracking, f"dog@{version}")


def test_unknown_concept_in_the_registry(project: Project) -> None:
    with pytest.raises(SvdiffError, match="no concept 'cat' in the registry"):
        aliases_of(project.tracking, "cat")

"""What a team shares, on real servers of its kinds: DVC remote and MLflow artifacts on S3, MLflow's records on PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from miniature import Project, make_dvc_project, write_params
from team import Process, free_port, postgres, until

from flows.pipeline.stages import RemoteAway, push_stage, run_stage
from flows.registry.concepts import fetch, find, list_concepts
from flows.registry.overrides import promote_manually, rollback
from flows.services.supervision import answers

pytestmark = pytest.mark.slow
KEYS = {"AWS_ACCESS_KEY_ID": "svdiff", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "svdiff"


class Bucket:
    """A bucket on an S3 server of its own on loopback, and who may read it: this process and its children."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1]]
        self.server = Process(folder / "s3.log", *command, cwd=folder, env=dict(os.environ))
        until(lambda: answers(self.url) or not self.server.alive, 300, "the S3 server did not start")
        assert self.server.alive, self.server.log.read_text()
        import boto3

        self.client: Any = boto3.client("s3", endpoint_url=self.url)
        self.client.create_bucket(Bucket=BUCKET)

    def keys(self, prefix: str) -> list[str]:
        """Names of what lies below `prefix`."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


@pytest.fixture
def bucket(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    for module in ("moto", "flask_cors", "boto3", "dvc_s3"):
        pytest.importorskip(
            module, reason=f"there is no {module}; `pip install -e '.[team]' 'moto[s3]' flask flask-cors`"
        )
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    made = Bucket(tmp_path_factory.mktemp("s3"))
    yield made
    if made.server.alive:
        made.server.kill()


def dvc(root: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, check=True)


def test_a_clone_restores_what_another_has_pushed_to_s3(
    tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = make_dvc_project(tmp_path / "origin", "dog", "dog2")
    dvc(origin, "remote", "add", "--default", "team", f"s3://{BUCKET}/dvc")
    dvc(origin, "remote", "modify", "team", "endpointurl", bucket.url)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", *identity, "commit", "--quiet", "-am", "The team's remote"], cwd=origin, check=True)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(origin), str(clone)], check=True)
    shutil.copytree(origin / ".marks", clone / ".marks", dirs_exist_ok=True)

    monkeypatch.chdir(origin)
    for stage in ("prior@dog", "train@dog"):
        assert run_stage(stage, root=origin, on_line=print).outcome == "ran"
        push_stage(stage, root=origin, on_line=print)
    assert bucket.keys("dvc/files/md5/")
    assert bucket.keys("dvc/runs/")

    monkeypatch.chdir(clone)
    for stage in ("prior@dog", "train@dog"):
        assert run_stage(stage, root=clone, on_line=print, pull=True).outcome == "restored"
    delta = "out/train/dog/delta.safetensors"
    assert (clone / delta).read_bytes() == (origin / delta).read_bytes()

    bucket.server.kill()
    assert run_stage("train@dog2", root=clone, on_line=print).outcome == "ran"
    with pytest.raises(RemoteAway, match="what it made is safe in this clone"):
        push_stage("train@dog2", root=clone, on_line=print)


def test_a_registry_on_postgresql_and_s3(tmp_path: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed; `pip install -e '.[team]'`")
    url = f"http://127.0.0.1:{free_port()}"
    environment = os.environ | {"MLFLOW_S3_ENDPOINT_URL": bucket.url, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    # Who registers or reads has no key of the bucket: files go through the server.
    for name in KEYS:
        monkeypatch.delenv(name)
    with postgres() as database:
        server = Process(
            tmp_path / "mlflow.log",
            *[sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", url.rsplit(":", 1)[1]],
            *["--backend-store-uri", database.replace("+asyncpg", ""), "--workers", "1"],
            *["--artifacts-destination", f"s3://{BUCKET}/mlflow"],
            cwd=tmp_path,
            env=environment,
        )
        try:
            until(lambda: answers(f"{url}/health") or not server.alive, 600, "the MLflow server did not start")
            assert server.alive, server.log.read_text()
            look_at_the_registry(tmp_path / "project", url, bucket, monkeypatch, server)
        finally:
            server.kill()


def look_at_the_registry(
    root: Path, url: str, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, server: Process
) -> None:
    """Register, promote and roll back; killed and started again, the server knows everything, and gives the delta back."""
    root.mkdir()
    monkeypatch.chdir(root)
    write_params(root, "dog", "dog2", tracking={"uri": url})
    project = Project(root)
    assert project.register("dog", value=0.1).version == 1
    delta = (root / "out/train/dog/delta.safetensors").read_bytes()
    assert project.register("dog", value=0.1).version == 1
    assert project.register("dog", value=0.2, identity=0.3).version == 2
    assert [key for key in bucket.keys("mlflow/") if key.endswith("delta.safetensors")]
    assert not list(root.rglob("mlruns"))

    server.kill()
    server.start()
    until(lambda: answers(f"{url}/health"), 600, "the MLflow server did not start again")
    (listed,) = list_concepts(project.tracking)
    assert (listed.concept, listed.versions, listed.champion) == ("dog", 2, 1)
    path, described = fetch(project.tracking, find(project.tracking, "dog@1"), root / "fetched")
    assert path.read_bytes() == delta
    assert described
    promote_manually(project.tracking, "dog", 2, "for the test")
    assert find(project.tracking, "dog").version == "2"
    rollback(project.tracking, "dog", "for the test")
    assert find(project.tracking, "dog@champion").version == "1"

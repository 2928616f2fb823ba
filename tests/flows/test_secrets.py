"""Passwords and tokens reach neither MLflow nor logs, errors and records."""

from __future__ import annotations

import sqlite3
import sys
import traceback
from pathlib import Path

import pytest
from miniature import Project, write_params

from flows.pipeline.stages import StageFailed, run_stage
from flows.registry.tracking import Tracking, connect
from svdiff.config import TrackingConfig
from svdiff.errors import SvdiffError
from svdiff.secrets import redacted, show_exception

PASSWORD = "hunter2-and-more"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{PASSWORD}@mlflow.example.org:5000/x", "http://***@mlflow.example.org:5000/x"),
        (f"postgresql+psycopg2://me:{PASSWORD}@db/mlflow failed", "postgresql+psycopg2://***@db/mlflow failed"),
        (f"https://{PASSWORD}@git.example.org/a.git", "https://***@git.example.org/a.git"),
        (f"http://me:p@{PASSWORD}@host/x", "http://***@host/x"),
        (f"https://host/x?token={PASSWORD}&page=2", "https://host/x?token=***&page=2"),
        (f"https://host/x?a=1&X-Amz-Signature={PASSWORD}", "https://host/x?a=1&X-Amz-Signature=***"),
        ("write to me@example.org", "write to me@example.org"),
        ("models:/dog@champion, https://host/x@2", "models:/dog@champion, https://host/x@2"),
        ("sqlite:///mlruns/mlflow.db", "sqlite:///mlruns/mlflow.db"),
        ("?tokens=12&seed=3", "?tokens=12&seed=3"),
    ],
)
def test_addresses_lose_users_and_passwords_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "wandb_api_key"])
def test_values_of_the_environment_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, PASSWORD)
    assert redacted(f"401 for '{PASSWORD}'") == "401 for '***'"
    assert str(SvdiffError(f"401 for '{PASSWORD}'")) == "401 for '***'"


def test_a_password_in_an_address_of_the_environment_is_hidden_also_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p%40ssw0rd-x@host")
    assert redacted("p@ssw0rd-x or p%40ssw0rd-x") == "*** or ***"


def test_ordinary_variables_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "ordinary")
    monkeypatch.setenv("HF_TOKEN", "a")
    assert redacted("an ordinary word") == "an ordinary word"


def test_nothing_of_a_registration_holds_the_password(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of the store and every byte of its database, with secrets in params.yaml and in the environment."""
    token = "hf_abcdefghijklmnop"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", project.config.tracking.uri)
    uri = f"http://me:{PASSWORD}@mlflow.example.org:5000"
    write_params(project.root, "dog", tracking={"uri": uri}, base={"model": f"models/{token}"})
    done = Project(project.root).register()
    assert done.role == "champion"
    files = [path for path in (project.root / "mlruns" / "artifacts").rglob("*") if path.is_file()]
    assert "params.yaml" in {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert PASSWORD.encode() not in content, path
        if path.name != "concept.json":  # says where the base is; such a folder cannot be found otherwise
            assert token.encode() not in content, path
    with sqlite3.connect(project.root / "mlruns" / "mlflow.db") as connection:
        dump = "\n".join(connection.iterdump())
    assert PASSWORD not in dump


def test_an_unreachable_store_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(SvdiffError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1:9 cannot be used") as caught:
        connect(TrackingConfig(uri=f"http://me:{PASSWORD}@127.0.0.1:9"), tmp_path)
    assert PASSWORD not in str(caught.value)


def test_the_address_of_a_run_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = Tracking(f"http://me:{PASSWORD}@host:5000", "svdiff", Path("/nowhere"))
    monkeypatch.setattr(Tracking, "experiment_id", "1")
    assert tracking.run_url("r") == "http://***@host:5000/#/experiments/1/runs/r"


def test_a_traceback_is_printed_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError(f"http://me:{PASSWORD}@host")
    except RuntimeError:
        show_exception(*sys.exc_info())
        assert PASSWORD in traceback.format_exc()
    assert PASSWORD not in capsys.readouterr().err


def test_what_a_stage_prints_is_logged_without_it(dvc_project: Path) -> None:
    stage = dvc_project / "stage.py"
    stage.write_text(f"print('http://me:{PASSWORD}@host')\nraise SystemExit(3)\n")
    lines: list[str] = []
    with pytest.raises(StageFailed) as caught:
        run_stage("prior@dog", root=dvc_project, on_line=lines.append)
    assert "http://***@host" in lines
    assert PASSWORD not in str(caught.value)
    assert PASSWORD not in "\n".join(lines)

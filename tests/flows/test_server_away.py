"""A Prefect server that is away, or a stage that another run is at, ends no training."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from miniature import write_params

from flows.orchestration import artifacts, dispatch, train
from flows.pipeline.stages import StageBusy
from svdiff.config import load_config


def test_a_bar_that_cannot_be_shown_ends_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def away(progress: float, **_: Any) -> None:
        asked.append(progress)
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(artifacts, "create_progress_artifact", away)
    bar = artifacts.Progress("train@dog")
    for percent in (10, 20, 30):
        bar.show(f"train dog:  {percent}%|##  | {percent}/100")
    assert asked == [10.0], "each try takes Prefect's client a minute"


def test_a_part_is_asked_for_again_when_the_server_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(state=SimpleNamespace(is_final=lambda: True, is_completed=lambda: True))
    answers: list[Any] = [httpx.ConnectError("away"), httpx.ReadTimeout("away"), done]

    def read_flow_run(_: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = SimpleNamespace(read_flow_run=read_flow_run)
    monkeypatch.setattr(dispatch, "run_deployment", lambda *_, **__: SimpleNamespace(id="part"))
    monkeypatch.setattr(dispatch, "get_client", lambda **_: nullcontext(client))
    monkeypatch.setattr(dispatch, "POLL", 0)
    dispatch.run_on_workers("train-concept", "dog", {})
    assert answers == []


def test_where_dvc_is_busy_each_is_trained_alone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(*_: Any, **__: Any) -> None:
        raise StageBusy("train@dog", "is busy", ["'data/concepts/dog' is being used by another process"])

    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, "dog", "dog2")
    monkeypatch.setattr(train, "changed", busy)
    monkeypatch.setattr(train, "get_run_logger", lambda: logging.getLogger("run"))
    monkeypatch.setattr(train, "_attempt", lambda *_: None)
    train._train_in_groups(load_config(), ["dog", "dog2"], 8, 1, None)
    assert "each is trained alone" in caplog.text

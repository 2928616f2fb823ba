"""A Prefect server that is away, or a stage that another run is at, ends no training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest
from miniature import write_params
from prefect.states import Completed, Failed, Running

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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A server that answers the start of a part and questions about it so, in order; errors are raised."""

    def answering(*answers: Any) -> Callable[..., Any]:
        left = list(answers)

        def answer(*_: Any, **__: Any) -> Any:
            found = left.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        return answer

    def set_up(started: Sequence[Any], states: Sequence[Any]) -> None:
        client = SimpleNamespace(read_flow_run=answering(*(s if isinstance(s, Exception) else Run(s) for s in states)))
        monkeypatch.setattr(dispatch, "run_deployment", answering(*started))
        monkeypatch.setattr(dispatch, "get_client", lambda **_: nullcontext(client))
        monkeypatch.setattr(dispatch, "POLL", 0)

    return set_up


class Run(NamedTuple):
    state: Any = None
    id: str = "part"


UNAVAILABLE = httpx.HTTPStatusError(
    "unavailable", request=httpx.Request("POST", "http://x"), response=httpx.Response(503)
)


def test_a_part_is_asked_for_again_when_the_server_is_back(server: Callable[..., None]) -> None:
    away = httpx.ConnectError("away")
    server([away, UNAVAILABLE, Run()], [away, httpx.ReadTimeout("away"), Running(), Completed()])
    dispatch.run_on_workers("train-concept", "dog", {})


def test_why_a_part_failed_is_told_without_passwords(server: Callable[..., None]) -> None:
    server([Run()], [Failed(message="no answer from postgresql://team:hunter22@db/mlflow")])
    with pytest.raises(RuntimeError, match=r"^no answer from postgresql://\*\*\*@db/mlflow$"):
        dispatch.run_on_workers("train-concept", "dog", {})


def test_a_deployment_that_is_not_there_is_not_waited_for(server: Callable[..., None]) -> None:
    missing = httpx.HTTPStatusError("missing", request=UNAVAILABLE.request, response=httpx.Response(404))
    server([missing], [])
    with pytest.raises(httpx.HTTPStatusError, match="missing"):
        dispatch.run_on_workers("train-concept", "dog", {})


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

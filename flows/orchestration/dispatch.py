"""Runs a deployment on any free worker and waits for it, also while a crashed run is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import httpx
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.runtime import flow_run
from prefect.states import State

from svdiff.secrets import redacted

T = TypeVar("T")
POLL = 5.0  # seconds
PATIENCE = timedelta(seconds=60)  # a crashed run is scheduled anew sooner than that, if it is at all


def run_on_workers(deployment: str, name: str, parameters: dict[str, Any]) -> None:
    """Run `deployment` with `parameters` as the part `name` of this flow run; return when it is completed.

    A flow run that is itself begun anew finds the parts that it started before, and a server that is away is waited for.
    Raises RuntimeError with the part's last message if it ends otherwise.
    """
    key = f"{flow_run.id}-{name}"  # so that asking twice starts it once
    part: Any = _answer(
        lambda: run_deployment(
            f"{deployment}/{deployment}",
            parameters=parameters,
            flow_run_name=f"{deployment}-{name}",
            timeout=0,
            idempotency_key=key,
        )
    )
    with get_client(sync_client=True) as client:
        while True:
            state = _answer(lambda: client.read_flow_run(part.id)).state
            if state is not None and state.is_final():
                if state.is_completed():
                    return
                if not state.is_crashed() or datetime.now(UTC) - state.timestamp > PATIENCE:
                    raise RuntimeError(reason(state))
            time.sleep(POLL)


def reason(state: State[Any]) -> str:
    """Why a run ended in this state, without passwords."""
    return redacted(state.message or state.name or state.type.value)


def _answer(ask: Callable[[], T]) -> T:
    """What the server answers, once it does."""
    while True:
        try:
            return ask()
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
        time.sleep(POLL)

"""Runs a deployment on any free worker and waits for it, also while a crashed run is tried again."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.runtime import flow_run

POLL = 5.0  # seconds
PATIENCE = timedelta(seconds=60)  # a crashed run is scheduled anew sooner than that, if it is at all


def run_on_workers(deployment: str, name: str, parameters: dict[str, Any]) -> None:
    """Run `deployment` with `parameters` as the part `name` of this flow run; return when it is completed.

    A flow run that is itself begun anew finds the parts that it started before. Raises RuntimeError with the part's
    last message if it ends otherwise.
    """
    part: Any = run_deployment(
        f"{deployment}/{deployment}",
        parameters=parameters,
        flow_run_name=f"{deployment}-{name}",
        timeout=0,
        idempotency_key=f"{flow_run.id}-{name}",
    )
    with get_client(sync_client=True) as client:
        while True:
            try:
                state = client.read_flow_run(part.id).state
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                    raise
                state = None  # the server is away, while the part goes on
            if state is not None and state.is_final():
                if state.is_completed():
                    return
                if not state.is_crashed() or datetime.now(UTC) - state.timestamp > PATIENCE:
                    raise RuntimeError(state.message or state.name)
            time.sleep(POLL)

"""Schedules: what people change on the server stays as it is, and of runs that were missed only the last is made up for."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
)
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, State


def as_they_are(file: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Contents of prefect.yaml with the schedules of the server's deployments left alone, and a line where they differ."""
    said = []
    with get_client(sync_client=True) as client:
        for values in file["deployments"]:
            name = values["name"]
            try:
                there = client.read_deployment_by_name(f"{name}/{name}")
            except ObjectNotFound:
                continue
            wanted = {s["slug"]: s["cron"] for s in values.pop("schedules", [])}
            values["paused"] = there.paused
            found = {s.slug: getattr(s.schedule, "cron", "") for s in there.schedules if s.active and not there.paused}
            if wanted != found:
                said.append(
                    f"schedules of {name} stay as they are on the server; "
                    f"`prefect deploy --name {name}` takes those of prefect.yaml"
                )
    return file, said


def cancel_missed() -> State[Any] | None:
    """Of the scheduled runs of this deployment that are due, cancel all but the last; a Cancelled state if this is one.

    A server or its workers may have been away for many nights, and one run makes up for them.
    """
    with get_client(sync_client=True) as client:
        me = client.read_flow_run(flow_run.id) if flow_run.id else None
        if me is None or not me.auto_scheduled or me.deployment_id is None:
            return None
        due = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[me.deployment_id])),
            flow_run_filter=FlowRunFilter(
                expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)),
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        )
        last, *missed = [run for run in due if run.auto_scheduled]
        state: State[Any] = Cancelled(message=f"missed; {last.name}, due later, makes up for it")
        for run in missed:
            if run.id != me.id and run.state is not None and run.state.is_scheduled():
                client.set_flow_run_state(run.id, state)
        return None if last.id == me.id else state

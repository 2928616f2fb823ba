"""Schedules that people changed stay so, and of many missed nights one run is made up for."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_engine import run_flow
from prefect.states import State

from flows.orchestration.schedules import as_they_are, cancel_missed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]
NIGHTLY = {"slug": "nightly", "cron": "0 3 * * *", "timezone": "UTC"}


@flow(name="night", persist_result=False)
def night() -> Any:
    return cancel_missed()


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def deployment(client: SyncPrefectClient) -> Iterator[Any]:
    flow_id = client.create_flow(night)
    schedule = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *"), slug="nightly")
    made = client.create_deployment(flow_id, "night", schedules=[schedule])
    yield made
    client.delete_deployment(made)


def file() -> dict[str, Any]:
    return {"deployments": [{"name": "night", "schedules": [dict(NIGHTLY)]}, {"name": "new", "schedules": [NIGHTLY]}]}


def test_a_deployment_that_is_there_keeps_its_schedules_and_a_new_one_gets_those_of_the_file(
    client: SyncPrefectClient, deployment: Any
) -> None:
    values, said = as_they_are(file())
    assert values["deployments"] == [{"name": "night", "paused": False}, {"name": "new", "schedules": [NIGHTLY]}]
    assert said == []


@pytest.mark.parametrize("change", ["schedule paused", "deployment paused", "schedule removed", "time changed"])
def test_what_somebody_changed_is_said_and_stays(client: SyncPrefectClient, deployment: Any, change: str) -> None:
    (schedule,) = client.read_deployment(deployment).schedules
    match change:
        case "schedule paused":
            client.update_deployment_schedule(deployment, schedule.id, active=False)
        case "deployment paused":
            client.pause_deployment(deployment)
        case "schedule removed":
            client.delete_deployment_schedule(deployment, schedule.id)
        case "time changed":
            client.update_deployment_schedule(deployment, schedule.id, schedule=CronSchedule(cron="0 5 * * *"))
    values, said = as_they_are(file())
    assert values["deployments"][0] == {"name": "night", "paused": change == "deployment paused"}
    assert len(said) == 1
    assert "schedules of night stay as they are on the server" in said[0]


def missed(client: SyncPrefectClient, deployment: Any, nights: int) -> list[Any]:
    """What the server schedules in so many nights in which no worker is there, earliest first."""
    now = datetime.now(UTC)
    times = {"start_time": (now - timedelta(days=nights)).isoformat(), "end_time": now.isoformat()}
    counts = {"min_runs": nights, "max_runs": nights}
    client._client.post(f"/deployments/{deployment}/schedule", json=times | counts).raise_for_status()
    runs = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_ASC)
    found = [run for run in runs if run.deployment_id == deployment and run.auto_scheduled]
    found = [run for run in found if run.expected_start_time < now]
    assert len(found) == nights
    return found


def taken(run: Any) -> State:
    """The state in which a worker that takes `run` leaves it."""
    state: Any = run_flow(night, flow_run=run, return_type="state")
    return state


def test_of_ten_missed_nights_one_is_made_up_for(client: SyncPrefectClient, deployment: Any) -> None:
    runs = missed(client, deployment, 10)
    assert taken(runs[0]).is_cancelled()
    states = [client.read_flow_run(run.id).state for run in runs]
    assert all(state.is_cancelled() for state in states[:9])
    assert f"{runs[9].name}, due later, makes up for it" in states[3].message
    assert states[9].is_scheduled()
    assert taken(runs[9]).is_completed()


def test_the_last_may_be_taken_first(client: SyncPrefectClient, deployment: Any) -> None:
    runs = missed(client, deployment, 3)
    assert taken(runs[2]).is_completed()
    assert [client.read_flow_run(run.id).state.name for run in runs] == ["Cancelled", "Cancelled", "Completed"]


def test_a_run_that_somebody_asked_for_is_no_missed_one(client: SyncPrefectClient, deployment: Any) -> None:
    asked = client.create_flow_run_from_deployment(deployment)
    missed(client, deployment, 2)
    assert taken(asked).is_completed()
    assert taken(client.create_flow_run(night)).is_completed()

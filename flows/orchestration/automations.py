"""Automations of the Prefect server: mark runs without heartbeat as crashed, schedule crashed runs again; limit on GPUs.

A flow run sends a heartbeat every `flows.heartbeat_frequency` seconds (prefect.toml). When worker, engine or machine
die, three missing heartbeats later the server marks it Crashed; a crashed run of a deployment is scheduled again, ATTEMPTS
times in all. What it had finished is up to date by then, and registering twice makes one version, so nothing is done twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from prefect.automations import Automation
from prefect.client.orchestration import get_client
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from prefect.states import StateType

from flows.orchestration.gpus import visible
from flows.orchestration.tasks import GPU

ATTEMPTS = 3
PAUSE = 20  # seconds between a crash and the next attempt
STUCK = 600  # seconds that a worker may take to start a run
ALIVE = "prefect.flow-run.heartbeat"
ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "Crashed")}
ANY_RUN = "prefect.flow-run.*"
OF_DEPLOYMENT = {"prefect.resource.role": "deployment", "prefect.resource.id": "prefect.deployment.*"}


@contextmanager
def asking(url: str) -> Iterator[None]:
    """Let Prefect's client in this process ask the server at `url`, whatever profile is active."""
    with temporary_settings({PREFECT_API_URL: url}):
        yield


def automations() -> list[Automation]:
    """Silent runs crash; crashed runs of deployments are scheduled anew; so are those whose worker died at once."""
    silence = 3 * (get_current_settings().flows.heartbeat_frequency or 180)
    per_run: dict[str, Any] = {"for_each": {"prefect.resource.id"}, "threshold": 1}
    return [
        Automation(
            name="svdiff: a run without heartbeat has crashed",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                after={ALIVE},
                expect={ALIVE, *ENDED},
                match={"prefect.resource.id": ANY_RUN},
                within=timedelta(seconds=silence),
                **per_run,
            ),
            actions=[
                ChangeFlowRunState(
                    state=StateType.CRASHED,
                    name="Crashed",
                    message=f"no heartbeat for {silence} s: worker or engine died",
                )
            ],
        ),
        Automation(
            name="svdiff: a crashed run is tried again",
            trigger=EventTrigger(
                # Not at once: a worker that is given a run back before it is through with its end dies of it.
                posture=Posture.Proactive,
                after={"prefect.flow-run.Crashed"},
                expect={"prefect.flow-run.AwaitingRetry"},
                within=timedelta(seconds=PAUSE),
                # A run that never got to its first line (count 0) would not get there the next time either.
                match={
                    "prefect.resource.id": ANY_RUN,
                    "prefect.run-count": [str(count) for count in range(1, ATTEMPTS)],
                },
                match_related=OF_DEPLOYMENT,
                **per_run,
            ),
            actions=[_schedule("crashed; another worker takes it")],
        ),
        Automation(
            name="svdiff: a run that its worker does not start is tried again",
            trigger=EventTrigger(
                posture=Posture.Proactive,
                after={"prefect.flow-run.Pending"},
                expect={"prefect.flow-run.Running", "prefect.flow-run.AwaitingRetry", *ENDED},
                match={"prefect.resource.id": ANY_RUN},
                match_related=OF_DEPLOYMENT,
                within=timedelta(seconds=STUCK),
                **per_run,
            ),
            actions=[_schedule(f"not started within {STUCK} s; another worker takes it")],
        ),
    ]


def _schedule(message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=message)


def install(gpus: int | None) -> list[str]:
    """Make automations and the limit on tasks tagged `gpu`, or bring them up to date; what was done, a line each.

    Args:
        gpus: tasks at once that need a GPU, on all workers together; None keeps the limit that is there, or makes it the
            number of GPUs here, at least 1.
    """
    said = []
    for automation in automations():
        try:
            found: Any = Automation.read(name=automation.name)
            automation.id = found.id
        except ValueError:
            automation.create()
            said.append(f"automation '{automation.name}' made")
        else:
            automation.update()
            said.append(f"automation '{automation.name}' is up to date")
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_concurrency_limit_by_tag(GPU).concurrency_limit
        except ObjectNotFound:
            limit = None
        if limit is None or gpus not in (None, limit):
            gpus = gpus or max(1, len(visible()))
            client.create_concurrency_limit(GPU, gpus)
            said.append(f"stages that need a GPU: {gpus} at once")
        else:
            said.append(f"stages that need a GPU: {limit} at once, as before (--gpus changes it)")
    return said


def remove() -> list[str]:
    """Take away what `install` made."""
    said = []
    for automation in automations():
        try:
            found: Any = Automation.read(name=automation.name)
            found.delete()
        except ValueError:
            continue
        said.append(f"automation '{automation.name}' removed")
    with get_client(sync_client=True) as client:
        try:
            client.delete_concurrency_limit_by_tag(GPU)
            said.append("limit on stages that need a GPU removed")
        except ObjectNotFound:
            pass
    return said

"""The Prefect task around a stage: which of them need a GPU, what is waited for, what the UI and the logs show of them.

A worker with a clone of its own has SVDIFF_SHARE=1 (`python -m flows worker` sets it): its stages take what other
clones have made from the DVC remote, and push there what they make, one clone at a time for each stage.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists
from prefect.runtime import flow_run
from prefect.states import State

from flows.orchestration.artifacts import Progress
from flows.orchestration.gpus import own_gpu
from flows.orchestration.logs import StageLog
from flows.pipeline.stages import SHARE, StageRun, StageWaits, push_stage, run_stage, train_together

GPU = "gpu"  # tag of the tasks that a concurrency limit holds back where GPUs are scarce
LIGHT = {"check", "register", "register-pair", "correlate", "report"}  # stages that need none
LEASE = 60  # seconds after which a dead worker's claim on a stage is void
WAITS = 50
DELAYS = [2.0, 5.0, 10.0, 20.0, 30.0] + [120.0] * (WAITS - 5)  # seconds, an hour and a half in all


def dvc_stage(stage: str, timeout_minutes: float | None = None, *, return_state: bool = False) -> Any:
    """Run one stage of dvc.yaml in the current folder as a task; returns `ran`, `restored` or `unchanged`.

    With `return_state` a Prefect state instead, which holds the failure if there was one.
    """
    tags = [GPU] if _needs_gpu(stage) else []
    tagged: Any = _stage.with_options(tags=tags)
    return tagged(stage, timeout_minutes, return_state=return_state)


def _needs_gpu(stage: str) -> bool:
    return stage.partition("@")[0] not in LIGHT


def _better_later(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Only what misses something for the moment gets better by waiting."""
    try:
        state.result()
    except StageWaits:
        return True
    except Exception:
        return False
    return False


@task(
    name="stage",
    task_run_name="{stage}",
    retries=WAITS,
    retry_delay_seconds=DELAYS,
    retry_condition_fn=_better_later,
    # What is up to date is DVC's business alone.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def _stage(stage: str, timeout_minutes: float | None) -> str:
    log, root, shared = get_run_logger(), Path.cwd(), bool(os.environ.get(SHARE))
    lines, progress = StageLog(stage, root), Progress(stage)

    def on_line(line: str) -> None:
        log.info(line)
        lines.write(line)

    with ExitStack() as held:
        if shared:
            held.enter_context(_alone(stage))
        gpu = held.enter_context(own_gpu()) if _needs_gpu(stage) else {}
        try:
            done: StageRun = run_stage(
                stage,
                root=root,
                on_line=on_line,
                on_progress=progress.show,
                timeout=None if timeout_minutes is None else 60 * timeout_minutes,
                environment=_link() | gpu,
                pull=shared,
            )
            if shared:
                push_stage(stage, root=root, on_line=on_line)
        except StageWaits as error:
            log.warning("stage %s %s (%s); it is tried again", stage, error.problem, error.reason)
            raise
    log.info("stage %s: %s in %.1f s", done.stage, done.outcome, done.seconds)
    return done.outcome


@task(name="together", task_run_name="train together", cache_policy=NO_CACHE, persist_result=False)
def train_group(names: list[str], timeout_minutes: float | None) -> None:
    """Train several as one batch on one GPU; their stages then find each finished."""
    log, lines, progress = get_run_logger(), StageLog("together", Path.cwd()), Progress(f"together {names[0]}")

    def on_line(line: str) -> None:
        log.info(line)
        lines.write(line)

    with own_gpu() as gpu:
        train_together(
            names,
            root=Path.cwd(),
            on_line=on_line,
            on_progress=progress.show,
            timeout=None if timeout_minutes is None else 60 * timeout_minutes * len(names),
            environment=_link() | gpu,
        )


@contextmanager
def _alone(stage: str) -> Iterator[None]:
    """Hold the server's only claim on `stage`: of two clones that are asked for it, the second finds it made."""
    claim = f"stage {stage}"
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(claim, limit=1)
    with concurrency(claim, lease_duration=LEASE):
        yield


def _link() -> dict[str, str]:
    """Tells the stages which flow run they work for; `register` tags the MLflow run with it."""
    return {"SVDIFF_FLOW_RUN_ID": str(flow_run.id or ""), "SVDIFF_FLOW_RUN_URL": str(flow_run.ui_url or "")}

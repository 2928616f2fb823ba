"""Flow `reevaluate`: every registered champion, sampled and scored again; somebody is told only when something is wrong.

By hand `python -m flows reevaluate` does the same without Prefect. The deployment in prefect.yaml runs it by a cron.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import State

from flows.monitoring.round import Result, Round
from flows.monitoring.rule import Verdict
from flows.orchestration.dispatch import reason
from flows.orchestration.gpus import own_gpu
from flows.orchestration.parameters import Name
from flows.orchestration.schedules import cancel_missed
from flows.registry.runs import FLOW_RUN, FLOW_RUN_URL
from flows.registry.tracking import connect
from svdiff.config import load_config

EVENTS = {Verdict.DRIFT: "svdiff.champion.drifted", Verdict.BROKEN: "svdiff.champion.broken"}


@task(name="re-evaluate", task_run_name="{concept}", cache_policy=NO_CACHE, persist_result=False)
def _reevaluate(concept: str, round_: Round) -> Result:
    """One champion, as a task of its own."""
    return round_.reevaluate(concept)


@flow(name="reevaluate", flow_run_name="reevaluate", persist_result=False)
def reevaluate(
    concepts: list[Name] | None = None, force: bool = False, accept: bool = False, rollback: bool | None = None
) -> dict[str, str] | State[Any]:
    """Sample and score registered champions again, and say what became of each.

    A champion that drifted or broke raises a Prefect event (`svdiff.champion.drifted`, `svdiff.champion.broken`), tags
    its version and, if asked for, is rolled back. One that could not be measured does not stop the others; the run says
    which those were, and fails at its end.

    Of scheduled runs that were missed while nothing was up, the last is made up for.

    Args:
        concepts: registered names; default all champions in use.
        force: measure again what was measured within `reevaluate.fresh_hours`.
        accept: take today's scores as the baseline from here on.
        rollback: put the previous champion back where one drifted or broke; default as params.yaml says.
    """
    if (cancelled := cancel_missed()) is not None:
        return cancelled
    log, root = get_run_logger(), Path.cwd()
    config = load_config()
    if rollback is not None:
        config = config.model_copy(update={"reevaluate": config.reevaluate.model_copy(update={"rollback": rollback})})
    links = {FLOW_RUN: str(flow_run.id or ""), FLOW_RUN_URL: str(flow_run.ui_url or "")}
    round_ = Round(
        connect(config.tracking, root),
        config,
        root,
        force=force,
        accept=accept,
        tags={k: v for k, v in links.items() if v},
    )
    names = [planned.concept for planned in round_.plan(concepts)]
    with own_gpu() as gpu:
        os.environ.update(gpu)  # heeded at the first use of a GPU in this process, which is below
        results, failures = _measure(names, round_)
        round_.scorer.peaks.say()
    create_table_artifact(table(results, failures), key="reevaluation", description=summary(results, failures))
    log.info("%s", summary(results, failures))
    if failures:
        raise RuntimeError("\n".join(f"{name} could not be measured: {why}" for name, why in failures.items()))
    return {result.concept: str(result.verdict) for result in results}


def _measure(names: Sequence[str], round_: Round) -> tuple[list[Result], dict[str, str]]:
    """One champion after the other: what became of them, and why some could not be measured."""
    log = get_run_logger()
    results, failures = [], {}
    for name in names:
        state = _reevaluate(name, round_, return_state=True)
        if not state.is_completed():
            failures[name] = reason(state)
            continue
        result = state.result()
        results.append(result)
        (log.warning if result.verdict.alarming else log.info)("%s", result.line())
        if result.verdict.alarming:
            alarm(result)
    return results, failures


def alarm(result: Result) -> None:
    """Tell Prefect, whose automations tell people."""
    emit_event(
        event=EVENTS[result.verdict],
        resource={
            "prefect.resource.id": f"svdiff.version.{result.concept}.{result.version}",
            "prefect.resource.name": f"{result.concept} version {result.version}",
            "svdiff.concept": result.concept,
        },
        payload={"verdict": str(result.verdict), "reason": result.reason, "version": result.version},
    )


def table(results: Sequence[Result], failures: dict[str, str]) -> list[dict[str, str]]:
    """What the Prefect UI shows: alarming ones first, then what failed, then the rest."""
    rows = [
        {
            "concept": result.concept,
            "version": str(result.version),
            "verdict": str(result.verdict),
            "reason": result.reason,
        }
        for result in sorted(results, key=lambda result: not result.verdict.alarming)
    ]
    alarming = sum(result.verdict.alarming for result in results)
    failed = [{"concept": n, "version": "", "verdict": "failed", "reason": why} for n, why in failures.items()]
    return rows[:alarming] + failed + rows[alarming:]


def summary(results: Sequence[Result], failures: dict[str, str]) -> str:
    """One line: how many of each."""
    counts = Counter(str(result.verdict) for result in results)
    parts = [f"{count} {verdict}" for verdict, count in counts.most_common()]
    if failures:
        parts.append(f"{len(failures)} failed ({', '.join(failures)})")
    return f"{len(results) + len(failures)} champions: {', '.join(parts) or 'none registered'}"

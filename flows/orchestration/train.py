"""Flows that train: the stages of `dvc.yaml` in order, one task a stage.

`train-concept` and `train-pair` bring one name from its pictures to a registered version; `train-all` does so for many,
then runs the analyses over all of them. They do nothing that is up to date. By hand, with a server at PREFECT_API_URL:

    prefect deployment run train-concept/train-concept --param concept=teapot --watch
    python -c 'from flows.orchestration.train import train_concept; train_concept("teapot")'
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.orchestration.artifacts import publish_concept
from flows.orchestration.dispatch import reason, run_on_workers
from flows.orchestration.edit import edit_image
from flows.orchestration.parameters import Minutes, Name, check
from flows.orchestration.tasks import GPU, dvc_stage, train_group
from flows.pipeline.order import analysis_stages, own_stages, shared_stages, stage_of
from flows.pipeline.results import read_results
from flows.pipeline.stages import StageFailed, changed
from svdiff.config import Config, TrainConfig, load_config
from svdiff.errors import SvdiffError


@flow(name="train-concept", flow_run_name="train-{concept}", persist_result=False)
def train_concept(
    concept: Name, timeout_minutes: Minutes | None = None, prior: bool = True, analyses: bool = False
) -> dict[str, str]:
    """Train, sample, score and register one concept; what is up to date is left as it is.

    Args:
        concept: name under `concepts:` in params.yaml.
        timeout_minutes: how long a stage may take; it is ended, with everything it started, after that.
        prior: make the class's prior images first, if they are missing or stale.
        analyses: afterwards bring up to date what looks at all concepts together, which must all be trained by then.
    """
    config = check(concept)
    config.concept(concept)
    return _train(config, concept, timeout_minutes, prior, analyses)


@flow(name="train-pair", flow_run_name="train-{pair}", persist_result=False)
def train_pair(
    pair: Name, timeout_minutes: Minutes | None = None, prior: bool = True, analyses: bool = False
) -> dict[str, str]:
    """Mix, train, sample, score and register the concepts of one pair together; what is up to date is left as it is.

    Args:
        pair: name under `pairs:` in params.yaml.
        timeout_minutes: how long a stage may take; it is ended, with everything it started, after that.
        prior: make the classes' prior images first, if they are missing or stale.
        analyses: afterwards bring up to date what looks at everything together, which must all be trained by then.
    """
    config = check(pair)
    config.pair_of(pair)
    return _train(config, pair, timeout_minutes, prior, analyses)


def _train(config: Config, name: str, timeout_minutes: float | None, prior: bool, analyses: bool) -> dict[str, str]:
    stages = [*(shared_stages(config, name) if prior else []), *own_stages(config, name)]
    outcomes = {stage: dvc_stage(stage, timeout_minutes) for stage in stages}
    publish_concept(read_results(config, name))
    if analyses:
        outcomes |= {stage: dvc_stage(stage, timeout_minutes) for stage in analysis_stages(config)}
    return outcomes


@task(name="name", task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False)
def _one(name: str, kind: str, where: str, timeout_minutes: float | None) -> None:
    """One concept, pair or edit of `train-all`, as a flow run of its own."""
    part: Any = {"concept": train_concept, "pair": train_pair, "edit": edit_image}[kind]
    parameters: dict[str, Any] = {kind: name, "timeout_minutes": timeout_minutes}
    if kind != "edit":
        # Here they are made already; a worker's own clone has yet to take them from the DVC remote.
        parameters["prior"] = where == "workers"
    if where == "workers":
        run_on_workers(part.name, name, parameters)
    else:
        part(**parameters)


@flow(name="train-all", persist_result=False)
def train_all(
    names: list[Name] | None = None,
    where: Literal["here", "workers"] = "here",
    limit: Annotated[int, Field(ge=1, le=100)] = 1,
    together: Annotated[int, Field(ge=1, le=100)] = 8,
    timeout_minutes: Minutes | None = None,
    analyses: bool = True,
) -> None:
    """Everything in params.yaml, or what is named of it, then correlation, rank analysis and report.

    One that fails does not stop the others; the run says which failed, and fails at its end.

    Args:
        names: names under `concepts:`, `pairs:` and `edits:` in params.yaml; default all.
        where: `here` trains on the worker that takes this run; `workers` makes a run of each name for any worker.
        limit: names in work at once, if `here`; workers have limits of their own.
        together: trainings that are one batch, if `here`: faster than one after the other, with more pictures in memory at
            once. 1: each alone.
        timeout_minutes: how long a stage may take, and a batch for each of its trainings.
        analyses: run what looks at all of them together.
    """
    log = get_run_logger()
    config = load_config()
    wanted = list(dict.fromkeys(names if names is not None else [*config.concepts, *config.pairs, *config.edits]))
    check(*wanted)
    failures: dict[str, str] = {}

    # The check is shared by all, prior images by the names of a class: made once, before those start.
    needs = {name: shared_stages(config, name) for name in wanted}
    for stage in dict.fromkeys(stage for stages in needs.values() for stage in stages):
        _attempt(failures, stage, timeout_minutes)
    ready = [name for name in wanted if not failures.keys() & set(needs[name])]
    failures |= {name: "a stage that it shares with others failed" for name in wanted if name not in ready}

    if where == "here" and together > 1:
        _train_in_groups(config, ready, together, limit, timeout_minutes)
    with ThreadPoolTaskRunner[Any](max_workers=max(1, len(ready)) if where == "workers" else limit) as runner:
        kinds = {name: config.entry(name).kind for name in ready}
        arguments = {"where": where, "timeout_minutes": timeout_minutes}
        futures = {name: runner.submit(_one, {"name": name, "kind": kinds[name], **arguments}) for name in ready}
        for name, future in futures.items():
            future.wait()
            if not future.state.is_completed():
                failures[name] = reason(future.state)
    trained = [name for name in wanted if name not in failures]
    log.info("%d of %d are done", len(trained), len(wanted))

    if analyses:
        # What other clones have made comes from the DVC remote; in the clone that made it nothing happens.
        made = [stage for name in trained for stage in own_stages(config, name)] if where == "workers" else []
        for stage in [*(stage for stage in made if not stage.startswith("register")), *analysis_stages(config)]:
            _attempt(failures, stage, timeout_minutes)
    if failures:
        raise RuntimeError("\n".join(f"{name} failed: {why}" for name, why in failures.items()))


def _train_in_groups(
    config: Config, names: list[str], together: int, limit: int, timeout_minutes: float | None
) -> None:
    """Train as batches what is due and can be; the stages of those names then find their trainings finished.

    Nothing fails here: what is not through by then is trained by its own stage, from where it is, which says what is wrong.
    """
    log = get_run_logger()
    for name in names:
        for stage in takewhile(lambda stage: not stage.startswith("train"), own_stages(config, name)):
            _attempt({}, stage, timeout_minutes)
    try:
        groups = _groups(config, names, together, limit)
    except StageFailed as error:  # such as another run's training, during which DVC tells nothing of these stages
        log.warning("which trainings are due cannot be told, so each is trained alone: %s", error)
        return
    if not groups:
        return
    with ThreadPoolTaskRunner[Any](max_workers=limit) as runner:
        batch = train_group.with_options(tags=[GPU])
        futures = [runner.submit(batch, {"names": group, "timeout_minutes": timeout_minutes}) for group in groups]
        for group, future in zip(groups, futures, strict=True):
            future.wait()
            if not future.state.is_completed():
                log.warning("not all of %s trained together; they go on alone: %s", group, reason(future.state))


def _groups(config: Config, names: Sequence[str], together: int, limit: int) -> list[list[str]]:
    """Groups of up to `together` names whose trainings are due and can share a network; as even as `limit` of them at once want."""
    from svdiff.training.together import check_together

    stages = {stage_of(config.entry(name), "train"): name for name in names}
    if len(stages) < 2:
        return []
    due = [stages[stage] for stage in changed(list(stages), root=Path.cwd())]
    size = min(together, math.ceil(len(due) / limit))
    groups: list[dict[str, TrainConfig]] = []
    for name in due:
        own = config.train_config(name)
        for group in [*(group for group in groups if len(group) < size), {}]:
            with suppress(SvdiffError):
                check_together({**group, name: own})
                group[name] = own
                groups += [group] if len(group) == 1 else []
                break
    return [list(group) for group in groups if len(group) > 1]


def _attempt(failures: dict[str, str], stage: str, timeout_minutes: float | None) -> None:
    """Run a stage; note its failure instead of raising it."""
    state: State[str] = dvc_stage(stage, timeout_minutes, return_state=True)
    if not state.is_completed():
        failures[stage] = reason(state)

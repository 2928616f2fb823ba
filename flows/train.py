"""Flows that train: the stages of `dvc.yaml` in order, one task a stage.

`train-concept` brings one concept from its pictures to a registered version; `train-all` does so for many, then runs the
analyses over all of them. Both do nothing that is up to date. By hand, with a server at PREFECT_API_URL:

    prefect deployment run train-concept/train-concept --param concept=teapot --watch
    python -c 'from flows.train import train_concept; train_concept("teapot")'
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from flows.artifacts import publish_concept
from flows.stages import StageBusy, StageRun, run_stage
from svdiff.config import Config, load_config
from svdiff.data.concepts import concept_folder, load_concept_images
from svdiff.errors import SvdiffError

BUSY_RETRIES = 50
BUSY_DELAYS = [2.0, 5.0, 10.0, 20.0, 30.0] + [120.0] * (BUSY_RETRIES - 5)  # seconds, an hour and a half in all


def _while_busy(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Only a stage whose files another DVC command holds gets better by waiting."""
    try:
        state.result()
    except StageBusy:
        return True
    except Exception:
        return False
    return False


@task(
    name="stage",
    task_run_name="{stage}",
    retries=BUSY_RETRIES,
    retry_delay_seconds=BUSY_DELAYS,
    retry_condition_fn=_while_busy,
    # What is up to date is DVC's business alone.
    cache_policy=NO_CACHE,
    persist_result=False,
)
def dvc_stage(stage: str, timeout_minutes: float | None = None) -> str:
    """Run one stage of dvc.yaml in the current folder; returns `ran`, `restored` or `unchanged`."""
    log = get_run_logger()
    done: StageRun = run_stage(
        stage,
        root=Path.cwd(),
        on_line=log.info,
        timeout=None if timeout_minutes is None else 60 * timeout_minutes,
        environment=_link(),
    )
    log.info("stage %s: %s in %.1f s", done.stage, done.outcome, done.seconds)
    return done.outcome


def _link() -> dict[str, str]:
    """Tells the stages which flow run they work for; `register` tags the MLflow run with it."""
    return {"SVDIFF_FLOW_RUN_ID": str(flow_run.id or ""), "SVDIFF_FLOW_RUN_URL": str(flow_run.ui_url or "")}


def concept_stages(config: Config, concept: str) -> list[str]:
    """Stages that lead from a concept's pictures to its registered version, in order."""
    chain = [f"{stage}@{concept}" for stage in ("train", "sample", "score", "register")]
    return [f"prior@{config.concept(concept).class_word}", *chain]


def analysis_stages(config: Config) -> list[str]:
    """Stages that look at all concepts together."""
    return ["correlate", *(f"rank@{concept}" for concept in config.rank.concepts), "report"]


def check(*concepts: str) -> Config:
    """params.yaml of the current folder, in which all `concepts` must be, with pictures that can be read.

    Raises SvdiffError before any work, naming the concept or the file.
    """
    config = load_config()
    for concept in concepts:
        config.concept(concept)
        load_concept_images(concept_folder(concept))
    return config


@flow(name="train-concept", flow_run_name="train-{concept}", persist_result=False)
def train_concept(
    concept: str, timeout_minutes: float | None = None, prior: bool = True, analyses: bool = False
) -> dict[str, str]:
    """Train, sample, score and register one concept; what is up to date is left as it is.

    Args:
        concept: name under `concepts:` in params.yaml.
        timeout_minutes: how long a stage may take; it is ended, with everything it started, after that.
        prior: make the class's prior images first, if they are missing or stale.
        analyses: afterwards bring up to date what looks at all concepts together, which must all be trained by then.
    """
    config = check(concept)
    stages = concept_stages(config, concept)
    outcomes = {stage: dvc_stage(stage, timeout_minutes) for stage in stages[0 if prior else 1 :]}
    publish_concept(concept, Path.cwd())
    if analyses:
        outcomes |= {stage: dvc_stage(stage, timeout_minutes) for stage in analysis_stages(config)}
    return outcomes


@task(name="concept", task_run_name="{concept}", cache_policy=NO_CACHE, persist_result=False)
def _concept(concept: str, timeout_minutes: float | None) -> dict[str, str]:
    """One concept of `train-all`, as a flow run of its own."""
    return train_concept(concept, timeout_minutes, prior=False)


@flow(name="train-all", persist_result=False)
def train_all(
    concepts: list[str] | None = None,
    limit: int = 1,
    timeout_minutes: float | None = None,
    analyses: bool = True,
) -> None:
    """Train, sample, score and register many concepts, then correlation, rank analysis and report.

    A concept that fails does not stop the others; the run says which failed, and fails at its end.

    Args:
        concepts: names under `concepts:` in params.yaml; default all.
        limit: concepts in work at once.
        timeout_minutes: how long a stage may take.
        analyses: run what looks at all concepts together.
    """
    log = get_run_logger()
    names = list(dict.fromkeys(concepts if concepts is not None else load_config().concepts))
    if limit < 1:
        raise SvdiffError(f"limit is {limit}; expected the number of concepts in work at once, from 1")
    config = check(*names)
    failures: dict[str, str] = {}

    # Prior images are shared by the concepts of a class: made once, before those start.
    broken = set()
    for word in dict.fromkeys(config.concept(name).class_word for name in names):
        if not _attempt(failures, f"prior@{word}", timeout_minutes):
            broken.add(word)
    ready = [name for name in names if config.concept(name).class_word not in broken]
    failures |= {name: "no prior images" for name in names if name not in ready}

    with ThreadPoolTaskRunner[Any](max_workers=limit) as runner:
        futures = {
            name: runner.submit(_concept, {"concept": name, "timeout_minutes": timeout_minutes}) for name in ready
        }
        for name, future in futures.items():
            future.wait()
            if not future.state.is_completed():
                failures[name] = future.state.message or str(future.state.type.value)
    log.info("%d of %d concepts are registered", len(set(names) - set(failures)), len(names))

    for stage in analysis_stages(config) if analyses else []:
        _attempt(failures, stage, timeout_minutes)
    if failures:
        raise RuntimeError("\n".join(f"{name} failed: {why}" for name, why in failures.items()))


def _attempt(failures: dict[str, str], stage: str, timeout_minutes: float | None) -> bool:
    """Run a stage; note its failure instead of raising it."""
    state: State[str] = dvc_stage(stage, timeout_minutes, return_state=True)
    if not state.is_completed():
        failures[stage] = state.message or state.type.value
    return state.is_completed()

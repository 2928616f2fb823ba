"""One round of re-evaluation: which champions are due, the verdict on each, and what is recorded in MLflow.

The rule is in `flows.monitoring.rule`. All scores under one baseline go to one MLflow run, a step each time, so that the
run's curves show them over months; the version's tags have the last verdict. A round that is killed goes on where it was:
an unfinished run is taken up, and concepts with a fresh result are not scored again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from flows.monitoring.measurement import BrokenVersion, Measurement, VersionScorer
from flows.monitoring.rule import Judgement, Verdict, compare, new_baseline
from flows.registry.concepts import RETIRED, RegisteredConcept, model_id, read_concept, read_concepts
from flows.registry.conditions import (
    BASELINE_RUN,
    SCORES_FOLDER,
    Conditions,
    baseline_conditions,
    baseline_scores,
    changed,
    set_baseline,
)
from flows.registry.overrides import predecessor, rollback
from flows.registry.promotion import SHOWN, decide_again, now
from flows.registry.runs import CONCEPT
from flows.registry.tracking import locked
from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.threads import use_threads

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from flows.registry.tracking import Tracking

VERDICT, WHY, WHEN = "reevaluation", "reevaluation_reason", "reevaluated_at"  # tags of a version
REEVALUATES, OF_BASELINE = "svdiff.reevaluates", "svdiff.baseline_run"  # tags of a run
SCORES = ("identity", "image_alignment", "text_alignment", "clip_i")


@dataclass(frozen=True)
class Planned:
    """A champion, whether it is to be measured now, and why or why not."""

    concept: str
    version: int
    due: bool
    why: str


@dataclass(frozen=True)
class Result:
    """What became of one champion; `version` is the one that was looked at."""

    concept: str
    version: int
    verdict: Verdict
    reason: str
    fresh: bool = False  # known from an earlier run, not measured again

    def line(self) -> str:
        """For people."""
        known = " (known already)" if self.fresh else ""
        return f"{self.concept} version {self.version}: {self.verdict}{known}: {self.reason}"


class Round:
    """One round over the registry.

    Args:
        tracking: the registry.
        config: params.yaml; `reevaluate` holds the rule.
        root: the checkout.
        force: measure again what is fresh.
        accept: take what is measured now as the baseline, whatever it was.
        tags: more tags for the runs, such as the flow run's.
    """

    def __init__(
        self,
        tracking: Tracking,
        config: Config,
        root: Path,
        *,
        force: bool = False,
        accept: bool = False,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.tracking, self.config, self.rule = tracking, config, config.reevaluate
        self.force, self.accept, self.tags = force, accept, dict(tags or {})
        use_threads(config.threads)  # as the stages whose scores it compares with
        self.scorer = VersionScorer(config, root)

    def plan(self, names: Sequence[str] | None = None) -> list[Planned]:
        """The champions of all concepts in use, or of `names`, each with what is to be done.

        Raises SvdiffError for a name that is not registered, is retired or has no champion.
        """
        found = read_concepts(self.tracking, names)
        if names is None:
            found = [concept for concept in found if concept.champion and not concept.retired]
        return [self._planned(concept) for concept in found]

    def reevaluate(self, concept: str) -> Result:
        """Score the champion of `concept` unless a fresh result is there, judge it and record the result."""
        with locked(self.tracking.locks / f"reevaluate-{concept}"):
            found = read_concept(self.tracking, concept)
            version = _champion(found)
            planned = self._planned(found)
            if not planned.due:
                tags = version.tags
                return Result(concept, planned.version, Verdict(tags[VERDICT]), tags[WHY], fresh=True)
            result = self._reevaluate(version)
            if result.verdict is Verdict.NEW_BASELINE:
                decision = decide_again(self.tracking, self.config, concept)
                if decision and decision.promoted:
                    reason = f"{result.reason}; the challenger is champion now: {decision.reason}"
                    result = replace(result, reason=reason)
            elif result.verdict.alarming and self.rule.rollback:
                result = replace(result, reason=f"{result.reason}; {self._rollback(found, result)}")
        return result

    def _planned(self, concept: RegisteredConcept) -> Planned:
        version = _champion(concept)
        due, why = self._due(version)
        return Planned(concept.name, int(version.version), due, why)

    def _due(self, version: ModelVersion) -> tuple[bool, str]:
        last = version.tags.get(WHEN)
        if last is None:
            return True, "never measured again since it was registered"
        if self.force or self.accept:
            return True, f"asked for; last on {last}"
        if version.tags.get(VERDICT) == Verdict.BROKEN:  # found out quickly, and perhaps mended
            return True, f"was broken on {last}"
        before = baseline_conditions(version)
        parts = changed(before, self.scorer.conditions(version)) if before else ["the conditions"]
        if parts:
            return True, f"{' and '.join(parts)} changed"
        age = datetime.now(UTC) - datetime.fromisoformat(last)
        if age >= timedelta(hours=self.rule.fresh_hours):
            return True, f"last on {last}"
        return False, f"{version.tags.get(VERDICT)} on {last}, less than {self.rule.fresh_hours:g} hours ago"

    def _reevaluate(self, version: ModelVersion) -> Result:
        """Score, judge and record one version."""
        conditions = self.scorer.conditions(version)
        # A new baseline is what challengers are compared with, so it has everything that the stage `score` has.
        new = self.accept or baseline_conditions(version) != conditions
        try:
            measured = self.scorer.score(self.tracking, version, drift=new)
        except BrokenVersion as error:
            judgement = Judgement(Verdict.BROKEN, str(error))
        else:
            judgement = self._judge(version, measured, conditions)
            self._log(version, measured, judgement, conditions)
        self._tag(version, judgement)
        return Result(version.name, int(version.version), judgement.verdict, judgement.reason)

    def _judge(self, version: ModelVersion, measured: Measurement, conditions: Conditions) -> Judgement:
        before = baseline_conditions(version)
        if self.accept or before is None:
            return new_baseline(None, accepted=self.accept)
        if parts := changed(before, conditions):
            return new_baseline(parts)
        try:
            baseline = baseline_scores(self.tracking, version)
        except Exception as error:
            raise SvdiffError(
                f"scores of the baseline of '{version.name}' version {version.version} cannot be read ({error}); "
                "`python -m flows reevaluate --accept` takes those of today"
            ) from error
        return compare(measured.table, baseline.table, self.rule)

    def _log(self, version: ModelVersion, measured: Measurement, judgement: Judgement, conditions: Conditions) -> None:
        """Write scores to the run of the version's baseline; a new baseline has a new run."""
        from mlflow.entities import Metric

        client, fresh = self.tracking.client, judgement.verdict is Verdict.NEW_BASELINE
        run_id = self._run(version, None if fresh else version.tags[BASELINE_RUN], conditions)
        step = len(client.get_metric_history(run_id, "image_alignment"))
        values = {name: float(measured.table[name].mean()) for name in SCORES if name in measured.table}
        if measured.drift is not None:
            values["drift_identity"] = float(measured.drift["identity"].mean())
        changes = {"image_change": judgement.image_change, "text_change": judgement.text_change}
        values |= {name: value for name, value in changes.items() if value is not None}
        at = int(time.time() * 1000)
        client.log_batch(
            run_id, metrics=[Metric(k, v, at, step, model_id=model_id(version)) for k, v in values.items()]
        )
        # Pictures are stored where somebody may want to see them; each night's would fill a disk in a year.
        if judgement.verdict is not Verdict.UNCHANGED:
            self._log_files(run_id, SCORES_FOLDER if fresh else f"drift-{step:04d}", measured)
        client.set_tag(run_id, VERDICT, str(judgement.verdict))
        if fresh:
            set_baseline(self.tracking, version, conditions, run_id)
            for name in SHOWN:
                if name in values:
                    client.set_model_version_tag(version.name, str(version.version), name, f"{values[name]:.6f}")
        client.set_terminated(run_id, "FINISHED")

    def _log_files(self, run_id: str, folder: str, measured: Measurement) -> None:
        from svdiff.data.grid import image_grid

        with tempfile.TemporaryDirectory() as temporary:
            here = Path(temporary)
            measured.table.reset_index().assign(model="trained").to_csv(here / "images.csv", index=False)
            if measured.drift is not None:
                measured.drift.reset_index().assign(model="trained").to_csv(here / "drift.csv", index=False)
            (here / "evaluators.json").write_text(json.dumps(self.scorer.evaluators_described, indent=2) + "\n")
            image_grid(measured.images, columns=len(self.config.sample.seeds)).save(here / "samples.png")
            self.tracking.client.log_artifacts(run_id, temporary, folder)

    def _run(self, version: ModelVersion, baseline_run: str | None, conditions: Conditions) -> str:
        """The run for measurements against `baseline_run`, which may be that run itself; with None, a baseline to be.

        A run that was killed before its scores became a baseline is still running, and is taken up.
        """
        client, which = self.tracking.client, f"{version.name}/{version.version}"
        measured_under = {f"svdiff.conditions.{part}": value for part, value in conditions.items()}
        for run in client.search_runs([self.tracking.experiment_id], f"tags.`{REEVALUATES}` = '{which}'"):
            run_id, known = str(run.info.run_id), run.data.tags
            unfinished = (
                OF_BASELINE not in known and run.info.status == "RUNNING" and measured_under.items() <= known.items()
            )
            if unfinished if baseline_run is None else baseline_run in (run_id, known.get(OF_BASELINE)):
                return run_id
        tags = {REEVALUATES: which, CONCEPT: version.name, **measured_under, **self.tags}
        if baseline_run:
            tags[OF_BASELINE] = baseline_run
        name = f"{version.name} version {version.version}, re-evaluated"
        return str(client.create_run(self.tracking.experiment_id, run_name=name, tags=tags).info.run_id)

    def _tag(self, version: ModelVersion, judgement: Judgement) -> None:
        values = {VERDICT: str(judgement.verdict), WHY: judgement.reason[:4000], WHEN: now()}
        for key, value in values.items():  # the time last: with it the result counts
            self.tracking.client.set_model_version_tag(version.name, str(version.version), key, value)

    def _rollback(self, concept: RegisteredConcept, result: Result) -> str:
        """Put the previous champion back if it is better off itself; say what was done."""
        number = predecessor(concept, result.version)
        if number is None or number not in concept.versions:
            return "there is no previous champion to put back"
        previous = self._reevaluate(concept.versions[number])
        sound = [Verdict.UNCHANGED]
        if result.verdict is Verdict.BROKEN:  # else what moved the champion's scores may have moved these
            sound.append(Verdict.NEW_BASELINE)
        if previous.verdict not in sound:
            return f"not rolled back: version {number} is no better off ({previous.verdict}: {previous.reason})"
        try:  # others register and promote while these are measured
            rollback(
                self.tracking,
                concept.name,
                f"re-evaluation: {result.verdict}",
                expected=(result.version, number),
            )
        except SvdiffError as error:
            return f"not rolled back: {error}"
        return f"rolled back to version {number} ({previous.verdict})"


def _champion(concept: RegisteredConcept) -> ModelVersion:
    if concept.retired:
        raise SvdiffError(f"'{concept.name}' is retired ({concept.tags[RETIRED]})")
    if concept.champion is None:
        raise SvdiffError(f"'{concept.name}' has no champion to re-evaluate; `python -m flows promote` makes one")
    return concept.champion

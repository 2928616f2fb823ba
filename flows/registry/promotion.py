"""The rule by which a version becomes champion or challenger, and the moves of MLflow's aliases, with reasons.

The rule (`promote` in params.yaml), in the order in which it is asked:

1. The version or its concept is retired: it gets no alias.
2. It is not better than the untrained base on the same prompts and seeds: better in identity, and not worse in text alignment or
   drift. It gets no alias, so that nothing serves it; a champion that is scored again and is not better loses its alias,
   unless a person chose it.
3. There is no champion: the version becomes champion.
4. The version was rolled back: it gets no alias until somebody promotes it by hand.
5. The champion belongs to another base than the version: the version becomes champion, the old one no longer runs.
6. Both were scored by the same evaluators and sampler, against the same pictures of the concept, on prompts and
   seeds in common: the version becomes champion if it is better in one of identity, text alignment and drift, and worse in none.
7. Otherwise it stays challenger, and the reason says what could not be compared.

Better and worse are said of paired differences whose whole 95 % interval lies beyond the margin, so that of two versions
never both are better than the other, and luck with a few pictures promotes nothing. Drift is identity of pictures of the bare class
word: less is better. Where neither version has it (`sample.drift_pictures: 0`), it does not count.

The champion of a concept has the alias `champion`; the newest version that failed to become it, `challenger`. MLflow
has no history of aliases, so each champion names its predecessor in the tag `previous_champion`. What people may do beside
the rule is in `flows.registry.overrides`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.pipeline.results import Results, Scores
from flows.registry.concepts import CHALLENGER, CHAMPION, REASON, RETIRED, model_version, registered_model
from flows.registry.conditions import (
    Conditions,
    baseline_conditions,
    baseline_scores,
    conditions_of_results,
    set_baseline,
)
from flows.registry.tracking import Tracking, locked
from svdiff.config import Config, PromoteConfig, ScoreConfig
from svdiff.secrets import redacted

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities.model_registry import ModelVersion

    from svdiff.evaluation.intervals import Interval

JUDGED = "judged_scores"
PREVIOUS, ROLLED_BACK = "previous_champion", "rolled_back"
BETTER_THAN_BASE = "better_than_base"  # tag of a version: true or false
BY_HAND = "by hand"  # how the reason of a promotion by a person begins
SHOWN = ("identity", "text_alignment", "drift_identity")  # scores that are tags of a version
COMPARABLE = ("sampling", "pictures")  # parts of the conditions; `judge` looks at evaluators and prompts


@dataclass(frozen=True)
class Decision:
    """Whether a version is (or was made) champion, and why, in the words that stay with it."""

    promoted: bool
    reason: str
    barred: bool = False  # retired, rolled back or not better than the base: not even challenger


@dataclass(frozen=True)
class Difference:
    """By how much a version is better in one measure: the mean of paired differences with its 95 % interval."""

    measure: str
    gain: Interval
    margin: float

    @property
    def better(self) -> bool:
        """The whole interval lies above the margin."""
        return self.gain.low > self.margin

    @property
    def worse(self) -> bool:
        """The whole interval lies below the margin's negative."""
        return self.gain.high < -self.margin

    def __str__(self) -> str:
        said = "better" if self.better else "worse" if self.worse else "no difference"
        mean, low, high = self.gain
        return f"{self.measure} {mean:+.4f} [{low:+.4f}, {high:+.4f}]: {said} (margin {self.margin:g})"


def judge_against_base(metrics: Mapping[str, float], rule: PromoteConfig) -> Decision:
    """Part 2 of the rule, from the paired gains of metrics.json."""
    if "identity_gain_low" not in metrics:
        return Decision(False, "its scores have no interval against the untrained base; score it again", barred=True)
    pairs = int(metrics["pairs"])
    if pairs < rule.pictures:
        return Decision(False, f"{pairs} pairs of pictures are too few to tell; expected {rule.pictures}", barred=True)
    margins = {"identity": rule.identity_margin, "text": rule.base_text_margin, "drift": rule.base_drift_margin}
    differences = [
        Difference(measure, gain, margins[measure])
        for measure in margins
        if (gain := gain_over_base(metrics, measure)) is not None
    ]
    better = differences[0].better and not any(difference.worse for difference in differences)
    words = "better than the untrained base" if better else "not better than the base"
    return Decision(better, f"{words}: {_listed(differences)}, over {pairs} pairs of pictures", barred=not better)


def gain_over_base(metrics: Mapping[str, float], measure: str) -> Interval | None:
    """By how much the trained model is better in `identity`, `text` or `drift`, where less is better; None if not scored."""
    from svdiff.evaluation.intervals import Interval

    if f"{measure}_gain" not in metrics:
        return None
    mean, low, high = (metrics[f"{measure}_{part}"] for part in ("gain", "gain_low", "gain_high"))
    return Interval(-mean, -high, -low) if measure == "drift" else Interval(mean, low, high)


def judge(challenger: Scores, champion: Scores, rule: PromoteConfig, settings: ScoreConfig) -> Decision:
    """Parts 6 and 7 of the rule: compare two versions on the prompts and seeds that both have."""
    if challenger.evaluators != champion.evaluators:
        return Decision(False, "not comparable: the champion was scored by other evaluators")
    both = challenger.table.index.intersection(champion.table.index)
    if len(both) < rule.pictures:
        return Decision(
            False,
            f"not comparable: {len(both)} prompts and seeds in common with the champion, expected {rule.pictures}",
        )
    if (challenger.drift is None) != (champion.drift is None):
        return Decision(False, "not comparable: drift was measured for one of them only")
    measures = [
        ("identity", challenger.table["identity"], champion.table["identity"], rule.identity_margin),
        ("text", challenger.table["text_alignment"], champion.table["text_alignment"], rule.text_margin),
    ]
    if (
        challenger.drift is not None and champion.drift is not None
    ):  # less is better: the champion's minus the challenger's
        measures.append(("drift", champion.drift["identity"], challenger.drift["identity"], rule.drift_margin))
    differences = [Difference(name, _paired(a, b, settings), margin) for name, a, b, margin in measures]
    promoted = any(d.better for d in differences) and not any(d.worse for d in differences)
    return Decision(promoted, f"{_listed(differences)}, over {len(both)} pictures paired by prompt and seed")


def _paired(first: pd.Series[float], second: pd.Series[float], settings: ScoreConfig) -> Interval:
    """Mean of first − second over the prompts and seeds of both, with its 95 % interval."""
    from svdiff.evaluation.intervals import paired_gain

    both = first.index.intersection(second.index).sort_values()
    return paired_gain(first.loc[both], second.loc[both], resamples=settings.bootstrap, seed=settings.seed)


def _listed(differences: Iterable[Difference]) -> str:
    return "; ".join(map(str, differences))


def decide(tracking: Tracking, config: Config, results: Results, version: ModelVersion) -> Decision:
    """Apply the rule to `version`, once for each scoring and rule, which becomes its baseline, and move the aliases."""
    judged = _fingerprint(config, results)
    if version.tags.get(JUDGED) == judged:
        return Decision(champion_of(tracking, version.name) == int(version.version), version.tags[REASON])
    client, name, number = tracking.client, version.name, str(version.version)
    for measured in SHOWN:
        if measured in results.metrics:
            client.set_model_version_tag(name, number, measured, f"{results.metrics[measured]:.6f}")
    conditions = conditions_of_results(config, results)
    set_baseline(tracking, version, conditions, str(version.run_id))
    against_base = judge_against_base(results.metrics, config.promote)
    client.set_model_version_tag(name, number, BETTER_THAN_BASE, str(against_base.promoted).lower())
    decision = _decide_by_rule(tracking, config, version, against_base, results.scores, conditions)
    _apply(tracking, version, decision)
    # Written last: after a crash the version is judged again, to the same end.
    client.set_model_version_tag(name, number, JUDGED, judged)
    return decision


def _fingerprint(config: Config, results: Results) -> str:
    """Hash of what a decision rests on beside the champion: the scores and the rule."""
    rule = json.dumps([results.scores_sha256, config.promote.model_dump(), config.score.model_dump()], sort_keys=True)
    return hashlib.sha256(rule.encode()).hexdigest()


def decide_again(tracking: Tracking, config: Config, concept: str) -> Decision | None:
    """Apply the rule to the challenger of `concept` by the baselines on record; None if there is no challenger.

    For when the champion was measured anew: what could not be compared perhaps can be now.
    """
    with locked(tracking.locks / f"register-{concept}"):
        number = aliases_of(tracking, concept).get(CHALLENGER)
        if number is None:
            return None
        challenger = model_version(tracking, concept, number)
        conditions = baseline_conditions(challenger)
        if conditions is None:
            return None
        before = Decision(True, challenger.tags.get(REASON, ""))  # a challenger is better than the base
        scores = baseline_scores(tracking, challenger)
        decision = _decide_by_rule(tracking, config, challenger, before, scores, conditions)
        _apply(tracking, challenger, decision)
        return decision


def _apply(tracking: Tracking, version: ModelVersion, decision: Decision) -> None:
    client, name, number = tracking.client, version.name, str(version.version)
    if decision.promoted:
        promote(tracking, name, int(number), decision.reason)
        return
    client.set_model_version_tag(name, number, REASON, decision.reason)
    held = [alias for alias, holder in aliases_of(tracking, name).items() if holder == int(number)]
    if decision.barred:
        for alias in held:
            client.delete_registered_model_alias(name, alias)
    else:
        client.set_registered_model_alias(name, CHALLENGER, number)


def _decide_by_rule(
    tracking: Tracking,
    config: Config,
    version: ModelVersion,
    against_base: Decision,
    scores: Scores,
    conditions: Conditions,
) -> Decision:
    model = registered_model(tracking, version.name)
    for retired in (model.tags.get(RETIRED), version.tags.get(RETIRED)):
        if retired is not None:
            return Decision(False, f"retired ({retired}); `python -m flows retire --undo` takes it back", barred=True)
    is_champion = int(model.aliases.get(CHAMPION, -1)) == int(version.version)
    if is_champion and version.tags.get(REASON, "").startswith(BY_HAND):
        return Decision(True, version.tags[REASON])
    if not against_base.promoted:
        return against_base
    if CHAMPION not in model.aliases:
        return Decision(True, f"no champion to compare with; {against_base.reason}")
    number = int(model.aliases[CHAMPION])
    if number == int(version.version):
        return Decision(True, version.tags.get(REASON, "champion already"))
    if ROLLED_BACK in version.tags:
        return Decision(False, f"was rolled back ({version.tags[ROLLED_BACK]}); only promoted by hand", barred=True)
    champion = tracking.client.get_model_version(version.name, str(number))
    base = champion.tags.get("base_hash", "unknown")
    if base != version.tags.get("base_hash"):
        return Decision(
            True, f"champion version {number} belongs to another base ({base[:12]}…); {against_base.reason}"
        )
    theirs = baseline_conditions(champion)
    apart = [part for part in COMPARABLE if theirs and theirs[part] != conditions[part]]
    if apart:
        return Decision(
            False,
            f"not comparable: champion version {number} was scored with other {' and '.join(apart)}; re-evaluate it",
        )
    try:
        of_champion = baseline_scores(tracking, champion)
    except Exception as error:  # whatever an artifact store raises: a broken champion must not stop the others
        return Decision(
            False, f"not comparable: scores of champion version {number} cannot be read ({redacted(str(error))})"
        )
    decision = judge(scores, of_champion, config.promote, config.score)
    return Decision(decision.promoted, f"against champion version {number}: {decision.reason}")


def champion_of(tracking: Tracking, concept: str) -> int | None:
    """Version number of the champion, None if there is none. Raises SvdiffError for an unknown concept."""
    return aliases_of(tracking, concept).get(CHAMPION)


def aliases_of(tracking: Tracking, concept: str) -> dict[str, int]:
    """Aliases of a registered concept and their version numbers. Raises SvdiffError for an unknown concept."""
    return {alias: int(number) for alias, number in registered_model(tracking, concept).aliases.items()}


def promote(tracking: Tracking, concept: str, version: int, reason: str) -> None:
    """Make `version` the champion, whatever the rule would say, and record `reason` and the predecessor.

    Raises SvdiffError if there is no such version.
    """
    client, before = tracking.client, aliases_of(tracking, concept)
    model_version(tracking, concept, version)
    client.set_model_version_tag(concept, str(version), REASON, reason)
    client.set_model_version_tag(concept, str(version), "promoted_at", now())
    previous = before.get(CHAMPION)
    if previous is not None and previous != version:
        client.set_model_version_tag(concept, str(version), PREVIOUS, str(previous))
    client.set_registered_model_alias(concept, CHAMPION, str(version))
    if before.get(CHALLENGER) == version:
        client.delete_registered_model_alias(concept, CHALLENGER)


def now() -> str:
    """This second, in UTC, as tags say it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

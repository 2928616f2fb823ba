"""The rule by which a version becomes champion or challenger, and the moves of MLflow's aliases, with reasons.

The rule (`promote` in params.yaml), in the order in which it is asked:

1. The version or its concept is retired: it gets no alias.
2. There is no champion: the version becomes champion.
3. The version was rolled back: it stays challenger until somebody promotes it by hand.
4. The champion belongs to another base than the version: the version becomes champion, the old one no longer runs.
5. Both were scored by the same evaluators and sampler, against the same pictures of the concept, on prompts and
   seeds in common: the version becomes champion if, paired picture
   by picture, image alignment is better by more than `image_margin` and text alignment not worse by more than
   `text_margin`.
6. Otherwise it stays challenger, and the reason says what could not be compared.

The champion of a concept has the alias `champion`; the newest version that failed to become it, `challenger`. MLflow
has no history of aliases, so each champion names its predecessor in the tag `previous_champion`. What people may do beside
the rule is in `flows.registry.overrides`.
"""

from __future__ import annotations

import time
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
from flows.registry.tracking import Tracking
from svdiff.config import Config, PromoteConfig

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

JUDGED = "judged_scores"
PREVIOUS, ROLLED_BACK = "previous_champion", "rolled_back"
COMPARABLE = ("sampling", "pictures")  # parts of the conditions; `judge` looks at evaluators and prompts


@dataclass(frozen=True)
class Decision:
    """Whether a version is (or was made) champion, and why, in the words that stay with it."""

    promoted: bool
    reason: str
    barred: bool = False  # retired or rolled back: not even challenger


def judge(challenger: Scores, champion: Scores, rule: PromoteConfig) -> Decision:
    """Parts 5 and 6 of the rule: compare two versions on the prompts and seeds that both have."""
    if challenger.evaluators != champion.evaluators:
        return Decision(False, "not comparable: the champion was scored by other evaluators")
    both = challenger.table.join(champion.table, how="inner", rsuffix="_champion")
    if both.empty:
        return Decision(False, "not comparable: no prompt and seed in common with the champion")
    image = float((both["image_alignment"] - both["image_alignment_champion"]).mean())
    text = float((both["text_alignment"] - both["text_alignment_champion"]).mean())
    better, no_worse = image > rule.image_margin, text >= -rule.text_margin
    return Decision(
        better and no_worse,
        f"image alignment {image:+.4f} ({'above' if better else 'not above'} margin {rule.image_margin:g}), "
        f"text alignment {text:+.4f} ({'within' if no_worse else 'beyond'} tolerance {rule.text_margin:g}), "
        f"over {len(both)} pictures paired by prompt and seed",
    )


def decide(tracking: Tracking, config: Config, results: Results, version: ModelVersion) -> Decision:
    """Apply the rule to `version`, once for each scoring of it, which becomes its baseline, and move the aliases."""
    if version.tags.get(JUDGED) == results.scores_sha256:
        return Decision(champion_of(tracking, version.name) == int(version.version), version.tags[REASON])
    client, name, number = tracking.client, version.name, str(version.version)
    for measured in ("image_alignment", "text_alignment"):
        if measured in results.metrics:
            client.set_model_version_tag(name, number, measured, f"{results.metrics[measured]:.6f}")
    conditions = conditions_of_results(config, results)
    set_baseline(tracking, version, conditions, str(version.run_id))
    decision = _decide_by_rule(tracking, config.promote, version, Scores.read(results.folder("score")), conditions)
    _apply(tracking, version, decision)
    # Written last: after a crash the version is judged again, to the same end.
    client.set_model_version_tag(name, number, JUDGED, results.scores_sha256)
    return decision


def decide_again(tracking: Tracking, rule: PromoteConfig, concept: str) -> Decision | None:
    """Apply the rule to the challenger of `concept` by the baselines on record; None if there is no challenger.

    For when the champion was measured anew: what could not be compared perhaps can be now.
    """
    number = aliases_of(tracking, concept).get(CHALLENGER)
    if number is None:
        return None
    challenger = model_version(tracking, concept, number)
    conditions = baseline_conditions(challenger)
    if conditions is None:
        return None
    decision = _decide_by_rule(tracking, rule, challenger, baseline_scores(tracking, challenger), conditions)
    _apply(tracking, challenger, decision)
    return decision


def _apply(tracking: Tracking, version: ModelVersion, decision: Decision) -> None:
    name, number = version.name, str(version.version)
    if decision.promoted:
        promote(tracking, name, int(number), decision.reason)
        return
    tracking.client.set_model_version_tag(name, number, REASON, decision.reason)
    if not decision.barred:
        tracking.client.set_registered_model_alias(name, CHALLENGER, number)


def _decide_by_rule(
    tracking: Tracking, rule: PromoteConfig, version: ModelVersion, scores: Scores, conditions: Conditions
) -> Decision:
    model = registered_model(tracking, version.name)
    for retired in (model.tags.get(RETIRED), version.tags.get(RETIRED)):
        if retired is not None:
            return Decision(False, f"retired ({retired}); `python -m flows retire --undo` takes it back", barred=True)
    if CHAMPION not in model.aliases:
        return Decision(True, "no champion to compare with")
    number = int(model.aliases[CHAMPION])
    if number == int(version.version):
        return Decision(True, version.tags.get(REASON, "champion already"))
    if ROLLED_BACK in version.tags:
        return Decision(False, f"was rolled back ({version.tags[ROLLED_BACK]}); only promoted by hand", barred=True)
    champion = tracking.client.get_model_version(version.name, str(number))
    base = champion.tags.get("base_hash", "unknown")
    if base != version.tags.get("base_hash"):
        return Decision(True, f"champion version {number} belongs to another base ({base[:12]}…)")
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
        return Decision(False, f"not comparable: scores of champion version {number} cannot be read ({error})")
    decision = judge(scores, of_champion, rule)
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

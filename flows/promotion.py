"""Champions and challengers: the written rule, and the moves of aliases with their reasons.

The rule (`promote` in params.yaml), in the order in which it is asked:

1. There is no champion: the version becomes champion.
2. The version was rolled back by hand: it stays what it is until somebody promotes it by hand.
3. The champion belongs to another base than the version: the version becomes champion, the old one no longer runs.
4. Both were scored by the same evaluators, on pictures in common: the version becomes champion if, paired picture
   by picture, image alignment is better by more than `image_margin` and text alignment not worse by more than
   `text_margin`.
5. Otherwise it stays challenger, and the reason says what could not be compared.

The champion of a concept has the alias `champion`; the newest version that failed to become it, `challenger`. MLflow
keeps no history of aliases, so each champion remembers its predecessor in the tag `previous_champion`.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.results import Results, Scores
from flows.tracking import Tracking, locked
from svdiff.config import PromoteConfig
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
REASON, JUDGED = "promotion_reason", "judged_scores"
PREVIOUS, ROLLED_BACK = "previous_champion", "rolled_back"


@dataclass(frozen=True)
class Verdict:
    """Whether a version is (or was made) champion, and why, in the words that stay with it."""

    promoted: bool
    reason: str


def judge(challenger: Scores, champion: Scores, rule: PromoteConfig) -> Verdict:
    """Parts 4 and 5 of the rule: compare two versions on the prompts and seeds that both have."""
    if challenger.evaluators != champion.evaluators:
        return Verdict(False, "not comparable: the champion was scored by other evaluators")
    both = challenger.table.join(champion.table, how="inner", rsuffix="_champion")
    if both.empty:
        return Verdict(False, "not comparable: no prompt and seed in common with the champion")
    image = float((both["image_alignment"] - both["image_alignment_champion"]).mean())
    text = float((both["text_alignment"] - both["text_alignment_champion"]).mean())
    better, kept = image > rule.image_margin, text >= -rule.text_margin
    return Verdict(
        better and kept,
        f"image alignment {image:+.4f} ({'above' if better else 'not above'} margin {rule.image_margin:g}), "
        f"text alignment {text:+.4f} ({'within' if kept else 'beyond'} tolerance {rule.text_margin:g}), "
        f"over {len(both)} pictures paired by prompt and seed",
    )


def decide(tracking: Tracking, rule: PromoteConfig, results: Results, version: ModelVersion) -> Verdict:
    """Apply the rule to `version`, once for each scoring of it, and move the aliases."""
    if version.tags.get(JUDGED) == results.scores_sha256:
        return Verdict(champion_of(tracking, version.name) == int(version.version), version.tags[REASON])
    client, name, number = tracking.client, version.name, str(version.version)
    for measure in ("image_alignment", "text_alignment"):
        if measure in results.metrics:
            client.set_model_version_tag(name, number, measure, f"{results.metrics[measure]:.6f}")
    verdict = _verdict(tracking, rule, results, version)
    if verdict.promoted:
        promote(tracking, name, int(number), verdict.reason)
    else:
        client.set_model_version_tag(name, number, REASON, verdict.reason)
        client.set_registered_model_alias(name, CHALLENGER, number)
    # Written last: after a crash the version is judged again, to the same end.
    client.set_model_version_tag(name, number, JUDGED, results.scores_sha256)
    return verdict


def _verdict(tracking: Tracking, rule: PromoteConfig, results: Results, version: ModelVersion) -> Verdict:
    number = champion_of(tracking, version.name)
    if number is None:
        return Verdict(True, "first version, no champion to compare with")
    if number == int(version.version):
        return Verdict(True, version.tags.get(REASON, "champion already"))
    if ROLLED_BACK in version.tags:
        return Verdict(False, f"was rolled back ({version.tags[ROLLED_BACK]}); only promoted by hand")
    champion = tracking.client.get_model_version(version.name, str(number))
    base = champion.tags.get("base_hash", "unknown")
    if base != results.base_hash:
        return Verdict(True, f"champion version {number} belongs to another base ({base[:12]}…)")
    try:
        scores = _logged_scores(tracking, champion)
    except Exception as error:  # whatever an artifact store raises: a broken champion must not stop the others
        return Verdict(False, f"not comparable: scores of champion version {number} cannot be read ({error})")
    verdict = judge(Scores.read(results.folder("score")), scores, rule)
    return Verdict(verdict.promoted, f"against champion version {number}: {verdict.reason}")


def _logged_scores(tracking: Tracking, version: ModelVersion) -> Scores:
    if version.run_id is None:
        raise SvdiffError("it has no run")
    with tempfile.TemporaryDirectory() as folder:
        return Scores.read(Path(tracking.client.download_artifacts(version.run_id, "scores", folder)))


def champion_of(tracking: Tracking, concept: str) -> int | None:
    """Version number of the champion, None if there is none. Raises SvdiffError for an unknown concept."""
    return aliases_of(tracking, concept).get(CHAMPION)


def aliases_of(tracking: Tracking, concept: str) -> dict[str, int]:
    """Aliases of a registered concept and their version numbers."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = tracking.client.get_registered_model(concept).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SvdiffError(
            f"no concept '{concept}' in the registry at {tracking.uri}; `python -m flows list` shows those "
            f"that are, `dvc repro register@{concept}` registers it"
        ) from None
    return {alias: int(number) for alias, number in aliases.items()}


def promote(tracking: Tracking, concept: str, version: int, reason: str) -> None:
    """Make `version` the champion, whatever the rule would say, and record `reason` and the predecessor.

    Raises SvdiffError if there is no such version.
    """
    client, before = tracking.client, aliases_of(tracking, concept)
    _existing(tracking, concept, version)
    client.set_model_version_tag(concept, str(version), REASON, reason)
    client.set_model_version_tag(concept, str(version), "promoted_at", _now())
    previous = before.get(CHAMPION)
    if previous is not None and previous != version:
        client.set_model_version_tag(concept, str(version), PREVIOUS, str(previous))
    client.set_registered_model_alias(concept, CHAMPION, str(version))
    if before.get(CHALLENGER) == version:
        client.delete_registered_model_alias(concept, CHALLENGER)


def promote_by_hand(tracking: Tracking, concept: str, version: int | None, reason: str) -> int:
    """Promote `version`, by default the challenger, for a person's `reason`; return its number."""
    with locked(tracking.locks / f"register-{concept}"):
        number = version if version is not None else aliases_of(tracking, concept).get(CHALLENGER)
        if number is None:
            raise SvdiffError(f"'{concept}' has no challenger to promote; name a version with --version")
        chosen = _existing(tracking, concept, number)
        if champion_of(tracking, concept) == number:
            raise SvdiffError(f"version {number} of '{concept}' is the champion already")
        if ROLLED_BACK in chosen.tags:
            tracking.client.delete_model_version_tag(concept, str(number), ROLLED_BACK)
        promote(tracking, concept, number, f"by hand: {reason}")
    return number


def rollback(tracking: Tracking, concept: str, reason: str) -> tuple[int, int]:
    """Put the previous champion back and bar the present one from automatic promotion.

    Returns:
        Version numbers of the champion that was and of the one that is now.

    Raises:
        SvdiffError: no champion, no predecessor on record, or the predecessor was deleted.
    """
    with locked(tracking.locks / f"register-{concept}"):
        client, number = tracking.client, champion_of(tracking, concept)
        if number is None:
            raise SvdiffError(f"'{concept}' has no champion to roll back")
        previous = client.get_model_version(concept, str(number)).tags.get(PREVIOUS)
        if previous is None:
            raise SvdiffError(
                f"champion version {number} of '{concept}' has no predecessor on record; promote another by hand"
            )
        _existing(tracking, concept, int(previous))
        client.set_model_version_tag(concept, str(number), ROLLED_BACK, f"{_now()}: {reason}")
        client.set_registered_model_alias(concept, CHAMPION, str(previous))
    return number, int(previous)


def _existing(tracking: Tracking, concept: str, version: int) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client.get_model_version(concept, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SvdiffError(f"'{concept}' has no version {version}; it was deleted, or never there") from None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

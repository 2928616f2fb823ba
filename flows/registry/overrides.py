"""What people decide beside the rule: promote, roll back, retire, reinstate, each for a reason that stays on record.

A version that was rolled back is never promoted by the rule again. What is retired keeps its versions and artifacts
but has no alias: listings and re-evaluations pass it by, `models:/<concept>@champion` ends, and `reinstate` undoes it all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from flows.registry.concepts import (
    CHALLENGER,
    CHAMPION,
    REASON,
    RETIRED,
    RegisteredConcept,
    model_version,
    read_concept,
)
from flows.registry.promotion import BY_HAND, PREVIOUS, ROLLED_BACK, now, promote
from flows.registry.tracking import locked
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from flows.registry.tracking import Tracking

ALIASES = "retired_aliases"  # tag: what a retired concept or version was, for its return


def promote_manually(tracking: Tracking, concept: str, version: int | None, reason: str) -> int:
    """Promote `version`, by default the challenger, for a person's `reason`; return its number.

    Raises SvdiffError for a version that is not there, is champion already or is retired.
    """
    with locked(tracking.locks / f"register-{concept}"):
        found = read_concept(tracking, concept)
        number = version if version is not None else found.aliases.get(CHALLENGER)
        if number is None:
            raise SvdiffError(f"'{concept}' has no challenger to promote; name a version with --version")
        chosen = model_version(tracking, concept, number)
        _refuse_retired(found, number)
        if found.aliases.get(CHAMPION) == number:
            raise SvdiffError(f"version {number} of '{concept}' is the champion already")
        if ROLLED_BACK in chosen.tags:
            tracking.client.delete_model_version_tag(concept, str(number), ROLLED_BACK)
        promote(tracking, concept, number, f"{BY_HAND}: {reason}")
    return number


def rollback(
    tracking: Tracking, concept: str, reason: str, *, expected: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Put the previous champion back and bar the present one from automatic promotion.

    Args:
        tracking: the registry.
        concept: whose champion.
        reason: stays with both versions.
        expected: the champion and its predecessor that the decision was made on; default whichever they are.

    Returns:
        Version numbers of the champion that was and of the one that is now.

    Raises:
        SvdiffError: no champion, no usable predecessor on record, the predecessor was deleted, or others than expected.
    """
    with locked(tracking.locks / f"register-{concept}"):
        found = read_concept(tracking, concept)
        number = found.aliases.get(CHAMPION)
        if number is None:
            raise SvdiffError(f"'{concept}' has no champion to roll back")
        previous = predecessor(found, number)
        if previous is None:
            raise SvdiffError(
                f"champion version {number} of '{concept}' has no predecessor on record that could come back; "
                "promote another by hand"
            )
        if expected and expected != (number, previous):
            raise SvdiffError(
                f"'{concept}' has champion version {number} with predecessor {previous} by now; expected {expected[0]} with "
                f"{expected[1]}: decide again"
            )
        model_version(tracking, concept, previous)
        client = tracking.client
        client.set_model_version_tag(concept, str(number), ROLLED_BACK, f"{now()}: {reason}")
        client.set_model_version_tag(concept, str(number), REASON, f"rolled back to version {previous}: {reason}")
        client.set_model_version_tag(concept, str(previous), REASON, f"put back after version {number}: {reason}")
        client.set_registered_model_alias(concept, CHAMPION, str(previous))
        if found.aliases.get(CHALLENGER) == previous:
            client.delete_registered_model_alias(concept, CHALLENGER)
    return number, previous


def predecessor(concept: RegisteredConcept, number: int) -> int | None:
    """The last champion before version `number` that was neither rolled back nor retired; it may be deleted by now."""
    seen = {number}
    while True:
        link = concept.versions[number].tags.get(PREVIOUS)
        if link is None or int(link) in seen:
            return None
        number = int(link)
        seen.add(number)
        version = concept.versions.get(number)
        if version is None or not {ROLLED_BACK, RETIRED} & set(version.tags):
            return number


def retire(tracking: Tracking, concept: str, version: int | None, reason: str) -> list[str]:
    """Take a concept, or one version of it, out of use; return the aliases that it had.

    Raises SvdiffError for what is not there, or is retired already.
    """
    with locked(tracking.locks / f"register-{concept}"):
        found = read_concept(tracking, concept)
        if version is not None:
            model_version(tracking, concept, version)
        _refuse_retired(found, version)
        aliases = {a: n for a, n in found.aliases.items() if version is None or n == version}
        # The tag comes first: between it and the last alias, registration already leaves the concept alone.
        _tag(tracking, concept, version, ALIASES, json.dumps(aliases))
        _tag(tracking, concept, version, RETIRED, f"{now()}: {reason}")
        for alias in aliases:
            tracking.client.delete_registered_model_alias(concept, alias)
    return sorted(aliases)


def reinstate(tracking: Tracking, concept: str, version: int | None) -> list[str]:
    """Undo `retire`; return the aliases that were given back: those that nobody has taken since.

    Raises SvdiffError for what is not retired.
    """
    with locked(tracking.locks / f"register-{concept}"):
        found = read_concept(tracking, concept)
        tags = found.tags if version is None else model_version(tracking, concept, version).tags
        if RETIRED not in tags:
            raise SvdiffError(f"{_name(concept, version)} is not retired")
        had = {alias: int(number) for alias, number in json.loads(tags.get(ALIASES, "{}")).items()}
        back = {a: n for a, n in had.items() if a not in found.aliases and n in found.versions}
        for alias, number in back.items():
            tracking.client.set_registered_model_alias(concept, alias, str(number))
        for key in (RETIRED, ALIASES):
            if version is None:
                tracking.client.delete_registered_model_tag(concept, key)
            else:
                tracking.client.delete_model_version_tag(concept, str(version), key)
    return sorted(back)


def _refuse_retired(concept: RegisteredConcept, version: int | None) -> None:
    retired = RETIRED in concept.versions[version].tags if version in concept.versions else False
    for name, is_retired in ((_name(concept.name, version), retired), (_name(concept.name, None), concept.retired)):
        if is_retired:
            raise SvdiffError(f"{name} is retired; take it back into use with `python -m flows retire --undo`")


def _tag(tracking: Tracking, concept: str, version: int | None, key: str, value: str) -> None:
    if version is None:
        tracking.client.set_registered_model_tag(concept, key, value)
    else:
        tracking.client.set_model_version_tag(concept, str(version), key, value)


def _name(concept: str, version: int | None) -> str:
    return f"'{concept}'" if version is None else f"version {version} of '{concept}'"

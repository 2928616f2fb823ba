"""What a request may name as its `model`: registered versions by alias or number, alone or mixed with weights."""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flows.monitoring.measurement import entry_of
from flows.registry.concepts import CHAMPION, RETIRED, RegisteredConcept, read_concepts
from flows.registry.promotion import BETTER_THAN_BASE, ROLLED_BACK
from svdiff.errors import SvdiffError
from svdiff.secrets import redacted
from svdiff.words import NAME, did_you_mean

if TYPE_CHECKING:
    from flows.registry.tracking import Tracking

BASE = "base"  # the model without any concept
STRONGEST = 10.0  # weights beyond draw noise alone
PART = re.compile(rf"(?P<concept>{NAME.pattern})(?:@(?P<which>[^:@]+))?(?::(?P<weight>[^:@]+))?")

logger = logging.getLogger(__name__)


class Refusal(SvdiffError):
    """What a request asks for and does not get: the message, and what else OpenAI's error form has."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Version:
    """One registered version, as far as drawing needs it."""

    concept: str
    number: int
    delta: str  # SHA-256 of its file
    subject: str  # "sks dog"
    created: int  # seconds since 1970

    @property
    def name(self) -> str:
        """'teapot@3'."""
        return f"{self.concept}@{self.number}"


Mix = tuple[tuple[Version, float], ...]
"""Versions and their weights; nothing is the base."""


def written(mix: Mix) -> str:
    """The mix as a `model` that will always mean the same: 'teapot@3:0.7+cat@1:0.3'."""
    return "+".join(version.name + ("" if weight == 1 else f":{weight:g}") for version, weight in mix) or BASE


@dataclass(frozen=True)
class ServedConcept:
    """One concept: its versions that can be drawn, why others cannot, and what its aliases stand for."""

    aliases: dict[str, int]
    versions: dict[int, Version]
    withdrawn: dict[int, str]


@dataclass(frozen=True)
class Models:
    """Everything that can be drawn on one base, as the registry had it at one moment."""

    concepts: dict[str, ServedConcept]
    read_at: float = field(default_factory=time.monotonic)

    @property
    def named(self) -> dict[str, Version]:
        """Every alias that can be asked for: {'teapot@champion': …}."""
        return {
            f"{name}@{alias}": concept.versions[number]
            for name, concept in self.concepts.items()
            for alias, number in concept.aliases.items()
            if number in concept.versions
        }

    def mix(self, model: str) -> Mix:
        """The versions that `model` means now. Raises Refusal for what is not written so, or is not there."""
        if model == BASE:
            return ()
        parts = [self._part(part.strip(), model) for part in model.split("+")]
        if len({version.delta for version, _ in parts}) < len(parts):
            raise Refusal(f"model '{model}' names one version twice: give it once, with one weight", param="model")
        return tuple(parts)

    def _part(self, text: str, model: str) -> tuple[Version, float]:
        found = PART.fullmatch(text)
        if not found:
            raise Refusal(
                f"model '{model}': expected CONCEPT, CONCEPT@ALIAS or CONCEPT@VERSION, several as in teapot:0.7+cat:0.3, "
                f"or '{BASE}'",
                param="model",
            )
        return self.version(found["concept"], found["which"] or CHAMPION), _weight(found["weight"] or "1", model)

    def version(self, name: str, which: str) -> Version:
        """One version by its concept's name and its alias or number. Raises Refusal if it cannot be drawn."""
        concept = self.concepts.get(name)
        if concept is None:
            raise _missing(f"no concept '{name}' is registered{did_you_mean(name, self.concepts)}")
        number = int(which) if which.isdecimal() else concept.aliases.get(which, -1)
        if number in concept.withdrawn:
            raise _missing(f"version {number} of '{name}' is not served: {concept.withdrawn[number]}")
        if number not in concept.versions:
            known = ", ".join([*sorted(concept.aliases), *map(str, sorted(concept.versions))]) or "none that is served"
            raise _missing(f"'{name}' has no version '{which}'; there are: {known}")
        return concept.versions[number]


def _missing(message: str) -> Refusal:
    return Refusal(message, status=404, param="model", code="model_not_found")


def _weight(text: str, model: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not abs(weight) <= STRONGEST:
        raise Refusal(
            f"model '{model}': weight '{text}' is not a number from {-STRONGEST:g} to {STRONGEST:g}", param="model"
        )
    return weight


def read_models(tracking: Tracking, base_hash: str) -> Models:
    """What the registry has now for the base with these weights."""
    return Models({concept.name: _served(concept, base_hash) for concept in read_concepts(tracking)})


def _served(concept: RegisteredConcept, base_hash: str) -> ServedConcept:
    withdrawn = {number: why for number in concept.versions if (why := _withdrawn(concept, number, base_hash))}
    versions = {number: _version(concept, number) for number in concept.versions if number not in withdrawn}
    return ServedConcept(concept.aliases, versions, withdrawn)


def _withdrawn(concept: RegisteredConcept, number: int, base_hash: str) -> str | None:
    tags = concept.versions[number].tags
    for where in (concept.tags, tags):
        if RETIRED in where:
            return f"retired ({where[RETIRED]})"
    if ROLLED_BACK in tags:
        return f"rolled back ({tags[ROLLED_BACK]})"
    if tags.get(BETTER_THAN_BASE) == "false" and number not in concept.aliases.values():
        return "it was not better than the untrained base"
    if "delta_sha256" not in tags:
        return "it has no delta of ours"
    if tags.get("base_hash") != base_hash:
        return f"trained on the base {tags.get('base_hash', 'unknown')[:12]}…, this server has {base_hash[:12]}…"
    return None


def _version(concept: RegisteredConcept, number: int) -> Version:
    version = concept.versions[number]
    created = int(version.creation_timestamp or 0) // 1000
    return Version(concept.name, number, version.tags["delta_sha256"], entry_of(version).subject, created)


class Watch:
    """`models` is what the registry had last: at once, and after `start` read again and again in the background.

    While the registry cannot be read, the last that was known stays.
    """

    def __init__(self, read: Callable[[], Models], seconds: float, follow: Callable[[Models], None] | None = None):
        """`follow` is given every new state before it is `models`: what was promoted is loaded before it is asked for."""
        self._read, self._seconds, self._follow = read, seconds, follow
        self._stop = threading.Event()
        self.models = self._next()

    def start(self) -> Watch:
        """Read on, until `stop`."""
        threading.Thread(target=self._run, name="registry", daemon=True).start()
        return self

    def stop(self) -> None:
        """End the reading."""
        self._stop.set()

    def _next(self) -> Models:
        models = self._read()
        if self._follow:
            self._follow(models)
        return models

    def _run(self) -> None:
        pause = self._seconds
        while not self._stop.wait(pause):
            began = time.monotonic()
            try:
                self.models = self._next()
            except Exception as error:  # whatever a store that is away raises
                logger.warning("the registry cannot be read, what was known is served: %s", redacted(str(error)))
            # A registry so large that reading it takes long is read less often.
            pause = max(self._seconds, 5 * (time.monotonic() - began))

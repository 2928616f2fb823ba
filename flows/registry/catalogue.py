"""The registry as a whole: every concept with its versions and aliases, in two searches however many there are.

MLflow's search for versions knows no aliases and its search for models no tags of versions, so both are asked and joined
here; of a SQLite file `flows.registry.snapshot` reads as much in a moment. What a concept's life leaves behind is in tags, see
`flows.registry.promotion`, `flows.registry.overrides` and `flows.monitoring.round`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flows.registry import snapshot
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from flows.registry.store import Tracking

CHAMPION, CHALLENGER = "champion", "challenger"
RETIRED = "retired"  # tag of a concept or a version: when and why
REASON = "promotion_reason"
PAGE = 1000  # entries a request; MLflow takes no more for registered models


@dataclass(frozen=True)
class Registered:
    """One registered concept."""

    name: str
    aliases: dict[str, int]
    tags: dict[str, str]
    versions: dict[int, Any]  # MLflow's ModelVersion, or Version of `flows.registry.snapshot`

    @property
    def retired(self) -> bool:
        """Whether the whole concept is out of use."""
        return RETIRED in self.tags

    @property
    def champion(self) -> Any | None:
        """The version in use, None if there is none."""
        return self.versions.get(self.aliases.get(CHAMPION, -1))


def read_catalogue(tracking: Tracking, names: Iterable[str] | None = None) -> list[Registered]:
    """All registered concepts by name, or those called `names`. Raises SvdiffError for a name that is not there."""
    found = _snapshot(tracking)
    if found is None:
        found = _search(tracking)
    chosen = sorted(found) if names is None else list(dict.fromkeys(names))
    for name in chosen:
        if name not in found:
            raise SvdiffError(_unknown(tracking, name))
    return [found[name] for name in chosen]


def _snapshot(tracking: Tracking) -> dict[str, Registered] | None:
    """The catalogue of a SQLite file; None where MLflow must be asked."""
    models = snapshot.read(tracking.database) if tracking.database else None
    if models is None:
        return None
    return {m.name: Registered(m.name, m.aliases, m.tags, m.versions) for m in models.values()}


def _search(tracking: Tracking) -> dict[str, Registered]:
    """The catalogue of any store, by MLflow."""
    versions: dict[str, dict[int, ModelVersion]] = {}
    for version in _all(tracking.client.search_model_versions):
        versions.setdefault(version.name, {})[int(version.version)] = version
    return {
        model.name: Registered(
            model.name,
            {alias: int(number) for alias, number in model.aliases.items()},
            dict(model.tags),
            versions.get(model.name, {}),
        )
        for model in _all(tracking.client.search_registered_models)
    }


def read_concept(tracking: Tracking, name: str) -> Registered:
    """One concept, without reading the others. Raises SvdiffError if it is not registered."""
    model = registered_model(tracking, name)
    found = tracking.client.search_model_versions(f"name = '{name}'")
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    return Registered(name, aliases, dict(model.tags), {int(v.version): v for v in found})


def registered_model(tracking: Tracking, name: str) -> RegisteredModel:
    """MLflow's record of a concept. Raises SvdiffError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SvdiffError(_unknown(tracking, name)) from None


def model_version(tracking: Tracking, concept: str, number: int) -> ModelVersion:
    """One version. Raises SvdiffError if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return tracking.client.get_model_version(concept, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SvdiffError(f"'{concept}' has no version {number}; it was deleted, or never there") from None


def model_id(version: ModelVersion) -> str:
    """Id of the stored model behind a version: MLflow's databases keep it in the source alone.

    Raises SvdiffError for a version that was not made from a stored model.
    """
    scheme, _, name = str(version.source).partition(":/")
    if scheme != "models" or "/" in name:
        raise SvdiffError(f"'{version.name}' version {version.version} comes from {version.source}, no stored model")
    return name


def _unknown(tracking: Tracking, concept: str) -> str:
    return (
        f"no concept '{concept}' in the registry at {tracking.uri}; `python -m flows list` shows those "
        f"that are, `dvc repro register@{concept}` registers it"
    )


@dataclass(frozen=True)
class Entry:
    """One registered concept as `python -m flows list` shows it; numbers are None where there is none."""

    concept: str
    champion: int | None
    challenger: int | None
    versions: int
    image_alignment: float | None
    text_alignment: float | None
    base_hash: str
    reason: str
    reevaluation: str
    retired: str


def list_concepts(tracking: Tracking, *, retired: bool = False) -> list[Entry]:
    """Every registered concept with its champion's scores; those out of use only if `retired` says so."""
    return [_entry(concept) for concept in read_catalogue(tracking) if retired or not concept.retired]


def _entry(concept: Registered) -> Entry:
    tags = concept.champion.tags if concept.champion else {}
    return Entry(
        concept.name,
        concept.aliases.get(CHAMPION),
        concept.aliases.get(CHALLENGER),
        len(concept.versions),
        _number(tags, "image_alignment"),
        _number(tags, "text_alignment"),
        tags.get("base_hash", ""),
        tags.get(REASON, ""),
        tags.get("reevaluation", ""),
        concept.tags.get(RETIRED, ""),
    )


def find(tracking: Tracking, which: str) -> ModelVersion:
    """The version that `which` names: CONCEPT (its champion), CONCEPT@VERSION or CONCEPT@ALIAS.

    Raises SvdiffError naming what is not there.
    """
    name, _, wanted = which.partition("@")
    concept = read_concept(tracking, name)
    number = int(wanted) if wanted.isdigit() else concept.aliases.get(wanted or CHAMPION)
    if number is None or number not in concept.versions:
        known = ", ".join([*map(str, sorted(concept.versions)), *sorted(concept.aliases)])
        raise SvdiffError(f"'{name}' has no version '{wanted or CHAMPION}'; there are: {known}")
    return concept.versions[number]


def _number(tags: dict[str, str], key: str) -> float | None:
    return float(tags[key]) if key in tags else None


def _all(search: Callable[..., Any]) -> list[Any]:
    found, token = [], None
    while True:
        page = search(max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found

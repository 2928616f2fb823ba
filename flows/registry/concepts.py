"""All registered concepts with their versions and aliases, in two searches however many there are.

MLflow's search for versions knows no aliases, its search for models no tags of versions: both are asked, and joined here.
Reading MLflow's SQLite file directly would list in 0.2 s instead of about 1.5 s (most of it loading MLflow), at the price of
depending on its private tables: not worth it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.registry.tracking import all_pages
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file
from svdiff.words import check_name

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

    from flows.registry.tracking import Tracking

CHAMPION, CHALLENGER = "champion", "challenger"
RETIRED = "retired"  # tag of a concept or a version: when and why
REASON = "promotion_reason"
# Entries a request. MLflow takes no more for registered models; of versions it sorts all for each page.
MODELS, VERSIONS = 1_000, 20_000
FEW = 20  # names that are read one by one, however many others there are


class BrokenVersion(SvdiffError):
    """A registered version that cannot be used as it was registered."""


@dataclass(frozen=True)
class RegisteredConcept:
    """One registered concept."""

    name: str
    aliases: dict[str, int]
    tags: dict[str, str]
    versions: dict[int, ModelVersion]

    @property
    def retired(self) -> bool:
        """Whether the whole concept is out of use."""
        return RETIRED in self.tags

    @property
    def champion(self) -> ModelVersion | None:
        """The version in use, None if there is none."""
        return self.versions.get(self.aliases.get(CHAMPION, -1))


def _concept(model: RegisteredModel, versions: Iterable[ModelVersion]) -> RegisteredConcept:
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    return RegisteredConcept(model.name, aliases, dict(model.tags), {int(v.version): v for v in versions})


def read_concepts(tracking: Tracking, names: Iterable[str] | None = None) -> list[RegisteredConcept]:
    """All registered concepts by name, or those called `names`. Raises SvdiffError for a name that is not there."""
    wanted = None if names is None else list(dict.fromkeys(names))
    if wanted is not None and len(wanted) <= FEW:
        return [read_concept(tracking, name) for name in wanted]
    versions: dict[str, list[ModelVersion]] = {}
    for version in all_pages(tracking.client.search_model_versions, max_results=VERSIONS):
        versions.setdefault(version.name, []).append(version)
    models = {model.name: model for model in all_pages(tracking.client.search_registered_models, max_results=MODELS)}
    chosen = sorted(models) if wanted is None else wanted
    for name in chosen:
        if name not in models:
            raise SvdiffError(_unknown(tracking, name))
    return [_concept(models[name], versions.get(name, [])) for name in chosen]


def read_concept(tracking: Tracking, name: str) -> RegisteredConcept:
    """One concept, without reading the others. Raises SvdiffError if it is not registered."""
    model = registered_model(tracking, name)
    return _concept(model, tracking.client.search_model_versions(f"name = '{name}'"))


@contextmanager
def _if_missing(message: str) -> Iterator[None]:
    """Raise SvdiffError with `message` where MLflow says that something does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise SvdiffError(message) from None


def registered_model(tracking: Tracking, name: str) -> RegisteredModel:
    """MLflow's record of a concept. Raises SvdiffError if there is none, or for what is no name."""
    try:
        check_name(name)
    except ValueError as error:
        raise SvdiffError(f"{error}; a version of one is teapot@2 or teapot@{CHAMPION}") from None
    with _if_missing(_unknown(tracking, name)):
        return tracking.client.get_registered_model(name)


def model_version(tracking: Tracking, concept: str, number: int) -> ModelVersion:
    """One version. Raises SvdiffError if there is none."""
    with _if_missing(f"'{concept}' has no version {number}; it was deleted, or never there"):
        return tracking.client.get_model_version(concept, str(number))


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
        f"that are, `python -m flows register {concept}` registers what was trained"
    )


@dataclass(frozen=True)
class ListedConcept:
    """One registered concept as `list` shows it, with its champion's scores; None where there is none."""

    concept: str
    champion: int | None
    challenger: int | None
    versions: int
    identity: float | None
    text_alignment: float | None
    drift_identity: float | None
    base_hash: str
    reason: str
    reevaluation: str
    retired: str


def list_concepts(tracking: Tracking, *, retired: bool = False) -> list[ListedConcept]:
    """Every registered concept with its champion's scores; those out of use only if `retired` says so."""
    return [_listed(concept) for concept in read_concepts(tracking) if retired or not concept.retired]


def _listed(concept: RegisteredConcept) -> ListedConcept:
    tags = concept.champion.tags if concept.champion else {}
    identity, text, drift = (
        float(tags[key]) if key in tags else None for key in ("identity", "text_alignment", "drift_identity")
    )
    return ListedConcept(
        concept.name,
        concept.aliases.get(CHAMPION),
        concept.aliases.get(CHALLENGER),
        len(concept.versions),
        identity,
        text,
        drift,
        base_hash=tags.get("base_hash", ""),
        reason=tags.get(REASON, ""),
        reevaluation=tags.get("reevaluation", ""),
        retired=concept.tags.get(RETIRED, ""),
    )


def find(tracking: Tracking, which: str) -> ModelVersion:
    """The version that `which` names: CONCEPT (its champion), CONCEPT@VERSION or CONCEPT@ALIAS.

    Raises SvdiffError naming what is not there.
    """
    name, _, wanted = which.partition("@")
    concept = read_concept(tracking, name)
    number = int(wanted) if wanted.isdecimal() else concept.aliases.get(wanted or CHAMPION)
    if number is None or number not in concept.versions:
        known = ", ".join([*map(str, sorted(concept.versions)), *sorted(concept.aliases)])
        raise SvdiffError(f"'{name}' has no version '{wanted or CHAMPION}'; there are: {known}")
    return concept.versions[number]


def fetch(tracking: Tracking, version: ModelVersion, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The delta's file, copied into `folder`, and concept.json of a version.

    Raises BrokenVersion if they are gone or are not what was registered. What an unreachable store raises passes through: it
    says nothing about the version.
    """
    from mlflow.artifacts import download_artifacts, list_artifacts

    where = f"models:/{version.name}/{version.version}"
    stored = {Path(f.path).name for f in list_artifacts(artifact_uri=f"{where}/artifacts", tracking_uri=tracking.uri)}
    for name in ("delta.safetensors", "concept.json"):
        if name not in stored:
            raise BrokenVersion(f"{name} is not among its artifacts any more")
    local = Path(download_artifacts(artifact_uri=f"{where}/artifacts", dst_path=str(folder), tracking_uri=tracking.uri))
    delta = local / "delta.safetensors"
    found, registered = sha256_file(delta), version.tags.get("delta_sha256")
    if found != registered:
        raise BrokenVersion(
            f"its delta has SHA-256 {found[:16]}…, {str(registered)[:16]}… was registered: the file was changed"
        )
    description: dict[str, Any] = json.loads((local / "concept.json").read_text())
    return delta, description

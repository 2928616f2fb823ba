"""Registers what the stages made: one registered model a concept, one version a delta, however often it is run."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import svdiff
from flows.pipeline.lineage import data_hashes, git_state
from flows.pipeline.results import Results
from flows.registry import runs, summary
from flows.registry.concepts import CHALLENGER, CHAMPION, model_id
from flows.registry.promotion import BETTER_THAN_BASE, Decision, aliases_of, decide
from flows.registry.tracking import Tracking, locked, workspace
from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.sampling.stage import default_negatives

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

MODEL_FILE = Path(__file__).with_name("concept_model.py")
REQUIREMENTS = (
    *("mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "pandas", "pillow"),
    *("pydantic", "ruamel.yaml", "tqdm", "filelock"),
)


@dataclass(frozen=True)
class Registration:
    """What `register` found or made."""

    concept: str
    version: int
    run_id: str
    delta_sha256: str
    base_hash: str
    new: bool
    decision: Decision
    role: str  # `champion`, `challenger`, `not better than the base` or `neither champion nor challenger`


def register(tracking: Tracking, config: Config, results: Results) -> Registration:
    """Log the training of `results`, register its delta and let the promotion rule decide.

    Idempotent: a delta on a base is registered once. A second call, also after a crash of the first at any point,
    finds what exists and completes it; a new scoring of the same delta is logged and judged. Calls on one machine
    wait for each other; should two machines create a version each, the lower stays (`settle`).
    """
    results.check_numbers()
    with locked(tracking.locks / f"register-{results.concept}"):
        version = find_version(tracking, results)
        new = version is None
        if version is None:
            run_id = runs.training_run(tracking, config, results)
            version = _create_version(tracking, config, results, run_id)
        else:
            _clean_lineage(tracking, config, results, version)
        run_id = str(version.run_id)
        runs.log_scores(tracking, results, run_id, model_id(version), summary.card(config, results))
        _describe(tracking, version, summary.description(config, results))
        runs.link_flow_run(tracking, run_id)
        decision = decide(tracking, config, results, version)
        role = _role(tracking, version)
    return Registration(
        results.concept, int(version.version), run_id, results.delta_sha256, results.base_hash, new, decision, role
    )


def find_version(tracking: Tracking, results: Results) -> ModelVersion | None:
    """The version of this delta on this base, if it is registered; duplicates are removed on the way."""
    wanted = (results.delta_sha256, results.base_hash)
    versions = tracking.client.search_model_versions(f"name = '{results.concept}'")
    return settle(tracking, [v for v in versions if (v.tags.get("delta_sha256"), v.tags.get("base_hash")) == wanted])


def settle(tracking: Tracking, same: list[ModelVersion]) -> ModelVersion | None:
    """Of several versions of one delta keep the lowest, delete the others, and return that one.

    Every process that finds the same versions keeps the same one, so that nobody need ask the others.
    """
    from mlflow.exceptions import MlflowException

    if not same:
        return None
    lowest, *others = sorted(same, key=lambda version: int(version.version))
    for other in others:
        try:
            tracking.client.delete_model_version(other.name, str(other.version))
        except MlflowException as error:  # somebody else settled it meanwhile
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    return lowest


def version_tags(config: Config, results: Results) -> dict[str, str]:
    """Lineage of a version: enough to say what it was made from, and to find it again."""
    entry = results.entry
    return {
        "delta_sha256": results.delta_sha256,
        # `base_hash` of the UNet, `text_encoder.base_hash` where that was trained as well.
        **{key: value for key, value in results.delta_metadata.items() if key.endswith("base_hash")},
        "data_hash": " ".join(data_hashes(results.root, entry).values()),
        "subset": results.delta_metadata.get("subset", config.train_config(results.concept).subset),
        "kind": entry.kind,
        "concepts": ", ".join(entry.concepts),
        "class_word": entry.class_word,
        "token": entry.token,
        "train_key": str(results.training["train_key"]),
        "svdiff_version": svdiff.__version__,
        **git_state(results.root),
    }


def _clean_lineage(tracking: Tracking, config: Config, results: Results, version: ModelVersion) -> None:
    """Give a version that was registered from a dirty tree the commit that has been made of it since.

    That this commit has the inputs of the training is DVC's to say: whoever reproduces the version asks it first.
    """
    state = git_state(results.root)
    if version.tags.get("git_dirty") == "true" and state["git_dirty"] == "false":
        runs.log_lineage(tracking, config, results, str(version.run_id))
        for key, value in state.items():
            tracking.client.set_model_version_tag(version.name, str(version.version), key, value)


def _create_version(tracking: Tracking, config: Config, results: Results, run_id: str) -> ModelVersion:
    import mlflow

    logged = _find_logged(tracking, results) or _log_model(tracking, config, results, run_id)
    # The tags go in with the version, in one request: there is never a version that `find_version` cannot see.
    created = mlflow.register_model(f"models:/{logged.model_id}", results.concept, tags=version_tags(config, results))
    version = find_version(tracking, results)
    if version is None:
        raise SvdiffError(
            f"version {created.version} of '{results.concept}' vanished while it was registered; register it again"
        )
    return version


def _describe(tracking: Tracking, version: ModelVersion, text: str) -> None:
    if version.description != text:
        tracking.client.update_model_version(version.name, str(version.version), text)


def _role(tracking: Tracking, version: ModelVersion) -> str:
    if tracking.client.get_model_version(version.name, str(version.version)).tags.get(BETTER_THAN_BASE) == "false":
        none = "not better than the base"
    else:
        none = f"neither {CHAMPION} nor {CHALLENGER}"
    held = {alias for alias, number in aliases_of(tracking, version.name).items() if number == int(version.version)}
    return next((role for role in (CHAMPION, CHALLENGER) if role in held), none)


def _find_logged(tracking: Tracking, results: Results) -> LoggedModel | None:
    """A model of this delta that was stored by a registration which did not come to its end."""
    from mlflow.entities import LoggedModelStatus

    found = tracking.client.search_logged_models(
        [tracking.experiment_id],
        f"tags.delta_sha256 = '{results.delta_sha256}' AND tags.base_hash = '{results.base_hash}'",
    )
    ready = [m for m in found if m.status == LoggedModelStatus.READY and m.name == results.concept]
    return ready[0] if ready else None


def _log_model(tracking: Tracking, config: Config, results: Results, run_id: str) -> LoggedModel:
    import mlflow
    import pandas as pd
    from mlflow.models import Model

    mlflow.set_experiment(experiment_id=tracking.experiment_id)
    with tempfile.TemporaryDirectory() as folder:
        description = Path(folder) / "concept.json"
        description.write_text(json.dumps(model_description(config, results), indent=2) + "\n")
        info = Model.log(
            artifact_path=None,
            name=results.concept,
            run_id=run_id,
            flavor=_Pyfunc,
            flavor_name="mlflow.pyfunc",
            python_model=str(MODEL_FILE),
            code_paths=[str(_copy_code(Path(folder)))],
            artifacts={"delta": str(results.delta), "concept": str(description)},
            signature=_signature(config),
            input_example=pd.DataFrame({"prompt": [f"a {results.entry.subject}"]}),
            pip_requirements=_requirements(),
            tags={"delta_sha256": results.delta_sha256, "base_hash": results.base_hash},
            # Else MLflow would load the base and draw the example's picture at every registration.
            validate_serving_input=False,
        )
    return tracking.client.get_logged_model(info.model_id)


class _Pyfunc:
    """MLflow's pyfunc flavor, for `Model.log`: `mlflow.pyfunc.log_model` cannot pass on `validate_serving_input`."""

    @staticmethod
    def save_model(*, validate_serving_input: bool, **arguments: Any) -> None:
        """Write the model folder."""
        import mlflow

        mlflow.pyfunc.save_model(**arguments)


def model_description(config: Config, results: Results) -> dict[str, Any]:
    """concept.json of the model: what concept_model.py needs to know beside the delta."""
    base, root, entry = config.base.model_dump(mode="json"), results.root, results.entry
    local = (root / config.base.model).resolve()
    inside = local.exists() and local.is_relative_to(root)
    if local.exists():
        base["model"] = local.relative_to(root).as_posix() if inside else str(local)
    return {
        "concept": results.concept,
        "subject": entry.subject,
        "base": base,
        "checkout": str(workspace(root)) if inside else None,
        "base_hash": results.base_hash,
        "sample": config.sample.model_dump(mode="json"),
        "negatives": default_negatives(config, entry),
    }


def _signature(config: Config) -> Any:
    """What goes in is left open, since MLflow would make one column of it, the first; the model reads and refuses it itself."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    sample = config.sample
    return ModelSignature(
        outputs=Schema([ColSpec("string", "prompt"), ColSpec("long", "seed"), ColSpec("binary", "image")]),
        params=ParamSchema(
            [
                ParamSpec("seed", "long", 0),
                ParamSpec("seeds", "long", [], shape=(-1,)),
                ParamSpec("scale", "double", 1.0),
                ParamSpec("steps", "long", sample.steps),
                ParamSpec("guidance", "double", sample.guidance),
                ParamSpec("eta", "double", sample.eta),
                ParamSpec("beta", "double", sample.beta),
                ParamSpec("batch_size", "long", sample.batch_size),
            ]
        ),
    )


def _copy_code(folder: Path) -> Path:
    """The library as it is now, to travel with the model: a name on a package index could be anybody's."""
    package = Path(svdiff.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "base", "cli", "experiments")
    return Path(shutil.copytree(package, folder / "svdiff", ignore=ignored))


def _requirements() -> list[str]:
    """Given outright: MLflow would otherwise load the model in another process to find them out.

    Public versions: a build such as 2.6.0+cpu is on no index.
    """
    from importlib.metadata import version

    return [f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS]

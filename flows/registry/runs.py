"""The MLflow run of a training: found by the training's key or made, completed from its files, with scores and lineage."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline import lineage
from flows.pipeline.results import Results
from flows.registry.tracking import Tracking
from svdiff.config import Config
from svdiff.data.concepts import concept_folder
from svdiff.errors import SvdiffError
from svdiff.files import read_table
from svdiff.secrets import redacted

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.entities.model_registry import ModelVersion
    from PIL.Image import Image

TRAIN_KEY, CONCEPT = "svdiff.train_key", "svdiff.concept"
DELTA, SCORES = "svdiff.delta_sha256", "svdiff.scores_sha256"
FLOW_RUN, FLOW_RUN_URL = "prefect.flow_run_id", "prefect.flow_run_url"
FLOW_RUN_VARIABLE, FLOW_RUN_URL_VARIABLE = "SVDIFF_FLOW_RUN_ID", "SVDIFF_FLOW_RUN_URL"
LINEAGE = "lineage/lineage.json"
DIGEST = 36  # characters that MLflow takes of a dataset's digest
BATCH = 500  # metrics a request; MLflow takes at most 1000
CELL = 160  # pixels a picture of the sample grid at most


def training_run(tracking: Tracking, config: Config, results: Results) -> str:
    """Id of the run of this training, with its parameters, curve and validation pictures in it.

    The live run of the `train` stage is taken up if there is one, and closed should a crash have left it open.
    Running again after a crash at any point completes the same run.
    """
    run = _find(tracking, results) or _create(tracking, results)
    if run.data.tags.get(DELTA) != results.delta_sha256:
        _log_training(tracking, config, results, run)
        # Written last: a run with this tag is complete.
        tracking.client.set_tag(run.info.run_id, DELTA, results.delta_sha256)
    if run.info.status != "FINISHED":
        tracking.client.set_terminated(run.info.run_id, "FINISHED")
    return str(run.info.run_id)


def log_scores(tracking: Tracking, results: Results, run_id: str, model_id: str, card: str) -> None:
    """Log metrics.json to run and model, score files and sample grids to the run, the model card with the grids beside the delta.

    Nothing if they are there.
    """
    client = tracking.client
    if client.get_run(run_id).data.tags.get(SCORES) == results.scores_sha256:
        return
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(key, value, now, 0, model_id=model_id) for key, value in results.metrics.items()]
    client.log_batch(run_id, metrics=metrics)
    client.log_artifacts(run_id, str(results.folder("score")), "scores")
    with tempfile.TemporaryDirectory() as folder:
        for model, grid in sample_grids(results).items():
            grid.save(Path(folder) / f"{model}.png")
        client.log_artifacts(run_id, folder, "samples")
        (Path(folder) / "README.md").write_text(card)
        client.log_model_artifacts(model_id, folder, "artifacts")
    client.set_tag(run_id, SCORES, results.scores_sha256)


def link_flow_run(tracking: Tracking, run_id: str) -> None:
    """Tag the run with the Prefect flow run that this process works for, if any."""
    for tag, variable in ((FLOW_RUN, FLOW_RUN_VARIABLE), (FLOW_RUN_URL, FLOW_RUN_URL_VARIABLE)):
        if value := os.environ.get(variable):
            tracking.client.set_tag(run_id, tag, value)


def sample_grids(results: Results) -> dict[str, Image]:
    """One picture for each sampled model (`trained`, `base`): rows are prompts, columns seeds."""
    from PIL import Image

    from svdiff.data.grid import image_grid

    folder = results.folder("sample")
    grids = {}
    for model, rows in read_table(folder / "images.csv").groupby("model"):
        rows = rows.sort_values(["prompt_index", "seed"])
        images = []
        for file in rows["file"]:
            with Image.open(folder / file) as picture:
                image = picture.convert("RGB")
            image.thumbnail((CELL, CELL))
            images.append(image)
        grids[str(model)] = image_grid(images, columns=rows["seed"].nunique())
    return grids


def _find(tracking: Tracking, results: Results) -> Run | None:
    """The run of this very delta, else the newest run of this training that no other delta has claimed."""
    runs = tracking.client.search_runs(
        [tracking.experiment_id],
        f"tags.`{TRAIN_KEY}` = '{results.training['train_key']}'",
        order_by=["attributes.start_time DESC"],
    )
    claimed = [run for run in runs if run.data.tags.get(DELTA) == results.delta_sha256]
    free = [run for run in runs if DELTA not in run.data.tags]
    return next(iter(claimed + free), None)


def _create(tracking: Tracking, results: Results) -> Run:
    tags = {TRAIN_KEY: results.training["train_key"], CONCEPT: results.concept}
    return tracking.client.create_run(tracking.experiment_id, run_name=results.concept, tags=tags)


def _log_training(tracking: Tracking, config: Config, results: Results, run: Run) -> None:
    from mlflow.entities import Dataset, DatasetInput, Param

    client, run_id = tracking.client, run.info.run_id
    # Parameters cannot change in MLflow: what the live curve logged already stays.
    new = {key: value for key, value in _parameters(config, results).items() if key not in run.data.params}
    client.log_batch(run_id, params=[Param(key, redacted(str(value))) for key, value in new.items()])
    pictures = lineage.data_hashes(results.root, results.entry)
    data = [
        Dataset(
            name,
            digest.rpartition(":")[2][:DIGEST],
            "dvc",
            json.dumps({"path": str(concept_folder(name)), "hash": digest}),
        )
        for name, digest in pictures.items()
    ]
    client.log_inputs(run_id, [DatasetInput(dataset) for dataset in data])
    missing = _missing_points(tracking, results, run)
    for start in range(0, len(missing), BATCH):
        client.log_batch(run_id, metrics=missing[start : start + BATCH])
    validation = results.folder("train") / "validation"
    if validation.is_dir():
        client.log_artifacts(run_id, str(validation), "validation")
    client.log_artifact(run_id, str(results.folder("train") / "train.json"), "train")
    client.log_artifact(run_id, str(results.folder("train") / "curve.csv"), "train")
    log_lineage(tracking, config, results, run_id)


def log_lineage(tracking: Tracking, config: Config, results: Results, run_id: str) -> None:
    """Everything that the version needs to be made again, as files of the run."""
    described = json.dumps(lineage.describe_lineage(config, results), indent=1) + "\n"
    tracking.client.log_text(run_id, redacted(described), LINEAGE)
    params = (results.root / "params.yaml").read_text(encoding="utf-8-sig")
    tracking.client.log_text(run_id, redacted(params), "lineage/params.yaml")


def read_lineage(tracking: Tracking, version: ModelVersion) -> dict[str, Any]:
    """The lineage that was logged with a version. Raises SvdiffError for one that was registered without."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = tracking.client.download_artifacts(str(version.run_id), LINEAGE, folder)
        except (MlflowException, OSError) as error:
            raise SvdiffError(
                f"version {version.version} of '{version.name}' has no {LINEAGE} in its run {version.run_id} ({error}); "
                "it was registered by an older release, or its artifacts are gone"
            ) from None
        content: dict[str, Any] = json.loads(Path(path).read_text())
    return content


def _parameters(config: Config, results: Results) -> dict[str, Any]:
    entry = results.entry
    values = results.training.get("config") or config.train_config(results.concept).model_dump(mode="json")
    return values | {
        "class_word": entry.class_word,
        "token": entry.token,
        "base.model": config.base.model,
        "sample.steps": config.sample.steps,
        "sample.guidance": config.sample.guidance,
        "sample.eta": config.sample.eta,
    }


def _missing_points(tracking: Tracking, results: Results, run: Run) -> list[Metric]:
    """The curve without what was logged live: all of it, its end where the server was away, or nothing."""
    histories = {
        key: tracking.client.get_metric_history(run.info.run_id, key)
        for key in map(str, results.curve)
        if key in run.data.metrics
    }
    last = {key: max(point.step for point in history) for key, history in histories.items()}
    return [point for point in _curve(results) if point.step > last.get(point.key, -1)]


def _curve(results: Results) -> list[Metric]:
    """curve.csv as MLflow metrics, dated so that the last step was just now."""
    from mlflow.entities import Metric

    rows = results.curve.to_dict("records")
    after = results.curve["seconds"].cumsum() if "seconds" in results.curve else None
    end = time.time()
    metrics = []
    for index, row in enumerate(rows):
        left = 0.0 if after is None else float(after.iloc[-1] - after.iloc[index])
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and math.isfinite(value):
                metrics.append(Metric(str(key), float(value), int((end - left) * 1000), int(row["step"])))
    return metrics

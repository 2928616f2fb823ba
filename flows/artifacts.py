"""What the Prefect UI shows of a finished concept: its scores, its pictures, where its version is."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from flows.results import Results
from flows.runs import sample_grids

MEASURES = ("image_alignment", "text_alignment", "clip_i")


def publish_concept(concept: str, root: Path) -> None:
    """A markdown artifact with scores and links, and an image artifact with the sample grid."""
    results = Results(concept, root)
    record = json.loads((root / "out" / "register" / f"{concept}.json").read_text())
    key = re.sub(r"[^a-z0-9]+", "-", concept.lower())
    create_markdown_artifact(summary(results, record), key=f"concept-{key}", description=f"Scores of {concept}")
    create_image_artifact(_data_uri(results), key=f"samples-{key}", description=f"{concept}: prompts by seeds")


def summary(results: Results, record: dict[str, Any]) -> str:
    """Scores of the trained model beside the untouched base's, and the way to the registered version."""
    metrics = results.metrics
    rows = [
        f"| {measure.replace('_', ' ')} | {metrics[measure]:.4f} | {metrics.get('base_' + measure, float('nan')):.4f} |"
        for measure in MEASURES
        if measure in metrics
    ]
    return "\n".join(
        [
            f"# {results.concept}, version {record['version']} ({record['role']})",
            "",
            record["reason"],
            "",
            "| | trained | base |",
            "|---|---|---|",
            *rows,
            "",
            f"- model: `models:/{results.concept}/{record['version']}`",
            f"- [run in MLflow]({record['run_url']}), `{record['run_id']}`",
            f"- delta `{record['delta_sha256'][:16]}…` on base `{record['base_hash'][:16]}…`",
            f"- {prompts(results)}",
        ]
    )


def prompts(results: Results) -> str:
    """The evaluation prompts, in the order of the grid's rows."""
    table = pd.read_csv(results.folder("sample") / "images.csv").sort_values("prompt_index")
    return "rows of the sample grid: " + "; ".join(table["prompt"].drop_duplicates())


def _data_uri(results: Results) -> str:
    """The grid as an address that holds the picture itself: the UI need not reach this machine's files."""
    stream = io.BytesIO()
    sample_grids(results)["trained"].save(stream, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

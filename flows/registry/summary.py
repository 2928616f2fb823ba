"""Markdown about a finished concept for people: in the MLflow registry and in the Prefect UI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.pipeline.results import Results
    from svdiff.config import Config

SCORES = {
    "identity": "identity",
    "image_alignment": "image alignment",
    "text_alignment": "text alignment",
    "clip_i": "CLIP-I",
    "separation": "separation",
    "both_identified": "both identified",
}


def description(config: Config, results: Results) -> str:
    """Of a registered version: what it draws, how it was trained, its scores."""
    training = results.training.get("config", {})
    settings = ", ".join(f"{key} {training[key]}" for key in ("steps", "lr", "prior_weight", "seed") if key in training)
    what = f"`a {config.entry(results.concept).subject}`: {training.get('method', 'svdiff')}, {settings}"
    return "\n".join([what, "", *scores(results), "", prompts(results)])


def artifact(results: Results, record: dict[str, Any]) -> str:
    """Of a flow run: what came of it, and the way to the registered version.

    Args:
        results: of the concept.
        record: out/register/<concept>.json.
    """
    return "\n".join(
        [
            f"# {results.concept}, version {record['version']} ({record['role']})",
            "",
            record["reason"],
            "",
            *scores(results),
            "",
            f"- model: `models:/{results.concept}/{record['version']}`",
            f"- [run in MLflow]({record['run_url']}), `{record['run_id']}`",
            f"- delta `{record['delta_sha256'][:16]}…` on base `{record['base_hash'][:16]}…`",
            f"- {prompts(results)}",
        ]
    )


def scores(results: Results) -> list[str]:
    """Table of the trained model's scores beside the untouched base's."""
    metrics = results.metrics
    rows = [
        f"| {words} | {metrics[score]:.4f} | {metrics.get(f'base_{score}', float('nan')):.4f} |"
        for score, words in SCORES.items()
        if score in metrics
    ]
    return ["| | trained | base |", "|---|---|---|", *rows]


def prompts(results: Results) -> str:
    """The evaluation prompts, in the order of the sample grid's rows."""
    import pandas as pd

    table = pd.read_csv(results.folder("sample") / "images.csv").sort_values("prompt_index")
    return "rows of the sample grid: " + "; ".join(table["prompt"].drop_duplicates())

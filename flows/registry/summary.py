"""Markdown about a finished concept for people: its model card, and what the Prefect UI shows of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.pipeline.lineage import data_hashes
from flows.registry.promotion import judge_against_base
from svdiff.data.concepts import concept_folder
from svdiff.files import read_table
from svdiff.secrets import redacted

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
    "drift_identity": "drift: identity of the bare class word",
}
SHORT = {"image_alignment": "image", "text_alignment": "text", "drift_identity": "drift"}  # in the names of gains
ENDS = ("", "_low", "_high")
DESCRIPTION = 5000  # characters that MLflow's databases take
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif"}


def card(config: Config, results: Results) -> str:
    """The model card of a version: purpose, data, licence, base, scores with intervals, limits, pictures."""
    entry, training, metrics = results.entry, results.training, results.metrics
    settings = training.get("config", {})
    method = settings.get("method", "svdiff")
    chosen = ", ".join(
        f"{key} {settings[key]}"
        for key in ("subset", "steps", "lr", "lr_1d", "prior_weight", "seed")
        if key in settings
    )
    lines = [
        f"# {results.concept}",
        "",
        f"Draws `a {entry.subject}` in whatever a prompt says; made to personalise pictures of this subject, and for nothing else.",
        "",
        "## Data",
        "",
        *(_data(results.root, name, digest) for name, digest in data_hashes(results.root, entry).items()),
        "",
        "## Training",
        "",
        f"`{method}`: {chosen}.",
        f"Base: `{config.base.model}`, weights `{results.base_hash[:16]}…`; licence: {base_licence(results.root, config.base.model)}.",
        "",
        "## Scores",
        "",
        f"{judge_against_base(metrics, config.promote).reason.capitalize()}.",
        "",
        *scores(results),
        "",
        "## Limits",
        "",
        *limits(entry.class_word, metrics),
        "",
        "## Pictures",
        "",
        "`trained.png`, and `base.png` from the untrained base: columns are seeds, " + prompts(results) + ".",
    ]
    return redacted("\n".join(lines) + "\n")


def description(config: Config, results: Results) -> str:
    """The card as MLflow stores it with the version: whole lines, as many as its databases take."""
    text = ""
    for line in card(config, results).splitlines(keepends=True):
        if len(text) + len(line) > DESCRIPTION:
            break
        text += line
    return text.strip()


def _data(root: Path, concept: str, digest: str) -> str:
    folder = root / concept_folder(concept)
    pictures = len([path for path in folder.glob("*") if path.suffix.lower() in PICTURES])
    return f"- `{concept_folder(concept)}`: {pictures} pictures, {digest}; licence: {licence_near(folder)}"


def licence_near(folder: Path) -> str:
    """What a LICENSE or ATTRIBUTION file in a folder, or in the one above it, says first; or that nobody said."""
    for place in (folder, folder.parent):
        for path in sorted(place.glob("*")):
            if path.is_file() and path.stem.upper() in ("LICENSE", "LICENCE", "ATTRIBUTION", "COPYING"):
                lines = [line.strip("# ").strip() for line in path.read_text(errors="replace").splitlines()]
                said = next(
                    (line for line in lines if "licen" in line.lower() or "CC" in line), next(filter(None, lines), "")
                )
                return f"{said[:300]} ({path.name})"
    return "not stated; a LICENSE file beside the pictures says it here"


def base_licence(root: Path, model: str) -> str:
    """The licence in the front matter of the base's model card, in its folder or in `card` beside it."""
    folder = root / model
    for path in (folder / "README.md", folder.parent / "card" / "README.md"):
        if path.is_file() and (
            found := re.search(r"^license:\s*(.+)$", path.read_text(errors="replace"), re.MULTILINE)
        ):
            return found[1].strip()
    return "not stated there" if folder.exists() else f"see the model card of {model}"


def limits(class_word: str, metrics: dict[str, float]) -> Iterable[str]:
    """What the scores do not say, and what they warn of."""
    yield "- Scores are those of these evaluators, prompts and seeds; intervals cover other prompts and seeds of the kind, not training anew."
    yield "- It draws what the base can draw; small details of the subject may differ from picture to picture."
    if metrics.get("text_gain_high", 0.0) < 0:
        yield f"- Prompts are followed less than by the base (text alignment {metrics['text_gain']:+.4f})."
    if metrics.get("drift_gain_low", 0.0) > 0:
        yield f"- `a {class_word}` without the token looks more like the subject than before (drift {metrics['drift_gain']:+.4f})."
    if "drift_gain" not in metrics:
        yield f"- Whether `a {class_word}` without the token is left as it was has not been measured."


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
    """Table of the trained model's scores beside the untouched base's, with the gain and its 95 % interval."""
    return [
        "| | trained | base | gain, 95 % interval |",
        "|---|---|---|---|",
        *filter(None, map(_row(results.metrics), SCORES)),
    ]


def _row(metrics: dict[str, float]) -> Callable[[str], str]:
    def row(score: str) -> str:
        if score not in metrics:
            return ""
        base, short = metrics.get(f"base_{score}"), SHORT.get(score, score)
        said = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*(metrics.get(f"{short}_gain{end}", math.nan) for end in ENDS))
        return f"| {SCORES[score]} | {metrics[score]:.4f} | {'' if base is None else f'{base:.4f}'} | {'' if 'nan' in said else said} |"

    return row


def prompts(results: Results) -> str:
    """The evaluation prompts, in the order of the sample grid's rows."""

    table = read_table(results.folder("sample") / "images.csv").sort_values("prompt_index")
    return "rows of the sample grid: " + "; ".join(table["prompt"].drop_duplicates())

"""Stage `report`: pages that show every concept and pair beside its neighbours, and a table of all scores.

Pictures and figures are part of the pages, nothing is loaded from anywhere: they can be mailed, archived and
opened offline. Of many concepts the first page has the table of those with the lowest gain and a scatter of some, scores.csv
has all, and each further page shows the next PER_PAGE.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from PIL import Image
from tqdm.auto import tqdm

import svdiff
from svdiff.config import Config
from svdiff.data.concepts import to_square
from svdiff.data.mixes import mix_folder
from svdiff.evaluation import plots
from svdiff.evaluation.correlation import CORRELATION, TRAINED
from svdiff.evaluation.score import DRIFT, SAMPLES, SCORES, read_samples, real_pictures
from svdiff.experiments.rank import RANKS
from svdiff.files import atomic_dir, read_table
from svdiff.report.edits import edit_parts
from svdiff.report.figures import Figure, chart, figure_file, picture_figure, read_json

REPORT = Path("out/report")
PER_PAGE = 20  # concepts and pairs shown on a page
LISTED = 50  # in the table of the first page, and with their entries of params.yaml
DRAWN = 300  # in its scatter
NEAR = 5  # pages that a page links to on either side, beside the first and the last
DRIFT_SEEDS = 8  # pictures of a class prompt shown
THUMBNAIL = 192  # largest side of a sample in the page, in pixels
FILM = 6  # validation grids shown a concept
MEASURES = {
    "identity": ("identity", "Identity", "cosine of the instance embedding with the training pictures"),
    "image": ("image_alignment", "Image alignment", "1 − LPIPS to the training pictures"),
    "text": ("text_alignment", "Text alignment", "CLIP cosine with the prompt"),
    "clip_i": ("clip_i", "CLIP-I", "CLIP cosine with the training pictures"),
    # Of pairs only, whose image alignment and CLIP-I are those of the two things in a picture, each with its own subject.
    "separation": ("separation", "Separation", "1: both subjects as themselves, 0: blended, below: twins"),
    "identity_first": ("identity_first", "Identity, first subject", "of its own region of the picture"),
    "identity_second": ("identity_second", "Identity, second subject", "of its own region of the picture"),
    "both_identified": ("both_identified", "Both identified", "share of pictures that show both"),
}


@dataclass(frozen=True)
class Score:
    """A line of a score table: the trained model, the base, and the gain with its 95 % interval."""

    label: str
    meaning: str
    trained: float
    base: float
    gain: float
    low: float
    high: float
    lower_is_better: bool = False

    @property
    def judgement(self) -> str:
        """'better', 'worse' or 'open', by the interval."""
        above, below = ("worse", "better") if self.lower_is_better else ("better", "worse")
        return above if self.low > 0 else below if self.high < 0 else "open"


@dataclass
class Shown:
    """What is shown of one concept or pair; parts that were not made yet are empty."""

    name: str
    subject: str
    training: list[Figure] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    rows: list[tuple[str, Figure, Figure]] = field(default_factory=list)  # prompt, trained, base
    seeds: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    drift: Score | None = None  # identity of the bare class word's pictures with the concept
    variety: tuple[float, float, float] | None = None  # the share that is kept, and its interval
    class_rows: list[tuple[str, Figure, Figure]] = field(default_factory=list)  # class prompt, trained, base
    curve: Figure | None = None
    film: list[Figure] = field(default_factory=list)
    strip: Figure | None = None
    rank_curve: Figure | None = None
    mixes: Figure | None = None


def report(config: Config) -> Path:
    """Write out/report/: index.html, page-2.html, … and scores.csv, of whatever the other stages have made.

    Raises SvdiffError if an output is damaged.
    """
    names = [*config.concepts, *config.pairs]
    metrics = {name: values for name in names if (values := read_json(SCORES / name / "metrics.json"))}
    evaluators = next((values for name in metrics if (values := read_json(SCORES / name / "evaluators.json"))), {})
    correlation = read_json(CORRELATION / "summary.json")
    chunks = [names[start : start + PER_PAGE] for start in range(0, len(names), PER_PAGE)] or [[]]
    place = {name: file_name(number) for number, chunk in enumerate(chunks) for name in chunk}
    placed = {name: values for name, values in metrics.items() if "identity" in values}  # not so of older scores
    lowest = sorted(names, key=lambda name: metrics.get(name, {}).get("identity_gain", -9.0))
    listed = names if len(names) <= LISTED else lowest[:LISTED]
    drawn = [name for name in lowest if name in placed]
    drawn = drawn[:: math.ceil(len(drawn) / DRAWN)] if len(drawn) > DRAWN else list(placed)
    scattered = {name: placed[name] for name in drawn}
    common = {
        "version": svdiff.__version__,
        "date": datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC"),
        "config": config,
        "place": place,
        "edits": edit_parts(config),
    }
    first = {
        "listed": [_row_of_table(config, name, metrics.get(name, {})) for name in listed],
        "entries": len(names),
        "scatter": chart(plots.alignment_scatter(scattered), _scatter_alt(scattered)) if scattered else None,
        "scattered": len(scattered),
        "scored": len(placed),
        "correlation": correlation,
        "heat_map": figure_file(CORRELATION / "heatmap.png", _correlation_alt(correlation)),
        "params": _parameters(config),
        "evaluators": _flat(evaluators),
    }
    template = _template()
    with atomic_dir(REPORT) as folder:
        for number, chunk in enumerate(tqdm(chunks, desc="report", unit="page")):
            pages = [_shown(config, name) for name in chunk]
            files = {near: file_name(near) for near in _near(number, len(chunks))}
            html = template.render(**common, **first, pages=pages, number=number, files=files)
            (folder / file_name(number)).write_text(html, encoding="utf-8")
        scores_table(metrics).to_csv(folder / "scores.csv", index_label="name")
    return REPORT / "index.html"


def file_name(number: int) -> str:
    """Of a page of the report, counted from 0."""
    return "index.html" if number == 0 else f"page-{number + 1}.html"


def _near(number: int, count: int) -> list[int]:
    """Pages that a page links to: all would be the square of their number."""
    return sorted({0, count - 1, *range(max(0, number - NEAR), min(count, number + NEAR + 1))})


def scores_table(metrics: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """All numbers of all concepts and pairs, a row each."""
    return pd.DataFrame.from_dict(metrics, orient="index")


def _row_of_table(config: Config, name: str, metrics: dict[str, Any]) -> Shown:
    """What the table of the first page says of an entry: its scores, without pictures."""
    shown = Shown(name, config.entry(name).subject)
    shown.scores, shown.drift, shown.variety = _scores(metrics), _drift(metrics), _variety(metrics)
    return shown


def _parameters(config: Config) -> str:
    """What the results depend on, as YAML; of many concepts not their entries. Not `tracking`: its address may hold a password."""
    values = config.model_dump(mode="json", exclude={"tracking", "promote", "base_training"})
    for kind in ("concepts", "pairs", "edits"):
        if len(values[kind]) > LISTED:
            values[kind] = f"{len(values[kind])}, in params.yaml"
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["number"] = lambda value, digits=3: f"{value:.{digits}f}".replace("-", "−")
    environment.filters["signed"] = lambda value: f"{value:+.3f}".replace("-", "−")
    return environment.get_template("page.html")


def _shown(config: Config, name: str) -> Shown:
    entry, metrics = config.entry(name), read_json(SCORES / name / "metrics.json")
    shown = _row_of_table(config, name, metrics)
    shown.training = [
        picture_figure(to_square(picture, THUMBNAIL), f"training picture {index} of {concept}")
        for concept, pictures in real_pictures(entry).items()
        for index, picture in enumerate(pictures, start=1)
    ]
    if (SAMPLES / name / "images.csv").is_file():
        samples, _ = read_samples(SAMPLES / name)
        shown.seeds = sorted(samples["seed"].unique().tolist())
        shown.rows = [_row(SAMPLES / name, rows) for _, rows in samples.groupby("prompt_index")]
    if (SAMPLES / name / DRIFT / "images.csv").is_file():
        samples, _ = read_samples(SAMPLES / name / DRIFT)
        few = samples[samples["seed"] < DRIFT_SEEDS]
        shown.class_rows = [_row(SAMPLES / name / DRIFT, rows) for _, rows in few.groupby("prompt_index")]
    if (TRAINED / name / "curve.csv").is_file():
        curve = read_table(TRAINED / name / "curve.csv")
        alt = f"training loss of {name} over {int(curve['step'].max())} steps"
        shown.curve = chart(plots.training_curve(curve), alt)
        shown.facts = _facts(config, name, read_json(TRAINED / name / "train.json"))
        shown.film = _film(TRAINED / name / "validation", name)
    if (sheet := mix_folder(name) / "sheet.png").is_file():
        shown.mixes = picture_figure(Image.open(sheet), f"mixes that {name} was trained on, priors beneath")
    shown.strip = figure_file(RANKS / name / "strip.png", f"pictures of {name} for each rank trained with")
    shown.rank_curve = figure_file(RANKS / name / "curve.png", f"alignment of {name} against the rank trained with")
    return shown


def _row(folder: Path, rows: pd.DataFrame) -> tuple[str, Figure, Figure]:
    """One prompt: the pictures of all seeds side by side, from the trained model and from the base."""
    prompt = str(rows["prompt"].iloc[0])
    strips = []
    for model, words in (("trained", "the trained model"), ("base", "the untrained base")):
        files = rows[rows["model"] == model].sort_values("seed")["file"]
        pictures = [Image.open(folder / file).convert("RGB") for file in files]
        strips.append(picture_figure(_side_by_side(pictures), f"{len(pictures)} pictures of “{prompt}” by {words}"))
    return prompt, strips[0], strips[1]


def _scores(metrics: dict[str, Any]) -> list[Score]:
    """The measures that were taken, identity first."""
    return [
        Score(
            label,
            meaning,
            metrics[measure],
            metrics[f"base_{measure}"],
            *(metrics[f"{short}_gain{end}"] for end in ("", "_low", "_high")),
        )
        for short, (measure, label, meaning) in MEASURES.items()
        if measure in metrics
    ]


def _drift(metrics: dict[str, Any]) -> Score | None:
    """How far the bare class word has moved towards the concept."""
    if "drift_identity" not in metrics:
        return None
    return Score(
        label="Drift",
        meaning="identity of the bare class word's pictures with the concept; a gain is a leak",
        trained=metrics["drift_identity"],
        base=metrics["base_drift_identity"],
        gain=metrics["drift_gain"],
        low=metrics["drift_gain_low"],
        high=metrics["drift_gain_high"],
        lower_is_better=True,
    )


def _variety(metrics: dict[str, Any]) -> tuple[float, float, float] | None:
    if "variety_kept" not in metrics:
        return None
    return metrics["variety_kept"], metrics["variety_kept_low"], metrics["variety_kept_high"]


def _facts(config: Config, name: str, trained: dict[str, Any]) -> list[tuple[str, str]]:
    settings = trained.get("config") or config.train_config(name).model_dump()
    facts = [("method", str(settings["method"]))]
    if settings["method"] == "svdiff":
        limit = "full rank" if settings["rank"] is None else f"rank {settings['rank']}"
        facts.append(
            (
                "weights",
                f"{settings['subset']}{' + text encoder' if settings['text_encoder'] else ''}, {limit}",
            )
        )
    facts.append(
        (
            "steps",
            f"{trained.get('steps', settings['steps'])} × {settings['batch_size'] * settings['accumulation']} pictures",
        )
    )
    facts.append(("learning rates", f"{settings['lr']:g}, 1-D {settings['lr_1d']:g}"))
    facts.append(("prior weight λ", f"{settings['prior_weight']:g}"))
    if "parameters" in trained:
        facts.append(("parameters", f"{trained['parameters']:,}"))
    delta = TRAINED / name / "delta.safetensors"
    if delta.is_file():
        facts.append(("delta", f"{delta.stat().st_size / 1000:,.0f} kB"))
    if "seconds" in trained:
        facts.append(("training time", _duration(trained["seconds"])))
    return facts


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _film(folder: Path, name: str) -> list[Figure]:
    """Some of the validation grids, always the first (the untrained base) and the last."""
    paths = sorted(folder.glob("step-*.png"))
    if len(paths) > FILM:
        paths = [paths[round(index * (len(paths) - 1) / (FILM - 1))] for index in range(FILM)]
    film = []
    for path in paths:
        step = int(path.stem.removeprefix("step-"))
        image = Image.open(path).convert("RGB")
        film.append(
            picture_figure(
                image, f"validation pictures of {name} after {step} steps", f"step {step}", side=3 * THUMBNAIL
            )
        )
    return film


def _side_by_side(pictures: Sequence[Image.Image], gap: int = 1) -> Image.Image:
    side = min(THUMBNAIL, max(picture.width for picture in pictures))
    canvas = Image.new("RGB", (len(pictures) * (side + gap) - gap, side), plots.GRID)
    for index, picture in enumerate(pictures):
        canvas.paste(to_square(picture, side), (index * (side + gap), 0))
    return canvas


def _scatter_alt(metrics: dict[str, Any]) -> str:
    parts = [
        f"{name}: identity {score['base_identity']:.2f} to {score['identity']:.2f}, "
        f"text {score['base_text_alignment']:.2f} to {score['text_alignment']:.2f}"
        for name, score in list(metrics.items())[:PER_PAGE]
    ]
    return "text alignment and identity from the base to the trained model. " + "; ".join(parts)


def _correlation_alt(summary: dict[str, Any]) -> str:
    if "most_similar" not in summary:
        return "correlation of the spectral shifts of fewer than two concepts"
    return (
        f"correlation of the spectral shifts of {summary['concepts']} concepts; most alike: "
        f"{summary['most_similar']} ({summary['most_similar_cosine']:.2f})"
    )


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as lines: 'clip.model', its value."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", str(value)))
    return lines

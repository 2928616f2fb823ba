"""Figures in one quiet style with labelled axes. Every function returns a matplotlib figure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from PIL.Image import Image

INK, QUIET, GRID, BLANK = "#1f2430", "#6b7280", "#e5e7eb", "#f1f2f4"
HUES = ("#2f6f9f", "#c2703d", "#4f8a5b", "#8a5a9e", "#b0476a", "#7a7a35", "#3d8f93", "#8c6246")
WRITTEN, NAMED = 24, 100  # rows of a heat map with their values written, and with their names
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


@contextmanager
def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Iterator[tuple[Figure, Any]]:
    """A figure of `width` × `height` inches in our style, and its axes; pyplot and its backends are not involved."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure, figure.subplots(rows, columns)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, without a date, so that equal figures are equal files."""
    Path(path).write_bytes(to_png(figure))


def to_png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.06, metadata={"Software": None})
    return buffer.getvalue()


def training_curve(curve: pd.DataFrame) -> Figure:
    """Losses over steps: the noisy training loss faint and smoothed, the loss at fixed noise as points.

    `curve` has `step` and `loss`; `loss_instance`, `loss_prior` and `fixed_noise_loss` are drawn where
    present.
    """
    with _figure(6.4, 2.8) as (figure, axes):
        window = max(1, len(curve) // 20)
        parts = {"loss_instance": "concept", "loss_prior": "prior"}
        present = {name: label for name, label in parts.items() if name in curve and curve[name].notna().any()}
        for (name, label), colour in zip((present or {"loss": "loss"}).items(), HUES, strict=False):
            smooth = curve[name].rolling(window, min_periods=1).mean()
            axes.plot(curve["step"], curve[name], color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(curve["step"], smooth, color=colour, linewidth=1.6, label=f"{label}, mean of {window} steps")
        if "fixed_noise_loss" in curve and curve["fixed_noise_loss"].notna().any():
            fixed = curve.dropna(subset=["fixed_noise_loss"])
            axes.plot(
                fixed["step"],
                fixed["fixed_noise_loss"],
                "o-",
                color=INK,
                markersize=4,
                linewidth=1,
                label="concept, fixed noise",
            )
        # A few steps at almost noiseless timesteps must not flatten the rest.
        highest = np.nanmax([np.nanpercentile(curve[name], 98) for name in (present or ["loss"])])
        axes.set_ylim(0, float(highest) * 1.15 or 1)
        axes.set_xlabel("step")
        axes.set_ylabel("loss (Eq. 1)")
        axes.legend(loc="upper right", fontsize=8)
    return figure


def alignment_scatter(scores: Mapping[str, Mapping[str, float]]) -> Figure:
    """Fig. 9b: text alignment against identity, an arrow a concept from the untrained base to the delta."""
    with _figure(6.4, 4.2) as (figure, axes):
        for index, score in enumerate(scores.values()):
            colour = HUES[index % len(HUES)]
            start = (score["base_text_alignment"], score["base_identity"])
            end = (score["text_alignment"], score["identity"])
            axes.annotate(
                "",
                end,
                start,
                arrowprops={"arrowstyle": "-|>", "color": colour, "alpha": 0.45, "shrinkA": 4, "shrinkB": 5},
            )
            axes.plot(*start, "o", color=colour, markerfacecolor="white", markersize=7)
            axes.plot(*end, "o", color=colour, markersize=7)
        axes.plot([], [], "o", color=QUIET, markerfacecolor="white", label="untrained base")
        axes.plot([], [], "o", color=QUIET, label="trained")
        axes.margins(0.18)
        axes.set_xlabel("text alignment: CLIP cosine with the prompt →")
        axes.set_ylabel("identity: cosine with the concept's pictures →")
        axes.legend(loc="best", fontsize=8)
        if len(scores) <= WRITTEN:
            _label_points(axes, [(name, s["text_alignment"], s["identity"]) for name, s in scores.items()])
    return figure


def _label_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Name each point on its right, in the colour of its index; names that would cover each other are moved up."""
    axes.figure.draw_without_rendering()  # the layout, so that distances on paper are known
    placed: list[tuple[float, float]] = []
    for index, (name, x, y) in sorted(enumerate(points), key=lambda item: item[1][2]):
        left, bottom = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        lift = 0.0
        for other, taken in sorted(placed, key=lambda place: place[1]):
            if abs(other - left) < 90 and abs(bottom + lift - taken) < 11:
                lift = taken + 11 - bottom
        placed.append((left, bottom + lift))
        style = {"color": HUES[index % len(HUES)], "fontsize": 9, "fontweight": "bold"}
        axes.annotate(name, (x, y), xytext=(8, lift - 3), textcoords="offset points", **style)


def heat_map(matrix: pd.DataFrame, label: str) -> Figure:
    """Fig. 9a: a square matrix of cosines with its values; NaN is blank. Colours are symmetric about zero.

    Beyond NAMED rows there are no names, beyond WRITTEN no values: nobody could read them.
    """
    if matrix.empty:
        matrix = pd.DataFrame([[np.nan]], ["no concept"], ["no concept"])
    names = [str(name) for name in matrix.columns]
    side = 1.8 + 0.62 * max(min(len(names), WRITTEN), 3)
    with _figure(side + 1.0, side) as (figure, axes):
        values = matrix.to_numpy(float)
        limit = max(0.1, 1.2 * float(np.nanmax(np.abs(values), initial=0)))
        image = axes.imshow(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_facecolor(BLANK)
        ticks = range(len(names)) if len(names) <= NAMED else range(0)
        size = min(9, 600 / len(names))
        axes.set_xticks(ticks, names[: len(ticks)], rotation=40, ha="right", rotation_mode="anchor", fontsize=size)
        axes.set_yticks(ticks, names[: len(ticks)], fontsize=size)
        axes.grid(visible=False)
        axes.tick_params(length=0, labelcolor=INK)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if len(names) <= WRITTEN:
            for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
                value = values[row, column]
                colour = "white" if abs(value) > 0.6 * limit else INK
                axes.text(
                    column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=8
                )
        figure.colorbar(image, ax=axes, shrink=0.8, label=label)
    return figure


def rank_curve(ranks: pd.DataFrame) -> Figure:
    """Fig. 25 in numbers: identity and text alignment against the rank trained with, a line a kind of prompt."""
    labels = list(dict.fromkeys(ranks["rank"].astype(str)))
    with _figure(4.6, 4.8, rows=2) as (figure, axes):
        titles = {
            "identity": "identity: cosine",
            "text_alignment": "text alignment: CLIP cosine",
        }
        for axis, (measure, title) in zip(axes, titles.items(), strict=True):
            for (kind, rows), colour in zip(ranks.groupby("prompt_kind", sort=False), HUES, strict=False):
                positions = [labels.index(str(rank)) for rank in rows["rank"]]
                axis.plot(positions, rows[measure], "o-", color=colour, label=str(kind), markersize=5)
            axis.set_xticks(range(len(labels)), labels)
            axis.set_xlabel("rank of the shifts in training")
            axis.set_ylabel(title)
            axis.margins(x=0.1, y=0.25)
        axes[0].legend(loc="best", fontsize=8)
    return figure


def edit_curves(curves: pd.DataFrame) -> Figure:
    """Edit score against reconstruction (Sec. 4.3): a panel a start and kind of edit, a line a method from the base on.

    `curves` has a row a `structural`, `start`, `method` and `steps`, with `reconstruction`, `edit` and, for the lines
    across, `input_edit` and `answer_edit`; the rows with 0 steps are the untrained base.
    """
    kinds, starts = curves["structural"].unique(), curves["start"].unique()
    with _figure(3.2 * len(starts), 2.9 * len(kinds), rows=len(kinds), columns=len(starts)) as (figure, axes):
        panels = np.reshape(axes, (len(kinds), len(starts)))
        for (structural, start), rows in curves.groupby(["structural", "start"], sort=False):
            axis = panels[list(kinds).index(structural), list(starts).index(start)]
            base = rows[rows["steps"] == 0]
            for (method, line), colour in zip(
                rows[rows["steps"] > 0].groupby("method", sort=False), HUES, strict=False
            ):
                points = pd.concat([base, line.sort_values("steps")])
                axis.plot(points["reconstruction"], points["edit"], "o-", color=colour, markersize=4, label=str(method))
                for _, point in line.iterrows():
                    where = (point["reconstruction"], point["edit"])
                    axis.annotate(
                        str(point["steps"]), where, xytext=(4, 3), textcoords="offset points", fontsize=7, color=colour
                    )
            axis.plot(base["reconstruction"], base["edit"], "D", color=INK, markersize=5, label="base")
            for level, dashes, words in (("answer_edit", "--", "right answer"), ("input_edit", ":", "unchanged input")):
                axis.axhline(rows[level].mean(), color=QUIET, linestyle=dashes, linewidth=1, label=words)
            axis.set_title(f"{start}, {'structural' if structural else 'small'} edits", fontsize=9, color=QUIET)
            axis.set_xlabel("reconstruction: 1 − LPIPS")
            axis.set_ylabel("edit: CLIP cosine with the target")
            axis.margins(x=0.12, y=0.12)
        panels[0, 0].legend(loc="best", fontsize=7)
    return figure


def captioned_grid(
    rows: Sequence[Sequence[Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    *,
    cell: float = 1.0,
) -> Figure:
    """Pictures in rows, captions (of one or more lines) left of the rows and above the columns; `cell` is in inches."""
    columns = max(len(row) for row in rows)
    margin = 0.35 + 0.075 * max(len(line) for label in row_labels for line in label.splitlines())
    head = 0.1 + 0.2 * max(len(label.splitlines()) for label in column_labels) if column_labels else 0.05
    figsize = (margin + columns * cell, head + len(rows) * cell)
    with _figure(*figsize, rows=len(rows), columns=columns) as (figure, axes):
        grid = np.reshape(axes, (len(rows), columns))
        figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr,call-arg]
        for axis in grid.flat:
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set(visible=True, color=GRID)
        for index, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
            for column, picture in enumerate(row):
                grid[index, column].imshow(np.asarray(picture), interpolation="lanczos")
            grid[index, 0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=6)
        for column, text in enumerate(column_labels):
            grid[0, column].set_title(text, fontsize=9, color=QUIET)
    return figure

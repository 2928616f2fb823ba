"""Figures: the right things in them, equal files for equal data."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from evaluation_parts import drawing
from PIL import Image

from svdiff.evaluation import plots


def test_training_curve_draws_what_there_is() -> None:
    curve = pd.DataFrame({"step": range(1, 101), "loss": np.linspace(1, 0.1, 100)})
    (axes,) = plots.training_curve(curve).axes
    assert axes.get_xlabel() == "step"
    assert len(axes.lines) == 2
    curve = curve.assign(loss_instance=0.5, loss_prior=np.nan, fixed_noise_loss=np.nan)
    curve.loc[[49, 99], "fixed_noise_loss"] = (0.4, 0.3)
    (axes,) = plots.training_curve(curve).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["concept, mean of 5 steps", "concept, fixed noise"]
    assert list(axes.lines[-1].get_xdata()) == [50, 100]


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_curves(length: int) -> None:
    plots.to_png(plots.training_curve(pd.DataFrame({"step": range(length), "loss": [0.0] * length})))


def test_heat_map_labels_every_value_and_leaves_blanks() -> None:
    names = ["dog", "cat", "house"]
    matrix = pd.DataFrame([[np.nan, 0.5, -0.2], [0.5, 0.9, 0.1], [-0.2, 0.1, np.nan]], names, names)
    axes = plots.heat_map(matrix, "cosine").axes[0]
    assert sorted(text.get_text() for text in axes.texts) == sorted(["0.50", "−0.20"] * 2 + ["0.90"] + ["0.10"] * 2)
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    low, high = axes.images[0].get_clim()
    assert low == -high


def test_names_of_close_points_do_not_cover_each_other() -> None:
    point = {"text_alignment": 0.3, "identity": 0.5, "base_text_alignment": 0.3, "base_identity": 0.4}
    figure = plots.alignment_scatter({"one": point, "two": point, "three": point})
    figure.draw_without_rendering()
    labels = [text for text in figure.axes[0].texts if text.get_text() in {"one", "two", "three"}]
    boxes = [text.get_window_extent() for text in labels]
    assert len(boxes) == 3
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert box.y1 <= other.y0 + 2 or other.y1 <= box.y0 + 2


def test_grid_holds_pictures_and_captions() -> None:
    rows = [[drawing("red"), drawing("blue")], [drawing("green")]]
    figure = plots.captioned_grid(rows, ["first", "second"], ["a", "b"])
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["first", "second"]
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["a", "b"]
    assert sum(len(axes.images) for axes in figure.axes) == 3
    assert Image.open(io.BytesIO(plots.to_png(figure))).size[0] > 200


def test_equal_figures_are_equal_files() -> None:
    curve = pd.DataFrame({"step": range(1, 11), "loss": np.linspace(1, 0.1, 10)})
    assert plots.to_png(plots.training_curve(curve)) == plots.to_png(plots.training_curve(curve))


def test_the_users_own_matplotlib_settings_are_left_alone() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plots.to_png(plots.training_curve(pd.DataFrame({"step": [1, 2], "loss": [0.2, 0.1]})))
    assert dict(mpl.rcParams) == before

"""Strips of pictures under combined deltas: addition, interpolation, scaling, style mixing (Fig. 8, 10, 11, 16, 26)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from svdiff.config import Config, SampleConfig
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.files import atomic_file, check_writable
from svdiff.models import load_pipeline
from svdiff.sampling.images import Job
from svdiff.sampling.stage import Part, Switch, draw_pictures
from svdiff.spectral import SpectralDelta, mix_by_layer

STYLE_SUBSET = "UNet-2D"  # of Fig. 10


class Column(NamedTuple):
    """One model of a strip: its caption, and the weighted deltas that make it (none: the base)."""

    caption: str
    parts: list[Part]


def scaling(delta: Path, scales: Sequence[float]) -> list[Column]:
    """One delta at several strengths s (Fig. 26)."""
    return [Column(f"s = {scale:g}", [(delta, scale)]) for scale in scales]


def interpolation(first: Path, second: Path, points: int) -> list[Column]:
    """Eq. 5, αδ₁ + (1 − α)δ₂, from the second alone to the first alone in `points` even steps."""
    if points < 2:
        raise SvdiffError(f"{points} points to interpolate at; expected at least 2, the two ends")
    alphas = [place / (points - 1) for place in range(points)]
    return [Column(f"α = {alpha:.2g}", [(first, alpha), (second, 1 - alpha)]) for alpha in alphas]


def addition(deltas: Sequence[tuple[Path, float]], names: Sequence[str]) -> list[Column]:
    """Eq. 4: each delta alone, and all together (Fig. 8, 16)."""
    alone = [Column(name, [part]) for name, part in zip(names, deltas, strict=True)]
    return [*alone, Column(" + ".join(names), list(deltas))]


def style_mixing(geometry: Path, appearance: Path, layers: str | None = None) -> list[Column]:
    """Fig. 10: geometry from one delta, everything else from another; and the two the other way round.

    The paper's deltas of Fig. 10 are trained on UNet-2D; a column says which subset its delta shifts where it is another.
    `layers` is a regular expression of weight names that carry geometry; default: `geometry_layers`.
    Raises SvdiffError where it chooses no weight or all of them, or the deltas are not spectral.
    """
    a, b = SpectralDelta.load(geometry), SpectralDelta.load(appearance)
    names = a.tensors.keys() | b.tensors.keys()
    takes = geometry_layers(names) if layers is None else _matching(layers)
    chosen = sum(takes(name) for name in names)
    if chosen in (0, len(names)):
        raise SvdiffError(
            f"layers '{layers or 'of geometry'}' are {chosen} of the {len(names)} weights that the deltas shift; expected some "
            "but not all, such as 'mid_block'"
        )
    return [
        Column(f"geometry{_subset(a)}", [(geometry, 1.0)]),
        Column("mixed", [(mix_by_layer(a, b, takes), 1.0)]),
        Column("swapped", [(mix_by_layer(b, a, takes), 1.0)]),
        Column(f"appearance{_subset(b)}", [(appearance, 1.0)]),
    ]


def _subset(delta: SpectralDelta) -> str:
    """A second line of a caption: the subset of Table 1 that a delta shifts, unless it is that of Fig. 10."""
    subset = delta.metadata.get("subset", STYLE_SUBSET)
    return "" if subset == STYLE_SUBSET else f"\nshifts {subset}"


def _matching(pattern: str) -> Callable[[str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise SvdiffError(f"layers '{pattern}' is not a regular expression: {error}") from None
    return lambda name: compiled.search(name) is not None


def geometry_layers(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a weight carries geometry: from the last attention layer on the way down to the middle block.

    In Stable Diffusion 1.x that is what XTI calls (16, down, 1) – (8, down, 0): `down_blocks.2`, layer 1, to `mid_block`.
    """
    attentions = [
        (int(found[1]), int(found[2]))
        for name in names
        if (found := re.search(r"down_blocks\.(\d+)\.attentions\.(\d+)\.", name))
    ]
    start = max(attentions, default=(0, 0))

    def takes(name: str) -> bool:
        found = re.search(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.", name)
        if found is None:
            return "mid_block." in name
        after = found[2] == "downsamplers"  # follows the block's layers
        return (int(found[1]), float("inf") if after else int(found[3])) >= start

    return takes


def draw_strip(
    config: Config,
    columns: Sequence[Column],
    prompts: Sequence[str],
    seeds: Sequence[int],
    path: Path,
    settings: SampleConfig | None = None,
) -> Path:
    """Write a PNG with a row a prompt and seed and a column a model; the noise of a row is the same in all columns.

    `settings` say how; default: section `sample` with the paper's η = 0, without negative prompts.

    Raises SvdiffError for deltas that do not fit the base or each other.
    """
    check_writable(path)
    jobs = [Job(prompt, seed) for prompt in prompts for seed in seeds]
    settings = settings or config.sample.replaced({"eta": 0.0, "beta": 1.0, "negatives": []})
    pipe = load_pipeline(config.base)
    switch, drawn = Switch(pipe), []
    for caption, parts in columns:
        with switch.on(parts):
            drawn.append(draw_pictures(pipe, jobs, settings, progress=f"strip {caption}"))
    rows = [[images[place] for images in drawn] for place in range(len(jobs))]
    labels = [job.prompt if len(seeds) == 1 else f"{job.prompt}, seed {job.seed}" for job in jobs]
    with atomic_file(path) as temporary:
        plots.save(plots.captioned_grid(rows, labels, [column.caption for column in columns], cell=1.1), temporary)
    return path

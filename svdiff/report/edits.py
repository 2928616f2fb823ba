"""The page's section on edits of single pictures (Sec. 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from svdiff.config import Config
from svdiff.editing.stage import EDITS
from svdiff.report.figures import Figure, figure_file, read_json


class StartScores(NamedTuple):
    """Means over the targets of one start."""

    start: str
    how: str
    faithfulness: float
    edit: float


@dataclass(frozen=True)
class EditPart:
    """What the page shows of one edit."""

    name: str
    prompt: str
    sheet: Figure
    scores: list[StartScores]
    input_edit: float
    reconstruction_psnr: float
    autoencoder_psnr: float


def edit_parts(config: Config) -> list[EditPart]:
    """Every edit of the configuration that was made."""
    return [part for name in config.edits if (part := _part(config, name)) is not None]


def _part(config: Config, name: str) -> EditPart | None:
    request, numbers = config.edits[name], read_json(EDITS / name / "metrics.json")
    alt = f"“{request.prompt}” edited to {'; '.join(f'“{target}”' for target in request.targets)}"
    sheet = figure_file(EDITS / name / "sheet.png", alt)
    if sheet is None or not numbers:
        return None
    scores = [
        StartScores(
            start,
            f"η {values.eta:g}, α {values.alpha:g}" if values.alpha < 1 else f"without inversion, η {values.eta:g}",
            numbers[f"{start}_faithfulness"],
            numbers[f"{start}_edit"],
        )
        for start, values in config.edit.starts.items()
        if f"{start}_edit" in numbers
    ]
    known = {key: numbers[key] for key in ("input_edit", "reconstruction_psnr", "autoencoder_psnr")}
    return EditPart(name, request.prompt, sheet, scores, **known)

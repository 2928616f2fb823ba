"""Pictures as parts of the page: encoded into it, with a description for those who do not see them."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svdiff.evaluation import plots

LARGEST_WEBP = 16_383  # pixels a side that the format has


@dataclass(frozen=True)
class Figure:
    """A picture in the page."""

    uri: str
    alt: str
    width: int
    height: int
    caption: str = ""


def picture_figure(image: Image.Image, alt: str, caption: str = "", side: int | None = None) -> Figure:
    """A picture as part of the page, at most `side` pixels wide and high."""
    if side and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Figure(_uri(image, quality=90, use_sharp_yuv=True), alt, *image.size, caption)


def chart(figure: plots.Figure, alt: str) -> Figure:
    """A matplotlib figure."""
    return _half_size(Image.open(io.BytesIO(plots.to_png(figure))), alt)


def figure_file(path: Path, alt: str) -> Figure | None:
    """A figure that a stage has written, None if it has not."""
    return _half_size(Image.open(path), alt) if path.is_file() else None


def _half_size(image: Image.Image, alt: str) -> Figure:
    """A figure shown at half its pixels: sharp on dense screens."""
    return Figure(_uri(image.convert("RGB"), lossless=True), alt, image.width // 2, image.height // 2)


def _uri(image: Image.Image, **options: Any) -> str:
    """WebP: less than half of PNG's bytes, which a page of hundreds of concepts needs."""
    buffer = io.BytesIO()
    if max(image.size) > LARGEST_WEBP:
        image = image.copy()
        image.thumbnail((LARGEST_WEBP, LARGEST_WEBP))
    image.save(buffer, "WEBP", method=5, **options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def read_json(path: Path) -> dict[str, Any]:
    """What a file says, nothing if it is not there."""
    return json.loads(path.read_text()) if path.is_file() else {}

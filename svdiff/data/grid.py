"""Grids: several pictures pasted side by side into one, for validation and contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Pictures of one size, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def contact_sheet(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    *,
    beneath: Sequence[Image.Image] = (),
    columns: int = 6,
    cell: int = 128,
) -> Image.Image:
    """Pictures with their captions on white, to look through; `beneath` puts a second picture under each.

    Pictures are resized to `cell` × `cell` pixels.
    """
    font = ImageFont.load_default(10)
    lines = [textwrap.wrap(caption, cell // 5) for caption in captions]
    text = 13 * max(len(wrapped) for wrapped in lines) + 6
    stacks = [images, beneath] if beneath else [images]
    width, height = cell + 8, len(stacks) * (cell + 2) + text
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, wrapped in enumerate(lines):
        left, top = i % columns * width + 4, i // columns * height + 2
        for row, stack in enumerate(stacks):
            picture = stack[i].resize((cell, cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left, top + row * (cell + 2)))
        draw.multiline_text((left, top + len(stacks) * (cell + 2)), "\n".join(wrapped), fill="black", font=font)
    return sheet

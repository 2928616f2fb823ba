"""Pictures of many scenes at once, on any device: drawings laid over flat backgrounds."""

from __future__ import annotations

import torch

PICTURE_SIZE = 64
#: The place of an object that is not there.
NOBODY = (-1, 0, 0, 0, 0)


def compose(table: torch.Tensor, places: torch.Tensor, backgrounds: torch.Tensor) -> torch.Tensor:
    """uint8 N×64×64×3 pictures.

    `table` holds all drawings' pixels (P×4 uint8, premultiplied RGBA, row by row), `places` (N×objects×5) for every
    object where its drawing starts in the table (-1: nobody), its side, left and upper corner in pixels, and whether it
    is mirrored; later objects cover earlier ones. `backgrounds` is N×3 uint8.
    """
    axis = torch.arange(PICTURE_SIZE, device=places.device)
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    pictures = backgrounds.view(-1, 1, 1, 3).int()
    for one in places.unbind(1):
        start, side, left, top, mirrored = (value.view(-1, 1, 1) for value in one.unbind(-1))
        u, v = x - left, y - top
        inside = (start >= 0) & (u >= 0) & (u < side) & (v >= 0) & (v < side)
        u = torch.where(mirrored > 0, side - 1 - u, u)
        pixels = table[torch.where(inside, start + v * side + u, 0)].int() * inside[..., None]
        pictures = pixels[..., :3] + (pictures * (255 - pixels[..., 3:]) + 127) // 255
    return pictures.clamp(max=255).to(torch.uint8)

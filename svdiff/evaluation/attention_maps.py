"""What the words of a prompt attend to, drawn before and after a training (Fig. 20, 24)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.files import atomic_file, check_writable
from svdiff.models import family_of, load_pipeline
from svdiff.sampling.images import check_prompts
from svdiff.sampling.noise import seeded_generators
from svdiff.sampling.stage import Switch
from svdiff.training.attention import AttentionRecorder, token_map, token_positions

VIEW = 192  # pixels of a drawn map
BEFORE = "untrained base"


def draw_attention(
    config: Config,
    deltas: dict[str, Path],
    prompt: str,
    words: Sequence[str],
    path: Path,
    *,
    seed: int = 0,
    layers: str = "",
    sides: Collection[int] | None = None,
) -> Path:
    """Draw the picture of `prompt`, and over it the map of each of `words`, for the base and for each of `deltas`.

    A row a model. The colours of a word have one scale in all rows, so that they can be compared.

    Args:
        config: base and sampling settings.
        deltas: delta files by the name that their row gets.
        prompt: without placeholders.
        words: words of the prompt.
        path: the PNG to write.
        seed: of the noise.
        layers, sides: which maps are averaged, see `AttentionRecorder`.

    Raises:
        SvdiffError: a word that is not in the prompt, no such layer, or a delta of another base.
    """
    check_writable(path)
    pipe = load_pipeline(config.base)
    if (family := family_of(pipe)).attention != "cross":
        raise SvdiffError(
            f"attention sheets show cross-attention maps, and {family.title} has joint attention of picture and text instead"
        )
    check_prompts(pipe, [prompt])
    seen = {BEFORE: picture_and_maps(pipe, config, prompt, words, seed, layers, sides)}
    switch = Switch(pipe)
    for name, delta in deltas.items():
        with switch.on([(delta, 1.0)]):
            seen[name] = picture_and_maps(pipe, config, prompt, words, seed, layers, sides)
    highest = [max(float(maps[place].max()) for _, maps in seen.values()) for place in range(len(words))]
    rows = [
        [picture, *(heat(picture, map_ / top) for map_, top in zip(maps, highest, strict=True))]
        for picture, maps in seen.values()
    ]
    with atomic_file(path) as temporary:
        plots.save(plots.captioned_grid(rows, list(seen), ["picture", *words], cell=1.3), temporary)
    return path


def picture_and_maps(
    pipe: Any,
    config: Config,
    prompt: str,
    words: Sequence[str],
    seed: int,
    layers: str = "",
    sides: Collection[int] | None = None,
) -> tuple[Image.Image, list[Tensor]]:
    """A picture, and for each word its map (side, side): the mean over sampling steps, layers and heads."""
    family = family_of(pipe)
    places = [token_positions(family.tokenizer, prompt, word) for word in words]
    sums: dict[str, Tensor] = {}

    def collect(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        for layer, maps in recorder.maps.items():
            # The last of the batch: under guidance the empty prompt comes first.
            sums[layer] = sums.get(layer, torch.zeros_like(maps[-1:])) + maps[-1:] / config.sample.steps
        return kwargs

    with AttentionRecorder(family.network, layers=layers, sides=sides) as recorder, torch.no_grad():
        [picture] = family.draw(
            [prompt],
            seeded_generators([seed]),
            steps=config.sample.steps,
            guidance=config.sample.guidance,
            eta=config.sample.eta,
            callback=collect,
        )
    return picture, [token_map(sums, [place])[0].cpu() for place in places]


def heat(picture: Image.Image, intensity: Tensor) -> Image.Image:
    """A map (side, side) of 0 to 1 in colours over the pale picture."""
    size = (VIEW, VIEW)
    grey = picture.convert("L").convert("RGB").resize(size, Image.Resampling.LANCZOS)
    smooth = Image.fromarray(intensity.float().numpy()).resize(size, Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.asarray(smooth).clip(0, 1))[..., :3]
    return Image.blend(grey, Image.fromarray((255 * colours).astype(np.uint8)), 0.65)

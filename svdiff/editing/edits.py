"""The pictures of an edit: what the fine-tuned model makes of one picture, with and without inversion (Sec. 3.4)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from svdiff.data.concepts import to_square
from svdiff.evaluation import plots
from svdiff.models import family_of
from svdiff.sampling.guidance import decode
from svdiff.sampling.inversion import edit_image, encode_images, invert, reconstruct

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdiff.config import EditingConfig

LABEL = 24  # letters a line beside the sheet


@dataclass(frozen=True)
class EditedPicture:
    """One picture and what was made of it.

    `table` has a row for each of `pictures`: prompt_index (0: the training prompt, then the targets), prompt, start, seed, file.
    """

    original: Image  # in the base's native size, as it was trained on
    autoencoded: Image  # through the autoencoder and back: no reconstruction can be better
    reconstruction: Image  # inverted and sampled again under the training prompt, with nothing random
    table: pd.DataFrame
    pictures: list[Image]


def edit_picture(
    pipe: Any, picture: Image, prompt: str, targets: Sequence[str], settings: EditingConfig, batch_size: int = 8
) -> EditedPicture:
    """Invert `picture` under each prompt, and sample each from every start of `settings` at its seeds.

    Args:
        pipe: the pipeline, fine-tuned on `picture` and `prompt`.
        picture: RGB of any size; its centred square is used, as in training.
        prompt: what was trained with.
        targets: the edited prompts.
        settings: section `edit` of params.yaml.
        batch_size: prompts inverted, or pictures sampled, together.
    """
    prompts = [prompt, *targets]
    original = to_square(picture, family_of(pipe).image_size)
    latents = encode_images(pipe, [original])
    slices = [prompts[place : place + batch_size] for place in range(0, len(prompts), batch_size)]
    inverted = torch.cat(
        [invert(pipe, latents.expand(len(some), -1, -1, -1), some, steps=settings.steps) for some in slices]
    )
    [autoencoded] = decode(pipe, latents)
    [reconstruction] = reconstruct(pipe, inverted[:1], [prompt], steps=settings.steps)
    rows: list[dict[str, object]] = []
    pictures: list[Image] = []
    for index, text in enumerate(tqdm(prompts, desc="edit", unit="prompt")):
        for name, start in settings.starts.items():
            for place in range(0, len(settings.seeds), batch_size):
                pictures += edit_image(
                    pipe,
                    inverted[index : index + 1],
                    text,
                    settings.seeds[place : place + batch_size],
                    steps=settings.steps,
                    guidance=settings.guidance,
                    eta=start.eta,
                    alpha=start.alpha,
                )
            rows += [
                {
                    "prompt_index": index,
                    "prompt": text,
                    "start": name,
                    "seed": seed,
                    "file": f"p{index:02d}-{name}-s{seed:04d}.png",
                }
                for seed in settings.seeds
            ]
    return EditedPicture(original, autoencoded, reconstruction, pd.DataFrame(rows), pictures)


def sheet(edited: EditedPicture, settings: EditingConfig) -> plots.Figure:
    """Side by side, a row a prompt: the input, its reconstruction, then each start at each seed (Fig. 7, 22)."""
    rows: list[list[Image]] = []
    labels: list[str] = []
    for _, chosen in edited.table.groupby("prompt_index"):
        rows.append([edited.original, edited.reconstruction, *(edited.pictures[place] for place in chosen.index)])
        labels.append(textwrap.fill(str(chosen["prompt"].iloc[0]), LABEL))
    columns = ["input", "reconstruction"]
    for name, start in settings.starts.items():
        columns += [f"{name}\nη {start.eta:g}, α {start.alpha:g}"] + [""] * (len(settings.seeds) - 1)
    return plots.captioned_grid(rows, labels, columns, cell=1.2)

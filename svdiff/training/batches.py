"""Batches of training examples: encoded pictures with their prompts, drawn as a pure function of seed and step.

Nothing here has a state: the pictures, the latents, the noise and the timesteps of step n follow from (seed, n) alone.
So a resumed run needs no sampler position and no random-generator state to be bit-identical to an uninterrupted one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from svdiff.data.cutmix import Region

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdiff.models import Family


def generator(*key: object) -> torch.Generator:
    """A CPU generator that depends on `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_indices(count: int, position: int, size: int, *key: object) -> list[int]:
    """Entries position … position+size−1 of an endless sequence that goes through range(count) in a new order each time."""
    chosen = []
    for place in range(position, position + size):
        epoch, offset = divmod(place, count)
        chosen.append(int(torch.randperm(count, generator=generator(*key, "epoch", epoch))[offset]))
    return chosen


def images_to_tensor(images: Sequence[Image]) -> Tensor:
    """RGB pictures of one size as (N, 3, H, W) in [−1, 1]."""
    import numpy as np

    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class LatentImages:
    """Pictures encoded once: mean and deviation of the autoencoder's posterior, each (N, C, h, w), already scaled."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, family: Family, images: Sequence[Image], batch_size: int = 8) -> LatentImages:
        """Encode pictures of one size."""
        parts = [
            family.to_latents(images_to_tensor(images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        means, deviations = zip(*parts, strict=True)
        return cls(torch.cat(means), torch.cat(deviations))

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, indices: list[int], random: torch.Generator) -> Tensor:
        """Latents z ~ q(z|x) of the pictures at `indices`: (len(indices), C, h, w)."""
        noise = torch.randn(len(indices), *self.mean.shape[1:], generator=random).to(self.mean.device)
        return self.mean[indices] + self.deviation[indices] * noise


WHOLE = Region(0.0, 0.0, 1.0, 1.0)


class Shown(NamedTuple):
    """A subject in a picture: its special token, its class word, and where it is."""

    token: str
    class_word: str
    region: Region = WHOLE


@dataclass(frozen=True)
class Examples:
    """Encoded pictures, the prompt of each, and the subjects in each (two in a mix, none in a prior image).

    `masks` (N, 1, h, w) from 0 to 1 weight the loss of each picture in the latents' positions; None: all of it counts.
    """

    latents: LatentImages
    prompts: list[str]
    shown: list[tuple[Shown, ...]]
    masks: Tensor | None = None

    @classmethod
    def alike(cls, latents: LatentImages, prompt: str, *shown: Shown) -> Examples:
        """Pictures that one prompt describes."""
        return cls(latents, [prompt] * len(latents), [shown] * len(latents))


@dataclass(frozen=True)
class Dataset:
    """What a training is shown: concepts, pairs and edits differ in nothing else.

    `order(n)` says which instance picture and which prior picture sample n shows; it is a pure function, so that a batch
    can be asked for again. `validation` are the instance pictures of the loss at fixed noise.
    """

    instance: Examples
    prior: Examples | None
    order: Callable[[int], tuple[int, int]]
    validation: list[int]

    @property
    def prompts(self) -> list[str]:
        """Every prompt that is trained with, once."""
        return list(dict.fromkeys(self.instance.prompts + (self.prior.prompts if self.prior else [])))


class Batch(NamedTuple):
    """Samples of one pass of the network: the first `instances` show what is learned, the rest are prior samples."""

    latents: Tensor
    prompts: list[str]
    shown: list[tuple[Shown, ...]]
    instances: int
    masks: Tensor | None = None

    def take(self, rows: list[int]) -> Batch:
        """Some rows, in order."""
        if len(rows) == len(self.prompts):
            return self
        return Batch(
            self.latents[rows],
            [self.prompts[row] for row in rows],
            [self.shown[row] for row in rows],
            sum(row < self.instances for row in rows),
            None if self.masks is None else self.masks[rows],
        )


def draw_batch(dataset: Dataset, number: int, size: int, random: torch.Generator) -> Batch:
    """Batch `number`: `size` instance samples, and as many prior samples where the dataset has any."""
    places = [dataset.order(position) for position in range(number * size, (number + 1) * size)]
    chosen: list[tuple[Examples, list[int]]] = [(dataset.instance, [instance for instance, _ in places])]
    if dataset.prior is not None:
        chosen.append((dataset.prior, [prior for _, prior in places]))
    latents = torch.cat([examples.latents.draw(indices, random) for examples, indices in chosen])
    masks = None
    if dataset.instance.masks is not None:
        masks = torch.ones_like(latents[:, :1])
        masks[:size] = dataset.instance.masks[chosen[0][1]].to(masks)
    return Batch(
        latents,
        [examples.prompts[i] for examples, indices in chosen for i in indices],
        [examples.shown[i] for examples, indices in chosen for i in indices],
        size,
        masks,
    )

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
    """Pictures encoded once: mean and deviation of the autoencoder's posterior, each (N, C, h, w), already scaled.

    Pictures of several shapes are lists of N tensors (C, h, w).
    """

    mean: Tensor | list[Tensor]
    deviation: Tensor | list[Tensor]

    @classmethod
    @torch.no_grad()
    def encode(cls, family: Family, images: Sequence[Image], batch_size: int = 8) -> LatentImages:
        """Encode pictures, those of one shape together."""
        shapes = list(dict.fromkeys(image.size for image in images))
        if len(shapes) > 1:
            places = [[i for i, image in enumerate(images) if image.size == shape] for shape in shapes]
            groups = [cls.encode(family, [images[i] for i in group], batch_size) for group in places]
            order = {i: (group, row) for group, rows in zip(groups, places, strict=True) for row, i in enumerate(rows)}
            found = [order[i] for i in range(len(images))]
            return cls([group.mean[row] for group, row in found], [group.deviation[row] for group, row in found])
        parts = [
            family.to_latents(images_to_tensor(images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
        means, deviations = zip(*parts, strict=True)
        return cls(torch.cat(means), torch.cat(deviations))

    def __len__(self) -> int:
        return len(self.mean)

    def draw(self, indices: list[int], random: torch.Generator) -> Tensor:
        """Latents z ~ q(z|x) of the pictures at `indices`, which have one shape: (len(indices), C, h, w)."""
        mean = stacked(self.mean, indices)
        noise = torch.randn(mean.shape, generator=random).to(mean.device)
        return mean + stacked(self.deviation, indices) * noise

    def by_shape(self, indices: Sequence[int]) -> list[list[int]]:
        """Pictures in groups of one shape."""
        groups: dict[torch.Size, list[int]] = {}
        for index in indices:
            groups.setdefault(self.mean[index].shape, []).append(index)
        return list(groups.values())


def stacked(tensors: Tensor | list[Tensor], indices: Sequence[int]) -> Tensor:
    """Some of the pictures' tensors, which have one shape, as one."""
    return tensors[list(indices)] if isinstance(tensors, Tensor) else torch.stack([tensors[i] for i in indices])


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
    masks: Tensor | list[Tensor] | None = None

    @classmethod
    def alike(cls, latents: LatentImages, prompt: str, *shown: Shown) -> Examples:
        """Pictures that one prompt describes."""
        return cls(latents, [prompt] * len(latents), [shown] * len(latents))


@dataclass(frozen=True)
class Dataset:
    """What a training is shown: concepts, pairs and edits differ in nothing else.

    `order(n)` says which instance picture and which prior picture sample n shows; it is a pure function, so that a batch
    can be asked for again. `validation` are the instance pictures of the loss at fixed noise. Where pictures have several
    shapes, `together(number, size)` are the instance pictures of a batch, which have one shape.
    """

    instance: Examples
    prior: Examples | None
    order: Callable[[int], tuple[int, int]]
    validation: list[int]
    together: Callable[[int, int], list[int]] | None = None

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

    def joined(self, prior: Batch) -> Batch:
        """With prior samples after the instance samples; all of those count."""
        masks = None if self.masks is None else torch.cat([self.masks, torch.ones_like(self.masks)])
        prompts, shown = self.prompts + prior.prompts, self.shown + prior.shown
        return Batch(torch.cat([self.latents, prior.latents]), prompts, shown, self.instances, masks)

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


def draw_batch(dataset: Dataset, number: int, size: int, random: torch.Generator) -> list[Batch]:
    """Batch `number`: `size` instance samples, and as many prior samples where the dataset has any.

    It is one pass of the network; where prior samples have another shape, two.
    """
    places = [dataset.order(position) for position in range(number * size, (number + 1) * size)]
    instances = [instance for instance, _ in places] if dataset.together is None else dataset.together(number, size)
    passes = [_batch(dataset.instance, instances, random)]
    if dataset.prior is None:
        return passes
    prior = _batch(dataset.prior, [prior for _, prior in places], random)
    return [passes[0].joined(prior)] if prior.latents.shape == passes[0].latents.shape else [*passes, prior]


def _batch(examples: Examples, indices: list[int], random: torch.Generator) -> Batch:
    latents = examples.latents.draw(indices, random)
    masks = None if examples.masks is None else stacked(examples.masks, indices).to(latents.device)
    prompts, shown = [examples.prompts[i] for i in indices], [examples.shown[i] for i in indices]
    return Batch(latents, prompts, shown, len(indices), masks)


def in_buckets(groups: Sequence[Sequence[int]], number: int, size: int, *key: object) -> list[int]:
    """The pictures of batch `number`, all of one group; each picture about as often as any other.

    In an epoch every group has as many batches as its pictures fill, in an order of the epoch's own.
    """
    turns = [group for group, pictures in enumerate(groups) for _ in range(-(-len(pictures) // size))]
    epoch = number // len(turns)
    order = [turns[i] for i in draw_indices(len(turns), epoch * len(turns), len(turns), *key, "buckets")]
    group = order[number % len(turns)]
    earlier = epoch * turns.count(group) + order[: number % len(turns)].count(group)
    pictures = groups[group]
    return [pictures[i] for i in draw_indices(len(pictures), earlier * size, size, *key, "bucket", group)]

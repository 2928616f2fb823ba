"""Reads what a concept, a pair or an edit is trained on: pictures, prompts, prior images, and the order they are shown in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from svdiff.catalogue import Entry
from svdiff.config import Config, TrainConfig
from svdiff.data.check import gated_pictures
from svdiff.data.concepts import (
    concept_folder,
    jittered,
    load_picture,
    mask_to_shape,
    to_shape,
    training_shape,
)
from svdiff.data.cutmix import choose
from svdiff.data.mixes import load_mixes, mix_folder
from svdiff.data.prior import load_prior_images, prior_folder
from svdiff.data.reading import ConceptImage
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file, sha256_tree
from svdiff.models import Family
from svdiff.training.batches import Dataset, Examples, LatentImages, Shown, draw_indices, in_buckets

JITTERS = 3  # variations in other light of each picture
VALIDATION_MIXES = 4  # mixes among the pictures of the fixed-noise loss


@dataclass(frozen=True)
class TrainingData:
    """The pictures of an entry and their words, read and checked before the base is loaded.

    `encode` runs the base's autoencoder on them; `reads` identifies the files, for the key of the resume state.
    """

    encode: Callable[[Family], Dataset]
    reads: dict[str, object]


def read_training_data(config: Config, entry: Entry, settings: TrainConfig) -> TrainingData:
    """The data of an entry. Raises SvdiffError for pictures that are missing or cannot be read."""
    return {"concept": _concept, "pair": _pair, "edit": _edit}[entry.kind](config, entry, settings)


def _concept(config: Config, entry: Entry, settings: TrainConfig) -> TrainingData:
    """The concept's pictures under one prompt, and the prior images of its class."""
    [(name, concept)] = entry.concepts.items()
    pictures = gated_pictures(config, name, settings.fit, masks=settings.masks == "loss")
    if settings.holdout >= len(pictures):
        raise SvdiffError(
            f"train.holdout is {settings.holdout}, and {concept_folder(name)} has {len(pictures)} pictures: none is left to "
            "train on; lower it or add pictures"
        )
    priors = load_prior_images(concept.class_word) if settings.prior_weight > 0 else []

    def encode(family: Family) -> Dataset:
        shown = Shown(concept.token, concept.class_word)
        trained = len(pictures) - settings.holdout
        shots = [shot for picture in pictures[:trained] for shot in _shots(picture, settings)] + pictures[trained:]
        latents = _encoded(family, [shot.image for shot in shots], settings.fit)
        instance = Examples(
            latents,
            [(shot.caption or settings.prompt).format(subject=concept.subject) for shot in shots],
            [(shown,)] * len(shots),
            _masks(shots, settings, family, latents),
        )
        prior = None
        if priors:
            prior = Examples.alike(_encoded(family, priors), config.prior.prompt.format(subject=concept.class_word))
        varied = len(shots) - settings.holdout
        held_out = list(range(varied if settings.holdout else 0, len(shots)))
        groups = latents.by_shape(range(varied))
        together = (lambda number, size: in_buckets(groups, number, size, settings.seed)) if len(groups) > 1 else None
        return Dataset(instance, prior, _in_turn(settings.seed, varied, len(priors)), held_out, together)

    reads: dict[str, object] = {
        "pictures": sha256_tree(concept_folder(name)),
        "priors": sha256_tree(prior_folder(concept.class_word)) if priors else None,
    }
    return TrainingData(encode, reads)


def _shots(picture: ConceptImage, settings: TrainConfig) -> list[ConceptImage]:
    """A picture and its variations: mirrored, and in other light."""
    shots = [picture]
    if settings.flip:
        mask = None if picture.mask is None else ImageOps.mirror(picture.mask)
        shots.append(replace(picture, image=ImageOps.mirror(picture.image), mask=mask))
    if settings.jitter:
        keys = [(settings.seed, picture.path.name, number) for number in range(JITTERS)]
        shots += [replace(picture, image=jittered(picture.image, settings.jitter, *key)) for key in keys]
    return shots


def _masks(
    shots: list[ConceptImage], settings: TrainConfig, family: Family, latents: LatentImages
) -> Tensor | list[Tensor] | None:
    """The mask of each picture, averaged over the areas of its latents, (1, h, w), as latents are kept; None where no mask
    is used.

    A picture without one counts whole.
    """
    if settings.masks == "ignore" or not any(shot.mask for shot in shots):
        return None
    found = []
    for shot, mean in zip(shots, latents.mean, strict=True):
        mask = shot.mask or Image.new("L", shot.image.size, "white")
        shape = _shape(shot.image, family, settings.fit)
        fitted = mask_to_shape(mask, shape, settings.fit if shot.mask else "crop")
        pixels = torch.from_numpy(np.array(fitted)).float() / 255
        found.append(torch.nn.functional.adaptive_avg_pool2d(pixels[None], tuple(mean.shape[-2:])))
    return torch.stack(found) if isinstance(latents.mean, Tensor) else found


def _shape(image: Image.Image, family: Family, fit: str) -> tuple[int, int]:
    return training_shape(image, family.image_size, fit, family.grid(family.configs))


def _in_turn(seed: int, pictures: int, priors: int) -> Callable[[int], tuple[int, int]]:
    """Every picture once an epoch, and every prior image once in theirs."""

    def order(sample: int) -> tuple[int, int]:
        prior = draw_indices(priors, sample, 1, seed, "prior")[0] if priors else 0
        return draw_indices(pictures, sample, 1, seed, "instance")[0], prior

    return order


def _pair(config: Config, entry: Entry, settings: TrainConfig) -> TrainingData:
    """Mixes and single pictures of the pair's dataset: each sample is a mix with `mix_probability`, else one concept alone.

    Mixes come first in the examples, then the concepts one after another; the prior pictures have the same order.
    """
    data = load_mixes(entry)
    mixes = data.mixes if settings.mix_probability > 0 else []
    singles = [(entry.concepts[name], pictures) for name, pictures in data.singles.items()]
    priors = [(entry.concepts[name], pictures) for name, pictures in data.priors.items()]

    def encode(family: Family) -> Dataset:
        instance = Examples(
            _encoded(family, [mix.image for mix in mixes] + [image for _, images in singles for image in images]),
            [mix.prompt for mix in mixes]
            + [settings.prompt.format(subject=concept.subject) for concept, images in singles for _ in images],
            [
                tuple(
                    Shown(entry.concepts[name].token, entry.concepts[name].class_word, region)
                    for name, region in mix.regions.items()
                )
                for mix in mixes
            ]
            + [(Shown(concept.token, concept.class_word),) for concept, images in singles for _ in images],
        )
        prior = None
        if settings.prior_weight > 0:
            mixed = [(mix.prior_image, mix.prior_prompt) for mix in mixes if mix.prior_image is not None]
            images = [image for image, _ in mixed] + [image for _, images in priors for image in images]
            prior = Examples(
                _encoded(family, images),
                [prompt for _, prompt in mixed]
                + [
                    config.prior.prompt.format(subject=concept.class_word) for concept, images in priors for _ in images
                ],
                [()] * len(images),
            )
        counts = [[len(images) for _, images in part] for part in (singles, priors)]
        counterparts = sum(mix.prior_image is not None for mix in mixes)
        order = _mixed(settings, len(mixes), counterparts, *counts)
        last = len(instance.prompts)
        validation = [*range(min(VALIDATION_MIXES, len(mixes))), *range(len(mixes), last)]
        return Dataset(instance, prior, order, validation)

    reads: dict[str, object] = {"mixes": sha256_tree(mix_folder(entry.name))}
    return TrainingData(encode, reads)


def _mixed(
    settings: TrainConfig, mixes: int, counterparts: int, singles: list[int], priors: list[int]
) -> Callable[[int], tuple[int, int]]:
    """Cut-Mix-Unmix (Sec. 4.2): a mix and its own prior counterpart, or a concept at random and a prior of its class.

    Of no `counterparts`, a prior of a class at random goes with a mix.
    """

    def order(sample: int) -> tuple[int, int]:
        choice = choose(settings.seed, sample, subjects=len(singles), mixes=mixes, probability=settings.mix_probability)

        def alone(counts: list[int], subject: int, part: str) -> int:
            start = sum(counts[:subject])
            return start + draw_indices(counts[subject], sample, 1, settings.seed, part, subject)[0]

        if choice.mixed and counterparts:
            return choice.number, choice.number
        if choice.mixed:
            return choice.number, alone(priors, choice.number % len(priors), "prior")
        single = mixes + alone(singles, choice.number, "instance")
        return single, counterparts + alone(priors, choice.number, "prior")

    return order


def _edit(config: Config, entry: Entry, settings: TrainConfig) -> TrainingData:
    """One picture under one prompt, which has no special token; no prior (Sec. 3.4)."""
    edit = config.edit_of(entry.name)
    picture = load_picture(edit.image).image

    def encode(family: Family) -> Dataset:
        return Dataset(Examples.alike(_encoded(family, [picture]), edit.prompt), None, lambda sample: (0, 0), [0])

    return TrainingData(encode, {"picture": sha256_file(edit.image), "prompt": edit.prompt})


def _encoded(family: Family, images: list[Image.Image], fit: str = "crop") -> LatentImages:
    return LatentImages.encode(family, [to_shape(image, _shape(image, family, fit), fit) for image in images])

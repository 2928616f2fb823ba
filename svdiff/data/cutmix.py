"""Cut-Mix-Unmix (Sec. 3.3): pictures cut from two subjects, with prompts that say where each of them is.

Everything random follows from (seed, index) alone: a stage makes mix number i, a training decides in iteration n, and both
can be asked again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
from PIL import Image, ImageOps

from svdiff.data.foreground import Colour, cut_out, ground
from svdiff.errors import SvdiffError
from svdiff.sections import Fit, Layout

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
PROBABILITY = 0.6  # Sec. 4.2
WHITE: Colour = (255, 255, 255)
EIGHTHS = 8  # of a picture, by which subjects that are cut out are moved
HALF = 128  # of 255: what is less covered than this is not counted as the subject's size
# In the words of each layout: with positions, with positions in the other order, without.
_POSITIONS = {
    "left-right": ("{a} on the left and {article} {b} on the right", "{b} on the right and {article} {a} on the left"),
    "up-down": ("{a} above {article} {b}", "{b} below {article} {a}"),
}


class Region(NamedTuple):
    """Where a subject is: fractions of width and height, 0 to 1, so that it fits pictures and attention maps alike."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box (left, top, right, bottom) in whole pixels of a picture or map."""
        return (
            round(self.left * width),
            round(self.top * height),
            round(self.right * width),
            round(self.bottom * height),
        )

    def mask(self, height: int, width: int) -> np.ndarray:
        """(height, width) float32: the share of each cell that lies in the region."""

        def share(low: float, high: float, cells: int) -> np.ndarray:
            edges = np.arange(cells + 1) / cells
            return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * cells

        return np.outer(share(self.top, self.bottom, height), share(self.left, self.right, width)).astype(np.float32)


class Mix(NamedTuple):
    """A mixed picture and the regions of its first (left or upper) and second subject."""

    image: Image.Image
    regions: tuple[Region, Region]


def make_mix(
    first: Image.Image,
    second: Image.Image,
    *,
    size: int,
    layout: Layout = "left-right",
    split: float = 0.5,
    fit: Fit = "cover",
    places: tuple[float, float] = (0.5, 0.5),
    colour: Colour = WHITE,
) -> Mix:
    """Put `first` into the left (upper) part of a `size` × `size` picture and `second` into the other.

    Args:
        first, second: RGB pictures of any size; RGBA ones are taken as cut out already by `cut-out`.
        size: side of the result in pixels.
        layout: side by side, or one above the other.
        split: share of the first part, between 0 and 1; the seam lies at the nearest pixel.
        fit: `cover` fills each part with the middle of its picture, as CutMix does; `contain` shows the whole picture and
            fills the rest with the colour of its border, so that nothing of a subject is cut off; `cut-out` lays both
            subjects over one plain background, so that there is no seam: as large as they are where they fit, and moved
            by eighths of the picture, which are whole positions of latents.
        places: where the pictures stand in parts that they do not fill: 0 left or upper, 1 right or lower.
        colour: of the background of `cut-out`.

    Raises:
        SvdiffError: an unknown layout or fit, a split that leaves nothing of one picture, or no subject to cut out.
    """
    if layout not in LAYOUTS:
        raise SvdiffError(f"layout is '{layout}'; expected one of {', '.join(LAYOUTS)}")
    if fit not in get_args(Fit):
        raise SvdiffError(f"fit is '{fit}'; expected one of {', '.join(get_args(Fit))}")
    seam = round(split * size)
    if not 0 < seam < size:
        raise SvdiffError(f"split is {split}, which leaves nothing of one picture at {size} pixels; expected about 0.5")
    regions = split_regions(layout, seam / size)
    mixed = Image.new("RGB", (size, size), colour)
    for picture, region, place in zip((first, second), regions, places, strict=True):
        box = region.pixels(size, size)
        part = mixed.crop(box)
        if fit == "cut-out":
            _lay(part, _found(cut_subject(picture, size), "a picture"), (box[0], box[1]), size // EIGHTHS, place)
        else:
            part = _fitted(picture.convert("RGB"), part.size, fit, place)
        mixed.paste(part, box)
    return Mix(mixed, regions)


def cut_subject(picture: Image.Image, size: int) -> Image.Image | None:
    """The subject of a picture's middle square, as RGBA of `size` × `size`; None where it shows none before a plain background.

    It is cut out before it is reduced, so that it is sharp.
    """
    square = (min(picture.size),) * 2
    if picture.mode == "RGBA":
        cut: Image.Image | None = ImageOps.fit(picture, square)
    else:
        cut = cut_out(ImageOps.fit(picture.convert("RGB"), square))
    return None if cut is None else cut.resize((size, size), Image.Resampling.LANCZOS)


def _found(cut: Image.Image | None, what: str) -> Image.Image:
    if cut is None:
        raise SvdiffError(
            f"mix.fit is cut-out, and {what} shows no subject before a plain background; expected one whose border has one "
            "colour: set mix.fit to cover or contain"
        )
    return cut


def _extent(subject: Image.Image) -> tuple[int, int, int, int]:
    """Where in an RGBA picture the subject is: left, top, right, bottom."""
    covered = subject.getchannel("A").point([255 * (alpha >= HALF) for alpha in range(256)])
    return covered.getbbox() or (0, 0, *subject.size)


def _lay(part: Image.Image, subject: Image.Image, corner: tuple[int, int], step: int, place: float) -> None:
    """Lay a subject over a part of a picture that has its left upper corner at `corner`.

    It keeps its size and is moved by multiples of `step` pixels; where it is too large or no such place is left, it is shrunk
    and stands anywhere.
    """
    left, top, right, bottom = _extent(subject)
    if right - left > part.width or bottom - top > part.height:
        subject = ImageOps.contain(subject.crop((left, top, right, bottom)), part.size, method=Image.Resampling.LANCZOS)
        left, top, right, bottom, step = 0, 0, *subject.size, 1
    spot = []
    for start, end, room, shift in ((left, right, part.width, corner[0]), (top, bottom, part.height, corner[1])):
        spots = range(room - (end - start) + 1)
        kept = [at for at in spots if (at + shift - start) % step == 0] or spots
        spot.append(kept[min(int(place * len(kept)), len(kept) - 1)])
    part.paste(subject, (spot[0] - left, spot[1] - top), subject)


def seam_contrast(mix: Mix, layout: Layout) -> float:
    """How much the picture changes across its seam: mean absolute difference of the pixels on both sides, 0 to 255."""
    pixels = np.asarray(mix.image, np.float32)
    if layout == "up-down":
        pixels = pixels.swapaxes(0, 1)
    seam = mix.regions[1].pixels(*mix.image.size)[0 if layout == "left-right" else 1]
    return float(np.abs(pixels[:, seam] - pixels[:, seam - 1]).mean())


def split_regions(layout: Layout, at: float) -> tuple[Region, Region]:
    """The two parts of a picture that is split at the fraction `at` of its width (left-right) or height (up-down)."""
    if layout == "left-right":
        return Region(0.0, 0.0, at, 1.0), Region(at, 0.0, 1.0, 1.0)
    return Region(0.0, 0.0, 1.0, at), Region(0.0, at, 1.0, 1.0)


def _fitted(picture: Image.Image, size: tuple[int, int], fit: Fit, place: float) -> Image.Image:
    if fit == "cover":
        return ImageOps.fit(picture, size, method=Image.Resampling.LANCZOS)
    whole = ImageOps.contain(picture, size, method=Image.Resampling.LANCZOS)
    pixels = np.asarray(whole)
    upright = whole.height < size[1]
    sides = (pixels[0], pixels[-1]) if upright else (pixels[:, 0], pixels[:, -1])
    before, after = (tuple(np.median(side, axis=0).astype(int).tolist()) for side in sides)
    part = Image.new("RGB", size, before)
    corner = int(place * (size[0] - whole.width)), int(place * (size[1] - whole.height))
    part.paste(after, (0, corner[1], *size) if upright else (corner[0], 0, *size))
    part.paste(whole, corner)
    return part


def mix_prompts(first: str, second: str, *, layout: Layout = "left-right", article: str = "a") -> tuple[str, ...]:
    """What a mix shows, to stand for '{subject}' in a prompt such as 'a {subject}'.

    `first` is the left or upper subject, e.g. 'sks dog'. Two with positions, one in each order of the subjects, and two
    without.
    """
    forward, backward = (form.format(a=first, b=second, article=article) for form in _POSITIONS[layout])
    return forward, backward, f"{first} and {article} {second}", f"{second} and {article} {first}"


def prior_mix_prompts(
    first_class: str,
    second_class: str,
    *,
    template: str = "a {subject}",
    layouts: Sequence[Layout] = ("left-right",),
) -> list[str]:
    """The prior prompts of mixes of two classes in these layouts: the default negatives of Eq. 10 (supplement D)."""
    words = [words for layout in layouts for words in mix_prompts(first_class, second_class, layout=layout)]
    return list(dict.fromkeys(template.format(subject=subject) for subject in words))


@dataclass(frozen=True)
class Subject:
    """One of the subjects that are trained together: 'sks dog', its pictures, and the prior images of its class.

    `grounds` are colours of backgrounds, one of which is drawn for each mix of subjects that are cut out.
    """

    words: str
    class_word: str
    images: Sequence[Image.Image]
    priors: Sequence[Image.Image]
    grounds: Sequence[Colour] = (WHITE,)


@dataclass(frozen=True)
class MixRecipe:
    """How mixes are made."""

    size: int
    seed: int = 0
    layouts: tuple[Layout, ...] = ("left-right",)
    split: tuple[float, float] = (0.5, 0.5)  # the range that the first part's share is drawn from
    fit: Fit = "cover"
    mix_priors: bool = True  # a mix has a counterpart of prior images
    draws: int = 1  # of so many draws of two pictures the one with the faintest seam is kept
    prompt: str = "a {subject}"
    prior_prompt: str = "a {subject}"


@dataclass(frozen=True)
class MixedPair:
    """A mix of two subjects and its prior counterpart: the same cut and kind of prompt, of the classes' prior images.

    `prior_image` is None where the recipe mixes no priors.
    """

    subjects: tuple[int, int]  # left or upper first
    layout: Layout
    regions: tuple[Region, Region]
    image: Image.Image
    prompt: str
    prior_image: Image.Image | None
    prior_prompt: str


def with_cut_outs(subject: Subject, recipe: MixRecipe) -> Subject:
    """The subject for mixes by `cut-out`: its pictures, and priors that are mixed, cut out once, and the priors' backgrounds.

    Those are used that show it at most half as wide and high as they are, where there are any: to shrink it blurs it. Prior
    images that show nothing are left out.

    Raises:
        SvdiffError: a picture, or every prior image, shows no subject before a plain background.
    """
    images = [
        _found(cut_subject(image, recipe.size), f"picture {number} of '{subject.words}'")
        for number, image in enumerate(subject.images, 1)
    ]
    prepared = replace(subject, images=_small(images), grounds=[ground(prior) for prior in subject.priors])
    if not recipe.mix_priors:
        return prepared
    cuts = [cut for image in subject.priors if (cut := cut_subject(image, recipe.size)) is not None]
    return replace(prepared, priors=_small(cuts or [_found(None, f"every prior image of '{subject.class_word}'")]))


def _small(subjects: list[Image.Image]) -> list[Image.Image]:
    """Those at most half as wide and high as their pictures; all, where none is."""
    boxes = [_extent(subject) for subject in subjects]
    small = [
        subject
        for subject, (left, top, right, bottom) in zip(subjects, boxes, strict=True)
        if max(right - left, bottom - top) <= subject.width // 2
    ]
    return small or subjects


def mixed_pair(subjects: Sequence[Subject], recipe: MixRecipe, index: int) -> MixedPair:
    """Mix number `index`: two subjects drawn without replacement, a picture of each, layout, split, kind of prompt.

    By `cut-out`, `subjects` are as `with_cut_outs` makes them. Raises SvdiffError for fewer than two, or one without pictures or prior images.
    """
    if len(subjects) < 2:
        raise SvdiffError(f"Cut-Mix-Unmix mixes two subjects; found {len(subjects)}")
    for subject in subjects:
        if not subject.images or not subject.priors:
            missing = "prior images" if subject.images else "pictures"
            raise SvdiffError(f"'{subject.words}' has no {missing} to mix")
    draw = _random(recipe.seed, "mix", index)
    i, j = draw.sample(range(len(subjects)), 2)
    first, second = subjects[i], subjects[j]
    layout = draw.choice(recipe.layouts)
    split = draw.uniform(*recipe.split)
    kind = draw.choice((0, 0, 1, 1, 2, 3))  # with positions, in the other order, without: each in a third of the mixes

    def mix(a: Sequence[Image.Image], b: Sequence[Image.Image]) -> Mix:
        drawn = [(draw.choice(a), draw.choice(b)) for _ in range(recipe.draws)]
        made = (
            make_mix(
                *two,
                size=recipe.size,
                layout=layout,
                split=split,
                fit=recipe.fit,
                places=(draw.random(), draw.random()),
                colour=draw.choice(first.grounds),
            )
            for two in drawn
        )
        return min(made, key=lambda mix: seam_contrast(mix, layout))

    instance = mix(first.images, second.images)
    prior = mix(first.priors, second.priors).image if recipe.mix_priors else None
    words = mix_prompts(first.words, second.words, layout=layout)[kind]
    classes = mix_prompts(first.class_word, second.class_word, layout=layout)[kind]
    return MixedPair(
        subjects=(i, j),
        layout=layout,
        regions=instance.regions,
        image=instance.image,
        prompt=recipe.prompt.format(subject=words),
        prior_image=prior,
        prior_prompt=recipe.prior_prompt.format(subject=classes),
    )


class Choice(NamedTuple):
    """What an iteration shows: mix number `number`, or a picture of subject number `number` alone."""

    mixed: bool
    number: int


def choose(seed: int, iteration: int, *, subjects: int, mixes: int, probability: float = PROBABILITY) -> Choice:
    """One of `mixes` mixes with `probability`, else one of `subjects` subjects, each as likely as the others.

    `probability` 0 is joint training without Cut-Mix-Unmix (Sec. 4.2).
    """
    draw = _random(seed, "choice", iteration)
    if draw.random() < probability:
        return Choice(True, draw.randrange(mixes))
    return Choice(False, draw.randrange(subjects))


def _random(*key: object) -> random.Random:
    """A generator that depends on `key` alone, in every process."""
    return random.Random(repr(key))

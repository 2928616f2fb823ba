"""Stage `mix`: the dataset of a pair, as a folder that can be looked at, versioned and trained on.

    out/mix/<pair>/
        mixes.csv                 file, prior_file, prompt, prior_prompt, first, second, layout, split: a row a mix
        mixes/000.png, mixes/000-prior.png, …     a mix, and its counterpart of the classes' prior images (`mix_priors`)
        singles/<concept>/00.png, …               the pictures of each concept alone
        priors/<concept>/000.png, …               the prior images of its class
        sheet.png                 mixes with their prompts, priors beneath

It is all that the pair's training reads, so a picture that is replaced or removed here changes that training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from svdiff.catalogue import Entry
from svdiff.config import Config, MixConfig
from svdiff.data.check import gated_pictures
from svdiff.data.concepts import to_square
from svdiff.data.cutmix import MixedPair, MixRecipe, Region, Subject, mixed_pair, split_regions, with_cut_outs
from svdiff.data.grid import contact_sheet
from svdiff.data.prior import load_prior_images
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, read_table
from svdiff.models import native_size
from svdiff.sections import Layout

MIXES = Path("out/mix")
SPLITS = {"even": (0.5, 0.5), "random": (0.3, 0.7)}
SHEET = 24  # mixes shown


def mix_folder(pair: str) -> Path:
    """Where the dataset of a pair lies."""
    return MIXES / pair


def make_mixes(config: Config, pair: str) -> Path:
    """Write the dataset of `pair` to out/mix/<pair>/. The same configuration and pictures make the same bytes.

    Raises:
        SvdiffError: `pair` is not one, a concept folder cannot be read, or prior images are missing.
    """
    entry = pair_entry(config, pair)
    size, fit = native_size(config.base), "pad" if config.mix.fit == "contain" else "crop"
    pictures = {name: gated_pictures(config, name, fit) for name in entry.concepts}
    subjects = [
        Subject(
            words=concept.subject,
            class_word=concept.class_word,
            images=[to_square(picture.image, size, fit) for picture in pictures[name]],
            priors=[to_square(image, size) for image in load_prior_images(concept.class_word)],
        )
        for name, concept in entry.concepts.items()
    ]
    recipe = mix_recipe(config.mix, size, config.train_config(pair).prompt, config.prior.prompt)
    parts = subjects
    if config.mix.fit == "cut-out":  # of pictures at their own size
        own = [[picture.image for picture in found] for found in pictures.values()]
        parts = [
            with_cut_outs(replace(subject, images=images), recipe)
            for subject, images in zip(subjects, own, strict=True)
        ]
    mixes = [mixed_pair(parts, recipe, index) for index in range(config.mix.mixes)]
    with atomic_dir(mix_folder(pair)) as folder:
        rows = [_write_mix(folder, index, mix, list(entry.concepts)) for index, mix in enumerate(mixes)]
        pd.DataFrame(rows).to_csv(folder / "mixes.csv", index=False)
        for name, subject in zip(entry.concepts, subjects, strict=True):
            for part, images, digits in (("singles", subject.images, 2), ("priors", subject.priors, 3)):
                (folder / part / name).mkdir(parents=True)
                for index, image in enumerate(images):
                    image.save(folder / part / name / f"{index:0{digits}d}.png")
        shown = mixes[:SHEET]
        sheet = contact_sheet(
            [mix.image for mix in shown],
            [mix.prompt for mix in shown],
            beneath=[mix.prior_image for mix in shown if mix.prior_image],
        )
        sheet.save(folder / "sheet.png")
    return mix_folder(pair)


def pair_entry(config: Config, name: str) -> Entry:
    """The pair called `name`. Raises SvdiffError if that is something else."""
    entry = config.entry(name)
    if entry.kind != "pair":
        known = ", ".join(config.pairs) or "none"
        raise SvdiffError(f"'{name}' is a {entry.kind}; expected a pair, and params.yaml has {known} under `pairs:`")
    return entry


def mix_recipe(settings: MixConfig, size: int, prompt: str, prior_prompt: str) -> MixRecipe:
    """How the mixes of params.yaml are made, at `size` pixels."""
    return MixRecipe(
        size=size,
        seed=settings.seed,
        layouts=tuple(settings.layouts),
        split=SPLITS[settings.split],
        fit=settings.fit,
        draws=settings.draws,
        mix_priors=settings.mix_priors,
        prompt=prompt,
        prior_prompt=prior_prompt,
    )


def _write_mix(folder: Path, index: int, mix: MixedPair, names: list[str]) -> dict[str, object]:
    """Save a mix and its prior counterpart, where it has one; its row of mixes.csv."""
    (folder / "mixes").mkdir(exist_ok=True)
    file, prior_file = f"mixes/{index:03d}.png", f"mixes/{index:03d}-prior.png"
    mix.image.save(folder / file)
    counterpart = {}
    if mix.prior_image is not None:
        mix.prior_image.save(folder / prior_file)
        counterpart = {"prior_file": prior_file}
    return counterpart | {
        "file": file,
        "prompt": mix.prompt,
        "prior_prompt": mix.prior_prompt,
        "first": names[mix.subjects[0]],
        "second": names[mix.subjects[1]],
        "layout": mix.layout,
        "split": mix.regions[0].right if mix.layout == "left-right" else mix.regions[0].bottom,
    }


@dataclass(frozen=True)
class StoredMix:
    """A mix as the folder has it: picture, prior counterpart if any, prompts, and the region of each of its two concepts."""

    image: Image.Image
    prior_image: Image.Image | None
    prompt: str
    prior_prompt: str
    regions: dict[str, Region]


@dataclass(frozen=True)
class MixDataset:
    """What a pair is trained on: mixes, and of each concept its pictures and the prior images of its class."""

    mixes: list[StoredMix]
    singles: dict[str, list[Image.Image]]
    priors: dict[str, list[Image.Image]]


def load_mixes(entry: Entry) -> MixDataset:
    """Read the dataset of a pair.

    Raises SvdiffError if the stage `mix` has not run, or was run for other concepts.
    """
    folder = mix_folder(entry.name)
    fix = f"make it with `dvc repro mix@{entry.name}`, or `svdiff mix {entry.name}`"
    if not (folder / "mixes.csv").is_file():
        raise SvdiffError(f"{folder}/mixes.csv is missing; {fix}")
    table = read_table(folder / "mixes.csv")
    foreign = set(table["first"]) | set(table["second"])
    parts = {part: {name: _pictures(folder / part / name) for name in entry.concepts} for part in ("singles", "priors")}
    empty = [f"{part}/{name}" for part, named in parts.items() for name, pictures in named.items() if not pictures]
    if empty or not foreign <= set(entry.concepts):
        found = f"nothing in {empty[0]}" if empty else f"mixes of {', '.join(sorted(foreign))}"
        raise SvdiffError(f"{folder} holds {found}; expected pictures of {', '.join(entry.concepts)}: {fix}")
    return MixDataset([_stored(folder, row) for row in table.to_dict("records")], **parts)


def _stored(folder: Path, row: Mapping[Any, Any]) -> StoredMix:
    layout: Layout = "left-right" if row["layout"] == "left-right" else "up-down"
    regions = split_regions(layout, float(str(row["split"])))
    return StoredMix(
        _open(folder / str(row["file"])),
        _open(folder / str(row["prior_file"])) if "prior_file" in row else None,
        str(row["prompt"]),
        str(row["prior_prompt"]),
        dict(zip((str(row["first"]), str(row["second"])), regions, strict=True)),
    )


def _pictures(folder: Path) -> list[Image.Image]:
    return [_open(path) for path in sorted(folder.glob("*.png"))]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")

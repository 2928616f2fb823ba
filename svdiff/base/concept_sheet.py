"""A sheet of eight concepts trained on the base: whether it takes on a hand it never saw, and still obeys."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from svdiff.base.things import CONCEPTS, SPECIAL_WORDS
from svdiff.config import Config
from svdiff.files import atomic_file

#: By both hands; of each word the first concept of the list.
NAMES = (
    "openmoji-dog", "emojione-cat", "openmoji-panda", "openmoji-bear", "emojione-turtle", "openmoji-house",
    "openmoji-car", "emojione-frog",
)  # fmt: skip
#: None of them is a prompt of training.
PROMPTS = (
    "a {subject} on a blue background",
    "a big {subject} on a red background",
    "a small {subject} on the left on a yellow background",
    "a {subject} next to a tree",
    "a {subject} and a car",
    "a lion on the left and a {subject} on the right on a pink background",
)
CELL = 96


def with_concepts(config: Config, names: Sequence[str]) -> Config:
    """The configuration with these concepts of `data/concepts` in the place of its own."""
    words = {f"{artist.split('-')[0]}-{word}": word for artist, word in CONCEPTS}
    values: dict[str, Any] = config.model_dump(mode="json")
    values["concepts"] = {
        name: {"class_word": words[name], "token": token} for name, token in zip(names, SPECIAL_WORDS, strict=False)
    }
    values |= {"classes": list(dict.fromkeys(words[name] for name in names)), "pairs": {}, "edits": {}}
    values["rank"]["concepts"] = list(names[:1])
    return Config.model_validate(values)


def draw_concepts(config: Config, output: Path, work: Path, names: Sequence[str] = NAMES, seed: int = 0) -> Path:
    """Train `names` with the settings of `config`, and draw PROMPTS with each at one seed, to `output`; resumes.

    All else goes to `work`, a folder that looks like the repository. A row of the sheet: a picture of the concept, then
    one picture a prompt, none chosen.
    """
    from svdiff.models import load_pipeline
    from svdiff.sampling import Job
    from svdiff.sampling.prior import make_prior_images
    from svdiff.sampling.stage import draw_pictures, personalise
    from svdiff.training import train

    config = with_concepts(config, names)
    work.mkdir(parents=True, exist_ok=True)
    for needed in ("data", "models"):
        if not (work / needed).exists():
            (work / needed).symlink_to(Path(needed).resolve())
    rows = []
    with chdir(work):
        for name in names:
            concept = config.concepts[name]
            make_prior_images(config, concept.class_word)
            delta = train(config, name)
            pipe = load_pipeline(config.base)
            personalise(pipe, delta)
            jobs = [Job(prompt.format(subject=concept.subject), seed) for prompt in PROMPTS]
            rows.append((name, draw_pictures(pipe, jobs, config.sample, progress=f"draw {name}")))
    with atomic_file(output) as path:
        sheet(rows).save(path, quality=88)
    return output


def sheet(rows: Sequence[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Prompts above, and a row for each concept: the first of its pictures, then what was drawn."""
    heads = ["the concept", *(prompt.replace("{subject}", "[V]") for prompt in PROMPTS)]
    heads = ["\n".join(textwrap.wrap(head, 18)) for head in heads]
    font, gap = ImageFont.load_default(10), 4
    top = 8 + 13 * max(head.count("\n") + 1 for head in heads)
    picture = Image.new("RGB", ((len(PROMPTS) + 1) * (CELL + gap), top + len(rows) * (CELL + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for column, head in enumerate(heads):
        draw.multiline_text((column * (CELL + gap) + 2, 2), head, fill="black", font=font, spacing=1)
    for index, (name, drawn) in enumerate(rows):
        first = Image.open(min(Path("data/concepts", name).glob("*.png"))).convert("RGB")
        for column, cell in enumerate((first, *drawn)):
            place = column * (CELL + gap), top + index * (CELL + gap)
            picture.paste(cell.resize((CELL, CELL), Image.Resampling.LANCZOS), place)
    return picture

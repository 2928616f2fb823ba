"""Parameters that several flows have: their types for the UI, and the check of names before any work."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from svdiff.config import Config, load_config
from svdiff.data.concepts import concept_folder, load_concept_images, load_picture
from svdiff.words import NAME

# What the UI checks before a run is made, and shows beside the descriptions of the docstrings.
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
Minutes = Annotated[float, Field(gt=0, le=7 * 24 * 60)]


def check(*names: str) -> Config:
    """params.yaml of the current folder, in which all `names` must be, with pictures that can be read.

    Raises SvdiffError before any work, naming the concept or the file.
    """
    config = load_config()
    for name in names:
        for concept in config.entry(name).concepts:
            load_concept_images(concept_folder(concept))
        if name in config.edits:
            load_picture(config.edits[name].image)
    return config

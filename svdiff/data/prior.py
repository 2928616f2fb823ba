"""Prior images (Sec. 3.2): what the base itself draws for a class word, against language drift."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from svdiff.errors import SvdiffError


def prior_folder(class_word: str) -> Path:
    """Where the prior images of a class lie."""
    return Path("out/prior") / class_word


def load_prior_images(class_word: str) -> list[Image.Image]:
    """The prior images of a class, in order. Raises SvdiffError if the `prior` stage has not run."""
    folder = prior_folder(class_word)
    files = sorted(folder.glob("*.png"))
    if not files:
        raise SvdiffError(f"no prior images in {folder}/; make them with `svdiff prior {class_word}`")
    return [Image.open(file).convert("RGB") for file in files]

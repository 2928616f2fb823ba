"""Which bases are taken, and what is said of the others before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from svdiff.cli.spectral import subsets
from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError
from svdiff.models import load_pipeline, native_size

OTHERS = ("StableDiffusionImg2ImgPipeline", "PixArtAlphaPipeline", "StableDiffusionInpaintPipeline")


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of a supported base, to make another of."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("found", OTHERS)
def test_another_architecture_is_refused_in_one_sentence(folder: Path, found: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": found}))
    config = BaseModelConfig(model=str(folder))
    for refused in (lambda: load_pipeline(config), lambda: native_size(config), lambda: subsets(base=str(folder))):
        with pytest.raises(SvdiffError, match=f"is a {found}; supported are StableDiffusionPipeline") as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("found", OTHERS)
def test_another_architecture_on_the_hub_is_refused_before_its_weights(monkeypatch, found: str) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {"_class_name": found})
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(SvdiffError, match=f"'somebody/model' is a {found}; supported are StableDiffusionPipeline"):
        load_pipeline(BaseModelConfig(model="somebody/model"))


def test_a_folder_that_is_no_base_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match=r"without model_index\.json; expected a diffusers folder"):
        load_pipeline(BaseModelConfig(model=str(tmp_path)))
    with pytest.raises(SvdiffError, match="is not a folder here"):
        load_pipeline(BaseModelConfig(model=str(tmp_path / "nowhere")))

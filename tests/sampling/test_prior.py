"""Stage `prior`: what is drawn, what is kept, and what makes it anew."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from svdiff.check import check
from svdiff.config import BaseModelConfig, Config
from svdiff.data.prior import load_prior_images, prior_folder
from svdiff.errors import SvdiffError
from svdiff.models import load_pipeline, scratch
from svdiff.sampling import Job, sample_images
from svdiff.sampling.prior import make_prior_images


def configured(tiny_base: Path, **prior: object) -> Config:
    return Config.model_validate(
        {
            "base": {"model": str(tiny_base)},
            "classes": ["dog"],
            "concepts": {"one": {"class_word": "dog", "token": "sks"}},
            "prior": {"images": 3, "steps": 2, **prior},
            "sample": {"prompts": ["a {subject}"], "seeds": [0], "steps": 2},
            "rank": {"concepts": ["one"]},
        }
    )


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))


def stored() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (scratch() / "prior").rglob("*.png")}


def test_prior_images_are_the_bases_own(tiny_base: Path) -> None:
    config = configured(tiny_base, eta=1.0, seed=5)
    make_prior_images(config, "dog")
    pipe = load_pipeline(config.base)
    expected = sample_images(pipe, [Job("a dog", 5 + i) for i in range(3)], steps=2, guidance=3.0, eta=1.0)
    found = load_prior_images("dog")
    assert [image.tobytes() for image in found] == [image.tobytes() for image in expected]
    table = pd.read_csv(prior_folder("dog") / "prompts.csv")
    assert table.seed.tolist() == [5, 6, 7]
    assert set(table.prompt) == {"a dog"}


def test_what_is_drawn_is_kept_and_other_settings_draw_anew(tiny_base: Path) -> None:
    make_prior_images(configured(tiny_base), "dog")
    before = stored()
    lost = min(before)
    lost.unlink()  # as after a kill before it was made
    make_prior_images(configured(tiny_base, images=5), "dog")
    after = stored()
    assert len(after) == 5
    assert [path for path in before if path != lost and after[path] != before[path]] == []
    for changed in ({"eta": 1.0}, {"guidance": 2.0}, {"seed": 1}, {"prompt": "a photo of a {subject}"}):
        count = len(stored())
        make_prior_images(configured(tiny_base, **changed), "dog")
        assert len(stored()) == count + 3, changed
    larger = configured(tiny_base).model_copy(update={"base": BaseModelConfig(model=str(tiny_base), resolution=24)})
    make_prior_images(larger, "dog")
    assert Image.open(prior_folder("dog") / "000.png").size == (24, 24)


def test_a_class_that_is_not_in_use_is_refused(tiny_base: Path) -> None:
    with pytest.raises(SvdiffError, match=r"class word 'cat' is not in classes \(dog\)"):
        make_prior_images(configured(tiny_base), "cat")
    with pytest.raises(SvdiffError, match="svdiff prior cat"):
        load_prior_images("cat")
    assert not Path("out").exists()


def with_own(tiny_base: Path, folder: str, **others: object) -> Config:
    values = configured(tiny_base).model_dump(exclude_unset=True) | {"classes": [], "regularisation": {"dog": folder}}
    return Config.model_validate(values | others)


def test_own_regularisation_images_are_the_prior_images_of_their_class(tiny_base: Path, tmp_path: Path) -> None:
    own = tmp_path / "dogs"
    own.mkdir()
    Image.new("RGB", (64, 40), "red").save(own / "a.jpg")
    Image.new("RGB", (40, 40), "blue").save(own / "b.png")
    (own / "a.txt").write_text("a dog on a sofa")  # a caption of somebody else's tool
    config = with_own(tiny_base, str(own))
    assert make_prior_images(config, "dog") == prior_folder("dog")
    red, blue = load_prior_images("dog")
    assert red.size == blue.size == (load_pipeline(config.base).unet.config.sample_size * 2,) * 2
    assert red.getpixel((0, 0))[0] > 200
    assert blue.getpixel((0, 0)) == (0, 0, 255)
    table = pd.read_csv(prior_folder("dog") / "prompts.csv")
    assert table.source.tolist() == ["a.jpg", "b.png"]
    assert set(table.prompt) == {"a dog"}
    assert not stored(), "the base draws nothing"


def test_a_class_is_drawn_by_the_base_or_brought_and_not_both(tiny_base: Path) -> None:
    with pytest.raises(ValueError, match="classes and regularisation name one class twice"):
        with_own(tiny_base, "dogs", classes=["Dog"])
    with pytest.raises(SvdiffError, match="found nothing there; expected a folder of pictures"):
        make_prior_images(with_own(tiny_base, "dogs"), "dog")
    with pytest.raises(SvdiffError, match=r"regularisation\.dog is 'dogs', which is no folder here"):
        check(with_own(tiny_base, "dogs"))

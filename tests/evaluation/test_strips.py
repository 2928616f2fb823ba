"""Strips: what stands in each column, and which layers carry geometry in known architectures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation.attention_maps import draw_attention, picture_and_maps
from svdiff.evaluation.strips import addition, draw_strip, geometry_layers, interpolation, scaling, style_mixing
from svdiff.models import load_pipeline
from svdiff.models.sizes import build
from svdiff.sampling.images import Job
from svdiff.sampling.stage import draw_pictures, find_delta, personalise_with
from svdiff.spectral import SpectralDelta, attach, load_basis
from svdiff.spectral.subsets import shift_sizes

PROMPT = "a sks dog"


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A checkout with two random deltas on the tiny base, called one and two."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    config = Config.model_validate(
        {
            "base": {"model": str(tiny_base)},
            "classes": ["dog"],
            "concepts": {name: {"class_word": "dog"} for name in ("one", "two")},
            "sample": {"prompts": ["a {subject}"], "steps": 2, "eta": 1.0},
            "rank": {"concepts": ["one"]},
        }
    )
    pipe = load_pipeline(config.base)
    shifts = attach(pipe.unet, load_basis(pipe.unet, tmp_path / "scratch/bases"))
    for seed, name in enumerate(config.concepts):
        random = torch.Generator().manual_seed(seed)
        delta = shifts.delta().map(lambda _, v: 0.5 * torch.randn(v.shape, generator=random))  # noqa: B023
        delta.save(Path("out/train") / name / "delta.safetensors")
    return config


def picture(config: Config, *parts: tuple[Path | SpectralDelta, float]) -> bytes:
    pipe = load_pipeline(config.base)
    if parts:
        personalise_with(pipe, list(parts))
    return draw_pictures(pipe, [Job(PROMPT, 0)], config.sample)[0].tobytes()


def test_columns_are_the_sums_that_they_say(checkout: Config) -> None:
    (one, _), (two, weight) = find_delta("one"), find_delta("two:0.25")
    assert weight == 0.25
    assert [parts for _, parts in scaling(one, [0, 2])] == [[(one, 0)], [(one, 2)]]
    assert [parts for _, parts in interpolation(one, two, 3)] == [
        [(one, 0.0), (two, 1.0)],
        [(one, 0.5), (two, 0.5)],
        [(one, 1.0), (two, 0.0)],
    ]
    columns = addition([(one, 1.0), (two, weight)], ["one", "two:0.25"])
    assert [column.caption for column in columns] == ["one", "two:0.25", "one + two:0.25"]
    assert columns[-1].parts == [(one, 1.0), (two, 0.25)]
    total = SpectralDelta.load(one) + 0.25 * SpectralDelta.load(two)
    assert picture(checkout, *columns[-1].parts) == picture(checkout, (total, 1.0)) != picture(checkout, (one, 1.0))
    nothing, base = (
        np.frombuffer(drawn, np.uint8).astype(int) for drawn in (picture(checkout, (one, 0.0)), picture(checkout))
    )
    assert np.abs(nothing - base).max() <= 1, "factors may round otherwise than their product"


def test_style_mixing_takes_each_layer_from_its_delta(checkout: Config) -> None:
    one, two = (find_delta(name)[0] for name in ("one", "two"))
    _, mixed, swapped, _ = style_mixing(one, two)
    a, b, m, s = (SpectralDelta.load(one), SpectralDelta.load(two), mixed.parts[0][0], swapped.parts[0][0])
    assert isinstance(m, SpectralDelta)
    assert isinstance(s, SpectralDelta)
    for name in a.tensors:
        deep = "mid_block" in name or any(part in name for part in ("down_blocks.0.", "down_blocks.1."))
        assert torch.equal(m.tensors[name], (a if deep else b).tensors[name])
        assert torch.equal(s.tensors[name], (b if deep else a).tensors[name])
    with pytest.raises(SvdiffError, match="0 of the"):
        style_mixing(one, two, "nothing")
    with pytest.raises(SvdiffError, match="not a regular expression"):
        style_mixing(one, two, "(")


def test_geometry_layers_of_stable_diffusion_are_those_of_the_paper() -> None:
    """(16, down, 1) – (8, down, 0) of XTI: the second layer at 16 × 16 on the way down, to the middle block."""
    names = [f"unet.{name}" for name in shift_sizes(build("sd15"), "UNet-2D")]
    takes = geometry_layers(names)
    chosen = {".".join(name.split(".")[1:5]) for name in names if takes(name)}
    attention = {name for name in chosen if "attentions" in name}
    assert attention == {"down_blocks.2.attentions.1", "mid_block.attentions.0.norm"} or attention == {
        "down_blocks.2.attentions.1",
        *(name for name in attention if name.startswith("mid_block.attentions.0")),
    }
    assert {name for name in chosen if name.startswith("down_blocks.3.resnets")} == {
        "down_blocks.3.resnets.0",
        "down_blocks.3.resnets.1",
    }
    assert "down_blocks.2.resnets.1" in chosen
    assert not any(
        name.startswith(("down_blocks.0", "down_blocks.1", "down_blocks.2.resnets.0", "up_")) for name in chosen
    )


def test_a_strip_has_a_column_a_model_and_leaves_the_base_alone(checkout: Config) -> None:
    one, two = (find_delta(name)[0] for name in ("one", "two"))
    path = draw_strip(checkout, interpolation(one, two, 3), [PROMPT], [0, 1], Path("strips/strip.png"))
    with Image.open(path) as strip:
        assert strip.width > strip.height
    again = draw_strip(checkout, interpolation(one, two, 3), [PROMPT], [0, 1], Path("again.png"))
    assert path.read_bytes() == again.read_bytes()


def test_deltas_are_found_by_name_and_by_file(checkout: Config) -> None:
    assert find_delta("one") == (Path("out/train/one/delta.safetensors"), 1.0)
    assert find_delta("out/train/two/delta.safetensors:-0.5") == (Path("out/train/two/delta.safetensors"), -0.5)
    with pytest.raises(SvdiffError, match="three"):
        find_delta("three")
    with pytest.raises(SvdiffError, match="a weight is expected"):
        find_delta("one:much")


def test_attention_is_drawn_before_and_after(checkout: Config) -> None:
    path = draw_attention(checkout, {"one": find_delta("one")[0]}, PROMPT, ["sks", "dog"], Path("maps.png"))
    with Image.open(path) as sheet:
        assert sheet.width > sheet.height  # two rows of three
    pipe = load_pipeline(checkout.base)
    before = pipe.unet.attn_processors
    image, [special, coarse] = picture_and_maps(pipe, checkout, PROMPT, ["sks", "dog"], 0)
    assert pipe.unet.attn_processors == before
    assert special.shape == coarse.shape
    assert float(special.min()) > 0
    assert float(special.max()) < 1
    # Recording changes no pixel.
    assert image.tobytes() == draw_pictures(pipe, [Job(PROMPT, 0)], checkout.sample)[0].tobytes()
    with pytest.raises(SvdiffError, match="'cat' is not in the prompt"):
        draw_attention(checkout, {}, PROMPT, ["cat"], Path("maps.png"))

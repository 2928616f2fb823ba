"""Cut-Mix-Unmix: what is cut where, what the prompts say, and that all of it follows from (seed, index)."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from svdiff.data.cutmix import (
    Mix,
    MixRecipe,
    Region,
    Subject,
    choose,
    cut_subject,
    make_mix,
    mix_prompts,
    mixed_pair,
    prior_mix_prompts,
    seam_contrast,
    with_cut_outs,
)
from svdiff.errors import SvdiffError

COLOURS = {"sks dog": "red", "zwx cat": "blue", "olis panda": "green"}


def subjects(count: int = 3) -> list[Subject]:
    """Each subject has two shades of its own colour; its prior images are the same colour, darker."""
    shades = {
        "red": [(250, 0, 0), (200, 0, 0)],
        "blue": [(0, 0, 250), (0, 0, 200)],
        "green": [(0, 250, 0), (0, 200, 0)],
    }
    dark = {"red": (90, 0, 0), "blue": (0, 0, 90), "green": (0, 90, 0)}
    return [
        Subject(
            words,
            words.split()[1],
            [Image.new("RGB", (20, 20), shade) for shade in shades[colour]],
            [Image.new("RGB", (30, 30), dark[colour])],
        )
        for words, colour in list(COLOURS.items())[:count]
    ]


def inside(image: Image.Image, region: Region) -> np.ndarray:
    return np.asarray(image.crop(region.pixels(*image.size))).reshape(-1, 3)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["left-right", "up-down"]),
    st.sampled_from(["cover", "contain"]),
    st.integers(8, 70),
    st.floats(0.2, 0.8),
)
def test_each_region_shows_its_own_picture_only(layout, fit, size: int, split: float) -> None:
    red, blue = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (17, 51), "blue")
    mix = make_mix(red, blue, size=size, layout=layout, split=split, fit=fit)
    assert mix.image.size == (size, size)
    assert (inside(mix.image, mix.regions[0]) == (255, 0, 0)).all()
    assert (inside(mix.image, mix.regions[1]) == (0, 0, 255)).all()
    masks = [region.mask(size, size) for region in mix.regions]
    np.testing.assert_allclose(masks[0] + masks[1], 1, atol=1e-5)
    assert masks[0].mean() == pytest.approx(round(split * size) / size, abs=1e-5)
    seam = round(split * size)
    part = masks[0][:, :seam] if layout == "left-right" else masks[0][:seam]
    np.testing.assert_allclose(part, 1, atol=1e-5)


def test_cover_is_the_middle_of_the_picture_and_contain_the_whole() -> None:
    values = np.zeros((32, 32, 3), np.uint8)
    values[:, :, 0] = np.arange(32)[None] * 8  # red grows from left to right
    picture, white = Image.fromarray(values), Image.new("RGB", (32, 32), "white")
    covered = np.asarray(make_mix(picture, white, size=32).image)
    assert np.array_equal(covered[:, :16], values[:, 8:24])
    assert (covered[:, 16:] == 255).all()
    contained = np.asarray(make_mix(picture, white, size=32, fit="contain").image)[:, :16, 0].astype(int)
    assert contained.min() < 16  # both ends are there
    assert contained.max() > 232
    assert (
        abs(int(contained[0, 0]) - np.median(contained[9])) < 9
    )  # above the picture there is the colour of its border
    assert (contained[0] == contained[0, 0]).all()


def test_contained_pictures_stand_anywhere_so_that_few_pictures_make_many_mixes() -> None:
    pictures = [Image.new("RGB", (20, 20), "white") for _ in range(2)]
    for picture, colour in zip(pictures, ("red", "blue"), strict=True):
        picture.paste(colour, (6, 6, 14, 14))
    group = [Subject(f"sks {word}", word, [picture], [picture]) for word, picture in zip("ab", pictures, strict=True)]
    recipe = MixRecipe(size=64, fit="contain", draws=4)
    assert len({mixed_pair(group, recipe, index).image.tobytes() for index in range(200)}) > 180
    high, low = (make_mix(*pictures, size=32, fit="contain", places=(at, at)).image for at in (0.0, 1.0))
    assert (
        np.argwhere(np.asarray(high)[..., 1] < 99)[:, 0].max() < np.argwhere(np.asarray(low)[..., 1] < 99)[:, 0].min()
    )


def ring(colour: str, background: str, side: int, at: tuple[int, int], size: int = 256) -> Image.Image:
    """A subject with a hole through which its background is seen."""
    picture = Image.new("RGB", (4 * size, 4 * size), background)
    left, top = 4 * at[0], 4 * at[1]
    draw = ImageDraw.Draw(picture)
    draw.ellipse((left, top, left + 4 * side, top + 4 * side), fill=colour)
    hole = side // 4
    draw.ellipse((left + 4 * hole, top + 4 * hole, left + 12 * hole, top + 12 * hole), fill=background)
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def test_subjects_that_are_cut_out_stand_whole_and_as_large_as_they_were_on_one_background() -> None:
    first, second = ring("red", "yellow", 96, (8, 40)), ring("blue", "white", 112, (132, 100))
    mix = make_mix(first, second, size=64, fit="cut-out", places=(0.0, 0.99), colour=(0, 128, 0))
    expected = Image.new("RGB", (64, 64), (0, 128, 0))
    # Moved by eighths of the picture, and not at all where that would leave the half.
    alone = {"red": (2, 2), "blue": (33, 33)}
    for colour, side, (left, top) in (("red", 24, alone["red"]), ("blue", 28, alone["blue"])):
        part = ring(colour, "#008000", 4 * side, (4 * left, 4 * top)).resize((64, 64), Image.Resampling.LANCZOS)
        box = (left, top, left + side + 1, top + side + 1)
        expected.paste(part.crop(box), box)
    difference = np.abs(np.asarray(mix.image, int) - np.asarray(expected, int)).max(axis=2)
    assert (difference > 60).mean() < 0.01
    assert {mix.image.getpixel(spot) for spot in ((0, 63), (63, 0), (31, 63))} == {(0, 128, 0)}


def test_a_subject_that_is_too_large_is_shrunk_into_its_half() -> None:
    large = ring("red", "white", 200, (20, 20))
    mix = make_mix(large, ring("blue", "white", 96, (40, 40)), size=64, fit="cut-out")
    red = np.argwhere((np.asarray(mix.image)[..., 0] > 200) & (np.asarray(mix.image)[..., 1] < 90))
    assert red[:, 1].max() < 32
    assert np.ptp(red[:, 0]) > 25


def test_mixes_of_cut_outs_are_made_of_pictures_whose_subject_fits_where_there_are_any() -> None:
    small, large, blank = (
        ring("red", "white", 96, (40, 40)),
        ring("red", "white", 200, (20, 20)),
        Image.new("RGB", (64, 64)),
    )
    recipe, fitting = MixRecipe(size=64, fit="cut-out"), cut_subject(small, 64)
    prepared = with_cut_outs(Subject("sks dog", "dog", [large, small], [blank, small, large]), recipe)
    assert list(prepared.images) == list(prepared.priors) == [fitting]
    assert list(with_cut_outs(Subject("sks dog", "dog", [large], [large]), recipe).images) == [cut_subject(large, 64)]
    with pytest.raises(SvdiffError, match="picture 2 of 'sks dog' shows no subject"):
        with_cut_outs(Subject("sks dog", "dog", [small, blank], [small]), recipe)
    with pytest.raises(SvdiffError, match="every prior image of 'dog' shows no subject"):
        with_cut_outs(Subject("sks dog", "dog", [small], [blank]), recipe)


def test_cut_outs_stand_on_the_backgrounds_of_prior_images() -> None:
    pictures = [ring(colour, "white", 96, (40, 40)) for colour in ("red", "blue")]
    priors = [ring("black", colour, 200, (20, 20)) for colour in ("#800000", "#008000", "#000080")]
    recipe = MixRecipe(size=64, fit="cut-out", mix_priors=False)
    group = [
        with_cut_outs(Subject(f"sks {word}", word, [picture], priors), recipe)
        for word, picture in zip("ab", pictures, strict=True)
    ]
    mixes = [mixed_pair(group, recipe, index) for index in range(60)]
    assert {mix.image.getpixel((0, 63)) for mix in mixes} >= {(128, 0, 0), (0, 128, 0), (0, 0, 128)}
    assert len({mix.image.tobytes() for mix in mixes}) > 40


def test_cutting_out_needs_a_subject_before_a_plain_background() -> None:
    plain = Image.new("RGB", (64, 64), "white")
    with pytest.raises(SvdiffError, match=r"mix\.fit is cut-out, and a picture shows no subject .* cover or contain"):
        make_mix(plain, ring("red", "white", 20, (9, 9), size=64), size=64, fit="cut-out")


def test_contain_fills_up_with_the_colours_of_the_border() -> None:
    tall = Image.new("RGB", (8, 16), (9, 90, 200))
    tall.paste((255, 0, 0), (3, 12, 5, 16))  # a subject that touches the lower border leaves no streak below it
    mix = make_mix(tall, Image.new("RGB", (16, 8), (0, 0, 0)), size=16, layout="up-down", fit="contain")
    upper = np.asarray(mix.image)[:8]
    assert (upper[:, [0, 1, -1]] == (9, 90, 200)).all()
    wide = Image.new("RGB", (16, 16), (9, 90, 200))
    wide.paste((255, 0, 0), (6, 12, 10, 16))
    left = np.asarray(make_mix(wide, wide, size=16, fit="contain").image)[:, :8]
    assert (left[:4] == (9, 90, 200)).all()
    assert (np.abs(left[12:].astype(int) - (9, 90, 200)) < 12).all()


def test_of_several_draws_the_faintest_seam_is_kept() -> None:
    colours = [(250, 250, 250), (20, 20, 20), (200, 30, 30), (30, 30, 200)]
    pictures = [Image.new("RGB", (16, 16), colour) for colour in colours]
    group = [Subject(f"sks {word}", word, pictures, pictures) for word in ("dog", "cat")]
    for layout in ("left-right", "up-down"):
        once, often = (MixRecipe(size=16, layouts=(layout,), draws=draws) for draws in (1, 64))
        contrasts = [
            seam_contrast(Mix(m.image, m.regions), layout) for m in (mixed_pair(group, once, i) for i in range(8))
        ]
        assert max(contrasts) > 50
        for index in range(8):
            mix = mixed_pair(group, often, index)
            assert len(np.unique(np.asarray(mix.image).reshape(-1, 3), axis=0)) == 1
            assert len(np.unique(np.asarray(mix.prior_image).reshape(-1, 3), axis=0)) == 1


def test_mask_of_a_coarse_map_is_the_covered_share() -> None:
    np.testing.assert_allclose(Region(0, 0, 0.375, 1).mask(2, 4), [[1, 0.5, 0, 0]] * 2)
    np.testing.assert_allclose(Region(0, 0.25, 1, 1).mask(2, 2), [[0.5, 0.5], [1, 1]])


def test_prompts_say_where_each_subject_is_or_name_either_first() -> None:
    assert ["a " + words for words in mix_prompts("sks dog", "zwx cat")] == [
        "a sks dog on the left and a zwx cat on the right",
        "a zwx cat on the right and a sks dog on the left",
        "a sks dog and a zwx cat",
        "a zwx cat and a sks dog",
    ]
    assert mix_prompts("sks dog", "zwx cat", layout="up-down") == (
        "sks dog above a zwx cat",
        "zwx cat below a sks dog",
        "sks dog and a zwx cat",
        "zwx cat and a sks dog",
    )
    assert prior_mix_prompts("dog", "cat", template="photo of a {subject}") == [
        "photo of a dog on the left and a cat on the right",
        "photo of a cat on the right and a dog on the left",
        "photo of a dog and a cat",
        "photo of a cat and a dog",
    ]


@pytest.mark.parametrize("layouts", [("left-right",), ("up-down",), ("left-right", "up-down")])
def test_pairs_say_what_they_show(layouts) -> None:
    group = subjects()
    recipe = MixRecipe(size=32, layouts=layouts, split=(0.3, 0.7))
    kinds: Counter[int] = Counter()
    splits, seen = set(), set()
    for index in range(120):
        pair = mixed_pair(group, recipe, index)
        first, second = (group[i] for i in pair.subjects)
        assert first is not second
        seen.add(pair.subjects)
        assert pair.layout in layouts
        for subject, region in zip((first, second), pair.regions, strict=True):
            channel = ("red", "green", "blue").index(COLOURS[subject.words])
            assert (inside(pair.image, region).argmax(1) == channel).all()
            assert (inside(pair.image, region).max(1) > 180).all()
            assert (inside(pair.prior_image, region).argmax(1) == channel).all()
            assert (inside(pair.prior_image, region).max(1) == 90).all()
        words = [f"a {text}" for text in mix_prompts(first.words, second.words, layout=pair.layout)]
        kind = words.index(pair.prompt)
        prior = f"a {mix_prompts(first.class_word, second.class_word, layout=pair.layout)[kind]}"
        assert pair.prior_prompt == prior
        kinds[kind] += 1
        splits.add(pair.regions[0].right if pair.layout == "left-right" else pair.regions[0].bottom)
    assert seen == {(i, j) for i in range(3) for j in range(3) if i != j}
    assert all(20 < count < 60 for count in (kinds[0], kinds[1], kinds[2] + kinds[3]))
    assert min(kinds[2], kinds[3]) > 5
    assert min(splits) < 0.4
    assert max(splits) > 0.6
    assert all(0.28 < split < 0.72 for split in splits)


def test_the_fixed_split_is_the_middle() -> None:
    assert all(
        mixed_pair(subjects(2), MixRecipe(size=16), index).regions[0] == Region(0, 0, 0.5, 1) for index in range(5)
    )


def describe(pair) -> tuple:
    return pair.subjects, pair.layout, pair.regions, pair.prompt, pair.prior_prompt, pair.image.tobytes()


def test_mixes_follow_from_seed_and_index() -> None:
    group, recipe = subjects(), MixRecipe(size=16, split=(0.3, 0.7), layouts=("left-right", "up-down"))
    forward = [describe(mixed_pair(group, recipe, index)) for index in range(8)]
    assert [describe(mixed_pair(group, recipe, index)) for index in reversed(range(8))] == forward[::-1]
    assert len(set(forward)) > 4
    other = MixRecipe(size=16, split=(0.3, 0.7), layouts=("left-right", "up-down"), seed=1)
    assert [describe(mixed_pair(group, other, index)) for index in range(8)] != forward


def test_choices_are_the_same_in_every_process() -> None:
    code = "from svdiff.data.cutmix import choose; print([choose(3, i, subjects=2, mixes=9)[1] for i in range(20)])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str([choose(3, i, subjects=2, mixes=9).number for i in range(20)])


def test_iterations_show_mixes_with_probability_0_6() -> None:
    choices = [choose(0, i, subjects=3, mixes=50) for i in range(4000)]
    mixed = [choice.number for choice in choices if choice.mixed]
    alone = Counter(choice.number for choice in choices if not choice.mixed)
    assert len(mixed) / 4000 == pytest.approx(0.6, abs=0.03)  # four standard deviations
    assert set(mixed) == set(range(50))
    assert all(alone[i] / 4000 == pytest.approx(0.4 / 3, abs=0.025) for i in range(3))
    assert not any(choose(0, i, subjects=3, mixes=50, probability=0.0).mixed for i in range(200))
    assert all(choose(0, i, subjects=3, mixes=50, probability=1.0).mixed for i in range(200))


def test_impossible_mixes_are_refused() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(SvdiffError, match="layout is 'diagonal'"):
        make_mix(image, image, size=8, layout="diagonal")  # type: ignore[arg-type]
    with pytest.raises(SvdiffError, match="fit is 'stretch'"):
        make_mix(image, image, size=8, fit="stretch")  # type: ignore[arg-type]
    with pytest.raises(SvdiffError, match=r"split is 0\.01"):
        make_mix(image, image, size=8, split=0.01)
    with pytest.raises(SvdiffError, match="found 1"):
        mixed_pair(subjects(1), MixRecipe(size=8), 0)
    lonely = [*subjects(1), Subject("zwx cat", "cat", [image], [])]
    with pytest.raises(SvdiffError, match="'zwx cat' has no prior images"):
        mixed_pair(lonely, MixRecipe(size=8), 0)

"""The gate before a training: folders as people have them, and what it says of them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from svdiff.data.check import Verdict, blur, check_folder
from svdiff.data.concepts import crop_loss, jittered, left_alone, load_concept_images, to_square
from svdiff.errors import SvdiffError


def scene(seed: int, width: int = 600, height: int = 600) -> Image.Image:
    """A sharp picture with the spectrum of photographs, another one for each seed."""
    chance = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(chance.standard_normal((height, width))) / frequency).real for _ in range(3)]
    stacked = np.stack([(plane - plane.min()) / (plane.max() - plane.min()) * 255 for plane in planes], -1)
    return Image.fromarray(stacked.astype(np.uint8))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for seed in range(3):
        scene(seed).save(folder / f"dog-{seed}.png")
    return folder


@pytest.fixture
def good(drawn: Path, tmp_path: Path) -> Path:
    return shutil.copytree(drawn, tmp_path, dirs_exist_ok=True)


def said(folder: Path, fit: str = "crop") -> Verdict:
    return check_folder(folder, 512, fit)


def test_good_pictures_go(good: Path) -> None:
    assert said(good) == Verdict("go")


def test_what_lies_beside_pictures_is_left_alone_and_named(good: Path) -> None:
    names = [
        "dog-0.png:Zone.Identifier",
        "dog-0.pngZone.Identifier",
        "IMG_0001.AAE",
        "dog-0.png.json",
        "dog-0.png.supplemental-metadata.json",
        "dog-0.xmp",
        "IMG_0001.MOV",
        "dog-0.heic",
        "dog-0.DNG",
        "notes.txt",
        "README.md",
        "Picasa.ini",
        "dog-0-mask.png",
        "@eaDir/",
        "#recycle/",
    ]
    for name in names:
        if name.endswith("/"):
            (good / name).mkdir()
            (good / name / "thumb.jpg").write_bytes(b"x")
        else:
            (good / name).write_bytes(b"anything")
    verdict = said(good)
    assert verdict.word == "go"
    assert len(load_concept_images(good)) == 3
    assert len(verdict.notes) == len(names)
    for name in names:
        assert any(note.startswith(f"{name.rstrip('/')} is left alone: ") for note in verdict.notes), name
    assert left_alone(good) == verdict.notes


@pytest.mark.parametrize("name", ["holiday/", "dog.heic", "album.zip", "dog.crdownload", "dog-9.png"])
def test_what_may_be_meant_as_a_picture_stops(good: Path, name: str) -> None:
    (good / name).mkdir() if name.endswith("/") else (good / name).write_bytes(b"\0\1anything")
    verdict = said(good)
    assert verdict.word == "stop"
    assert any(name.rstrip("/") in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("width", "height", "lost"), [(5000, 33, "99%"), (600, 900, "33%"), (2400, 600, "75%")])
def test_what_the_square_crop_loses_is_named_and_padding_loses_nothing(
    good: Path, width: int, height: int, lost: str
) -> None:
    scene(7, width, height).save(good / "panorama.png")
    verdict = said(good)
    assert verdict.word == "fix first"
    assert f"panorama.png: {width} × {height}: the square crop loses {lost} of it" in verdict.reasons[0]
    assert not any("loses" in reason for reason in said(good, "pad").reasons)


def test_small_pictures_are_named(good: Path) -> None:
    scene(7, 300, 300).save(good / "small.png")
    assert "small.png: 300 × 300: enlarged to the base's 512" in said(good).reasons[0]


def test_blur_is_measured_at_the_size_of_training(good: Path) -> None:
    scene(7).filter(ImageFilter.GaussianBlur(4)).save(good / "blurred.png")
    assert "blurred.png: blurred" in said(good).reasons[0]
    assert check_folder(good, 64).word == "go"
    measures = [blur(scene(1).filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 3)]
    assert measures == sorted(measures)
    assert blur(Image.new("RGB", (64, 64))) == 0


def test_nearly_the_same_picture_twice_is_named(good: Path) -> None:
    scene(0).resize((590, 590)).resize((600, 600)).save(good / "burst.jpg")
    assert said(good).reasons == ["burst.jpg and dog-0.png are nearly the same picture: one of them is enough"]


def test_few_pictures_are_named(tmp_path: Path) -> None:
    scene(0).save(tmp_path / "one.png")
    assert "1 of at least 3 pictures" in said(tmp_path).reasons[0]


def test_captions_beside_pictures_and_in_one_file(good: Path) -> None:
    (good / "dog-0.txt").write_text("a photo of {subject} on grass\n")
    (good / "metadata.jsonl").write_text(json.dumps({"file_name": "dog-1.png", "text": "{subject} asleep"}) + "\n")
    captions = [picture.caption for picture in load_concept_images(good)]
    assert captions == ["a photo of {subject} on grass", "{subject} asleep", None]
    verdict = said(good)
    assert verdict.word == "go"
    assert verdict.notes == ["dog-2.png: no caption, so `train.prompt` describes them"]


def test_captions_are_found_as_other_systems_write_names_and_hidden_files_are_none(good: Path) -> None:
    (good / "._dog-0.png").write_bytes(b"\x00\x05\x16\x07")  # beside each file that a Mac copies to a foreign disk
    (good / "._dog-0.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (good / "dog-1.png").rename(good / "caf\u00e9.png")
    (good / "metadata.jsonl").write_text(json.dumps({"file_name": "cafe\u0301.png", "text": "{subject} asleep"}) + "\n")
    assert [picture.caption for picture in load_concept_images(good)] == ["{subject} asleep", None, None]


def test_captions_of_pictures_that_are_not_there_stop(good: Path) -> None:
    (good / "metadata.jsonl").write_text(
        json.dumps({"file_name": "train/dog-1.png", "text": "{subject} asleep"}) + "\n"
    )
    assert said(good).word == "stop"
    with pytest.raises(SvdiffError, match=r"found train/dog-1\.png as file_name, which .* does not hold"):
        load_concept_images(good)


@pytest.mark.parametrize("text", ["a photo of a dog", "", "{subject} {style}", "{", "{subject"])
def test_a_caption_without_subject_stops(good: Path, text: str) -> None:
    (good / "dog-0.txt").write_text(text)
    verdict = said(good)
    assert verdict.word == "stop"
    assert any("dog-0.png: found caption" in reason and "{subject}" in reason for reason in verdict.reasons)


@pytest.mark.parametrize("content", [b"not json", b'{"file_name": "dog-0.png"}', b"[1]", b"\xff\xfe\x00"])
def test_captions_that_cannot_be_read_stop(good: Path, content: bytes) -> None:
    (good / "metadata.jsonl").write_bytes(content)
    assert said(good).word == "stop"
    with pytest.raises(SvdiffError, match=r"metadata\.jsonl: found .*; expected lines such as"):
        load_concept_images(good)


def test_portraits_and_panoramas_with_captions_masks_and_litter(tmp_path: Path) -> None:
    """Nothing is cropped or left out without a word."""
    for seed, (name, width, height) in enumerate(
        [("portrait.png", 600, 900), ("panorama.png", 1800, 600), ("square.png", 600, 600), ("burst.png", 600, 600)]
    ):
        scene(min(seed, 2), width, height).save(tmp_path / name)
    Image.new("L", (600, 900), 255).save(tmp_path / "portrait-mask.png")
    (tmp_path / "portrait.txt").write_text("a photo of {subject}")
    (tmp_path / "square.txt").write_text("a photo of my dog")
    for name in ("square.png:Zone.Identifier", "IMG_1.AAE", "portrait.png.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "@eaDir").mkdir()
    assert said(tmp_path).word == "stop"
    assert "square.png: found caption 'a photo of my dog'" in said(tmp_path).reasons[1]
    (tmp_path / "square.txt").write_text("a photo of {subject} indoors")
    verdict = said(tmp_path)
    assert verdict.lines("dog") == [
        "dog: fix first",
        "  panorama.png: 1800 × 600: the square crop loses 67% of it. Crop it round the subject, or set `train.fit: bucket` or `pad`",
        "  portrait.png: 600 × 900: the square crop loses 33% of it. Crop it round the subject, or set `train.fit: bucket` or `pad`",
        "  burst.png and square.png are nearly the same picture: one of them is enough",
        "  note: @eaDir is left alone: thumbnails of a network drive",
        "  note: IMG_1.AAE is left alone: edits of Apple Photos",
        "  note: portrait-mask.png is left alone: a mask, which training uses with `train.masks: loss`",
        "  note: portrait.png.json is left alone: metadata of an export",
        "  note: square.png:Zone.Identifier is left alone: Windows' mark of a download",
        "  note: burst.png, panorama.png: no caption, so `train.prompt` describes them",
    ]
    in_buckets = check_folder(tmp_path, 512, "bucket", grid=64).lines("dog")
    assert in_buckets[1] == (
        "  panorama.png: 1800 × 600: the crop to 2 : 1 loses 44% of it. Crop it round the subject, or set `train.fit: pad`"
    )
    assert not any("portrait.png: 600" in line for line in in_buckets)
    assert "  note: portrait.png is trained as 384 × 640, 10% of it cropped" in in_buckets
    assert "  note: square.png is trained as 512 × 512, 0% of it cropped" in in_buckets


def masked(folder: Path, fit: str = "crop") -> Verdict:
    return check_folder(folder, 512, fit, masks=True)


def half_white(width: int = 600, height: int = 600) -> Image.Image:
    """A mask of the left half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def cut_out(picture: Image.Image, mask: Image.Image) -> Image.Image:
    picture = picture.copy()
    picture.putalpha(mask)
    return picture


def test_masks_are_files_beside_pictures_or_alpha_channels_and_pictures_without_are_named(good: Path) -> None:
    half_white().save(good / "DOG-0-Mask.png")
    cut_out(scene(1), half_white()).save(good / "dog-1.png")
    pictures = load_concept_images(good, masks=True)
    assert [p.mask and np.asarray(p.mask).mean(0)[[0, 299, 300, 599]].tolist() for p in pictures] == [
        [255, 255, 0, 0],
        [255, 255, 0, 0],
        None,
    ]
    assert masked(good) == Verdict("go", notes=["dog-2.png: no mask, so that all of it counts"])
    assert said(good).notes == [
        "DOG-0-Mask.png is left alone: a mask, which training uses with `train.masks: loss`",
        "dog-1.png: transparent in part, which is trained on as white; see `train.masks`",
    ]


def test_a_mask_of_white_on_nothing_marks_the_white(good: Path) -> None:
    cut_out(Image.new("RGB", (600, 600), "white"), half_white()).save(good / "dog-0-mask.png")
    [mask, *_] = [picture.mask for picture in load_concept_images(good, masks=True)]
    assert mask is not None
    assert np.array_equal(np.asarray(mask), np.asarray(half_white()))


def test_a_mask_turns_as_its_picture_does_and_is_reduced_as_it_is(good: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(5, 2400, 2100).save(good / "phone.jpg", exif=exif)
    half_white(2400, 2100).save(good / "phone-mask.png", exif=exif)
    phone = load_concept_images(good, masks=True)[-1]
    assert phone.mask is not None
    assert phone.mask.size == phone.image.size == (1050, 1200)
    assert np.asarray(phone.mask).mean(1)[[0, -1]].tolist() == [255, 0]


@pytest.mark.parametrize(
    ("content", "said_of_it"),
    [
        (half_white(300, 300), "found the mask dog-0-mask.png of 300 × 300; expected the picture's own 600 × 600"),
        (Image.new("L", (600, 600)), "found the mask dog-0-mask.png that marks nothing"),
        (None, "found the mask dog-0-mask.png, of which: found a text file"),
    ],
)
def test_a_mask_that_cannot_be_used_stops(good: Path, content: Image.Image | None, said_of_it: str) -> None:
    if content is None:
        (good / "dog-0-mask.png").write_text("anything")
    else:
        content.save(good / "dog-0-mask.png")
    verdict = masked(good)
    assert verdict.word == "stop"
    assert any(said_of_it in reason for reason in verdict.reasons)
    assert said(good).word == "go"


def test_a_mask_of_what_the_crop_loses_stops_and_padding_keeps_it(good: Path) -> None:
    mask = Image.new("L", (2400, 600))
    mask.paste(255, (0, 0, 300, 600))
    scene(6, 2400, 600).save(good / "edge.png")
    mask.save(good / "edge-mask.png")
    verdict = masked(good)
    assert verdict.word == "stop"
    assert verdict.reasons[0].startswith("edge.png: what the mask marks lies outside the square crop")
    assert masked(good, "pad").word != "stop"


def test_a_mask_without_its_picture_is_named(good: Path) -> None:
    half_white().save(good / "cat-mask.png")
    assert any("cat-mask.png: named as a mask" in reason for reason in said(good).reasons)


def test_padding_keeps_the_whole_picture() -> None:
    picture = Image.new("RGB", (300, 100), "red")
    padded = np.asarray(to_square(picture, 30, "pad"))
    assert (padded[0] == 255).all()
    assert tuple(padded[15, 15]) == (255, 0, 0)
    assert crop_loss(picture) == pytest.approx(2 / 3)


def test_other_light_follows_from_the_key_alone() -> None:
    picture = scene(0, 64, 64)
    one, same, other = (np.asarray(jittered(picture, 0.3, *key)) for key in ((0, "a"), (0, "a"), (1, "a")))
    assert (one == same).all()
    assert (one != other).any()


def test_a_training_says_what_the_gate_says(
    good: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from svdiff.config import Config
    from svdiff.training.datasets import read_training_data

    monkeypatch.chdir(good)
    (good / "data/concepts").mkdir(parents=True)
    scene(3, 64, 40).save(good / "wide.png")
    (good / "data/concepts/pet").mkdir()
    for path in good.glob("*.png"):
        path.rename(good / "data/concepts/pet" / path.name)
    config = Config.model_validate(
        {
            "base": {"model": str(tiny_base)},
            "classes": ["dog"],
            "concepts": {"pet": {"class_word": "dog"}},
            "train": {"prior_weight": 0},
            "sample": {"prompts": ["a {subject}"]},
            "rank": {"concepts": []},
        }
    )
    with caplog.at_level(logging.WARNING):
        read_training_data(config, config.entry("pet"), config.train_config("pet"))
    assert "wide.png: 64 × 40: the square crop loses 38% of it" in caplog.text

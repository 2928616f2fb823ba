"""The concept loader against real files with every kind of dirt."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from svdiff.data import reading
from svdiff.data.concepts import (
    buckets,
    load_concept_images,
    load_picture,
    to_shape,
    to_square,
    training_shape,
)
from svdiff.errors import SvdiffError


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """Red left half, smooth blue right half: orientation and colours can be told."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2] = (220, 30, 30)
    pixels[:, width // 2 :, 2] = np.linspace(100, 250, height).astype(np.uint8)[:, None]
    return Image.fromarray(pixels)


def only(folder: Path) -> reading.ConceptImage:
    (loaded,) = load_concept_images(folder)
    assert loaded.image.mode == "RGB"
    return loaded


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a).astype(int) - np.asarray(b.convert("RGB")).astype(int)).mean())


def refusal(folder: Path, **kwargs: int) -> str:
    with pytest.raises(SvdiffError) as caught:
        load_concept_images(folder, **kwargs)
    return str(caught.value)


def test_order_is_by_name_and_litter_is_ignored(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "10.webp"):
        picture().save(tmp_path / name)
    for litter in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.jpg"):
        (tmp_path / litter).write_bytes(b"\0\1junk")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    loaded = load_concept_images(tmp_path)
    assert [item.path.name for item in loaded] == ["10.webp", "a.jpg", "b.png"]
    assert all(not item.notes for item in loaded)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    undo = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # Image.Transpose that a camera's sensor would have seen
    upright = picture()
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.jpg", exif=exif, quality=95)
    loaded = only(tmp_path).image
    assert loaded.size == upright.size
    assert difference(loaded, upright) < 6


def test_cmyk_jpeg(tmp_path: Path) -> None:
    picture().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    assert difference(only(tmp_path).image, picture()) < 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_tones(tmp_path: Path, suffix: str) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    Image.fromarray(ramp).save(tmp_path / f"scan.{suffix}")
    loaded = np.asarray(only(tmp_path).image)
    np.testing.assert_allclose(loaded[:, :, 0], ramp / 257, atol=0.51)


def test_sixteen_bit_colour_png(tmp_path: Path) -> None:
    pixels = np.zeros((40, 50, 3), ">u2")
    pixels[..., 1] = 40_000

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 50, 40, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(content)
    np.testing.assert_allclose(np.asarray(only(tmp_path).image)[..., 1], 40_000 / 257, atol=1)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((40, 40)).astype(np.float32)).save(tmp_path / "depth.tif")
    assert "floating-point" in refusal(tmp_path)


def test_palette_with_transparency_lands_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (40, 40), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.paste(1, (0, 0, 20, 40))
    image.save(tmp_path / "logo.png", transparency=0)
    loaded = only(tmp_path).image
    assert loaded.getpixel((5, 5)) == (200, 0, 0)
    assert loaded.getpixel((35, 5)) == (255, 255, 255)


@pytest.mark.parametrize(("mode", "half"), [("RGBA", (200, 0, 0, 128)), ("LA", (0, 128))])
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str, half: tuple[int, ...]) -> None:
    Image.new(mode, (40, 40), half).save(tmp_path / "cut.png")
    expected = [
        round(255 * (1 - 128 / 255) + value * 128 / 255) for value in ((200, 0, 0) if mode == "RGBA" else (0, 0, 0))
    ]
    np.testing.assert_allclose(only(tmp_path).image.getpixel((20, 20)), expected, atol=1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animation_gives_its_first_frame_with_a_warning(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"wave.{suffix}", save_all=True, append_images=frames[1:])
    loaded = only(tmp_path)
    assert difference(loaded.image, frames[0]) < 3
    assert "3 frames" in loaded.notes[0]
    assert f"wave.{suffix}" in caplog.text


def test_picture_under_a_wrong_name_is_read_with_a_note(tmp_path: Path) -> None:
    picture().save(tmp_path / "x.png", format="JPEG", quality=95)
    assert "JPEG picture despite its name" in only(tmp_path).notes[0]


def test_wide_gamut_profile_is_honoured(tmp_path: Path) -> None:
    """sRGB changes nothing; swapped primaries swap red and blue; nonsense is ignored."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "p.png", icc_profile=profile)
    assert difference(only(tmp_path).image, picture()) < 1
    swapped = profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    picture().save(tmp_path / "p.png", icc_profile=swapped)
    red, green, blue = picture().split()
    assert difference(only(tmp_path).image, Image.merge("RGB", (blue, green, red))) < 4
    picture().save(tmp_path / "p.png", icc_profile=b"not a profile")
    assert difference(only(tmp_path).image, picture()) == 0


def test_large_pictures_are_reduced_and_huge_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(4200, 3100).save(tmp_path / "phone.jpg")
    assert only(tmp_path).image.size == (1400, 1034)
    small = io.BytesIO()
    Image.new("1", (1, 1)).save(small, "PNG")
    header = b"IHDR" + struct.pack(">2I", 30_000, 30_000) + small.getvalue()[24:29]  # of as many pixels; none are read
    poster = small.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + small.getvalue()[33:]
    (tmp_path / "poster.png").write_bytes(poster)
    message = refusal(tmp_path)
    assert "poster.png" in message
    assert "megapixels" in message
    assert "phone.jpg" not in message
    monkeypatch.setattr(reading, "MAX_PIXELS", 1_000_000)  # between our limit and Pillow's own
    assert "4200 × 3100" in refusal(tmp_path)


def test_tiny_picture_is_refused(tmp_path: Path) -> None:
    picture(64, 20).save(tmp_path / "thumb.png")
    assert "64 × 20 pixels" in refusal(tmp_path)


def test_all_problems_in_one_message(tmp_path: Path) -> None:
    picture().save(tmp_path / "good.png")
    whole = io.BytesIO()
    picture(400, 300).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (tmp_path / "note.png").write_text("these are my pictures\n")
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(100))
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    message = refusal(tmp_path)
    lines = {line.split(":")[0].strip(): line for line in message.splitlines()[1:]}
    assert set(lines) == {"cut.jpg", "note.png", "zero.jpg", "more", "phone.heic", "gone.png"}
    assert "truncated" in lines["cut.jpg"]
    assert "a text file named .png" in lines["note.png"]
    assert "empty file" in lines["zero.jpg"]
    assert "HEIC" in lines["phone.heic"]
    assert str(tmp_path) in message
    assert all("expected" in line and "Fix:" in line for line in lines.values())


def test_truncated_is_refused_even_if_another_library_made_pillow_lenient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(400, 300).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) * 2 // 3])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "truncated" in refusal(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "only litter"])
def test_folders_without_pictures(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "dog"
    if kind == "file":
        folder.touch()
    elif kind != "missing":
        folder.mkdir()
    if kind == "only litter":
        (folder / ".DS_Store").touch()
    message = refusal(folder)
    assert str(folder) in message
    assert "Fix:" in message


def test_too_few_and_too_many(tmp_path: Path) -> None:
    for index in range(3):
        picture().save(tmp_path / f"{index}.png")
    assert "3 files; expected 1 to 2 pictures" in refusal(tmp_path, maximum=2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
    cut=st.floats(0.01, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=3),
)
def test_damage_is_either_readable_or_refused_by_name(
    tmp_path: Path, kind: str, cut: float, flips: list[tuple[float, int]]
) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for where, mask in flips:
        content[int(where * len(content))] ^= mask
    shutil.rmtree(tmp_path / "f", ignore_errors=True)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x.img").write_bytes(content[: max(1, int(cut * len(content)))])
    try:
        only(tmp_path / "f")
    except SvdiffError as error:
        refused = str(error)
    else:
        refused = "x.img: found"
    assert "x.img: found" in refused


def test_one_picture_by_its_path(tmp_path: Path) -> None:
    picture().save(tmp_path / "photo.png")
    assert difference(load_picture(tmp_path / "photo.png").image, only(tmp_path).image) == 0
    (tmp_path / "notes.png").write_text("not a picture")
    for name, found in (("notes.png", "a text file named .png"), ("nobody.png", "No such file")):
        with pytest.raises(SvdiffError, match=rf"{name}: found .*{found}"):
            load_picture(tmp_path / name)


def test_to_square_takes_the_centre() -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (100, 0, 200, 100))
    square = to_square(image, 32)
    assert square.size == (32, 32)
    np.testing.assert_allclose(np.asarray(square)[:, 1:-1].mean(axis=(0, 1)), (255, 0, 0), atol=1)
    assert to_square(image, 150).size == (150, 150)


def test_buckets_have_at_most_the_pixels_of_the_square_and_sides_on_the_grid() -> None:
    shapes = buckets(512, 64)
    assert (512, 512) in shapes
    assert all(width * height <= 512 * 512 and width % 64 == height % 64 == 0 for width, height in shapes)
    assert {(height, width) for width, height in shapes} >= {(384, 640), (640, 384)}
    assert max(max(shape) / min(shape) for shape in shapes) == pytest.approx(5 / 3, abs=0.34)


@pytest.mark.parametrize(
    ("size", "shape"),
    [((600, 600), (512, 512)), ((600, 1000), (384, 640)), ((1000, 600), (640, 384)), ((4000, 500), (640, 384))],
)
def test_a_picture_takes_the_bucket_that_crops_least_of_it(size: tuple[int, int], shape: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    assert training_shape(image, 512, "bucket", 64) == shape
    assert training_shape(image, 512, "crop", 64) == training_shape(image, 512, "pad", 64) == (512, 512)
    assert to_shape(image, shape).size == shape

"""One picture as people really have it, as upright 8-bit RGB.

What can be read without guessing is read: EXIF orientation, colour profiles, CMYK, 16 bits a channel, palettes, transparency
(on white), animations (their first frame), a JPEG called `.png`. Everything else is refused.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

MAX_PIXELS = 120_000_000  # the largest phone sensors in common use make 108 megapixels
MIN_SIDE = 32
KEPT_SIDE = 1024  # pictures are reduced while the short side stays at or above this
# Multi-picture formats in which the further pictures are previews or depth maps, not frames.
_STILL_FORMATS = {"MPO"}
_ALPHA_MODES = {"RGBA", "LA", "PA", "RGBa", "La"}


@dataclass(frozen=True)
class ConceptImage:
    """One training picture: its file, its upright RGB content, what was done to read it, and what it has beside that."""

    path: Path
    image: Image.Image
    notes: tuple[str, ...] = ()
    caption: str | None = None  # its own prompt, with {subject} in it
    mask: Image.Image | None = (
        None  # white where the subject is, of the picture's size: its alpha channel, or name-mask.png
    )


class Refused(Exception):
    """Why one file cannot be used."""

    def __init__(self, found: str, expected: str, fix: str) -> None:
        super().__init__(f"found {found}; expected {expected}. Fix: {fix}.")


def read_picture(path: Path, min_side: int) -> ConceptImage:
    """Decode one file completely, or raise `Refused`."""
    if path.is_dir():
        raise Refused("a folder", "pictures only", "move the pictures up, or the folder elsewhere")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(
            f"an unreadable file ({error.strerror})",
            "a readable picture",
            "check it exists and its permissions",
        ) from error
    if not content:
        raise Refused("an empty file", "a picture", "copy it again or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size and metadata warnings: judged below
            image = Image.open(io.BytesIO(content))
            return _decode(path, image, min_side)
    except Refused:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(path, content) from error
    except Image.DecompressionBombError as error:
        raise _too_large(str(error)) from error
    except Exception as error:  # decoders of damaged files raise almost anything
        raise Refused(
            f"a damaged or truncated picture ({type(error).__name__}: {error})",
            "a complete picture",
            "copy or export it again, or remove it",
        ) from error


def _decode(path: Path, image: Image.Image, min_side: int) -> ConceptImage:
    notes = []
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} × {height}")
    if min(width, height) < min_side:
        raise Refused(
            f"{width} × {height} pixels",
            f"at least {min_side} along each side",
            "use the original instead of a thumbnail",
        )
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind != image.format and not (image.format in _STILL_FORMATS and kind == "JPEG"):
        notes.append(f"is a {image.format} picture despite its name; read as such")
    if getattr(image, "n_frames", 1) > 1 and image.format not in _STILL_FORMATS:
        image.seek(0)
        notes.append(f"has {getattr(image, 'n_frames', 1)} frames; only the first is used")
    _decode_strictly(image)
    upright = _upright(image, notes)
    alpha = _alpha(upright)
    mask = None if alpha is None else _reduce(alpha)
    return ConceptImage(path, _reduce(_to_rgb(upright, notes)), tuple(notes), mask=mask)


def _decode_strictly(image: Image.Image) -> None:
    """Decode all pixels; other libraries may have told Pillow to fill what is missing with grey."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        image.load()
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # damaged metadata round an intact picture
        notes.append(f"has unreadable EXIF data, orientation ignored ({type(error).__name__})")
        return image


def _alpha(image: Image.Image) -> Image.Image | None:
    """How opaque each pixel is; None where all are wholly."""
    if not _has_alpha(image) or image.mode[0] in "IF":
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _to_rgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """8-bit sRGB on white."""
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.mode == "F":
        raise Refused("floating-point pixels", "8 or 16 bits a channel", "export it as PNG or JPEG")
    if image.info.get("icc_profile"):
        image = _to_srgb(image, notes)
    if _has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8: Pillow's own conversion clips at 255 and makes such pictures white."""
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise Refused("more than 16 bits a channel", "8 or 16 bits a channel", "export it as PNG or JPEG")
    return Image.fromarray(np.round(values / 257).astype(np.uint8), mode="L")


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """Honour an embedded colour profile (phones: Display P3; print: CMYK) where it fits the pixels."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        if image.mode == "CMYK":
            notes.append("has a colour profile that does not fit; colours are approximate")
        return image
    return image if converted is None else converted


def _reduce(image: Image.Image) -> Image.Image:
    factor = min(image.size) // KEPT_SIDE
    return image.reduce(factor) if factor > 1 else image


def _unidentified(path: Path, content: bytes) -> Refused:
    if content[4:8] == b"ftyp" and content[8:12] in {b"heic", b"heix", b"mif1", b"msf1", b"hevc"}:
        return Refused("an HEIC photo", "JPEG or PNG", "export it as JPEG")
    sample = content[:1024]
    text = b"\0" not in sample and all(byte >= 32 or byte in b"\t\n\r\f\x1b" for byte in sample)
    found = ("a text file" if text else "a file of an unknown kind") + (f" named {path.suffix}" if path.suffix else "")
    return Refused(
        found,
        "a picture (JPEG, PNG, WebP, GIF, TIFF, BMP)",
        "replace it by the picture or move it out of the folder",
    )


def _too_large(found: str) -> Refused:
    return Refused(f"too many pixels ({found})", f"at most {MAX_PIXELS // 1_000_000} megapixels", "scale it down")

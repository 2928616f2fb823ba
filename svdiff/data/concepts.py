"""Concept folders: the pictures of one subject as people really have them, through one loader.

A folder holds 3 to 5 pictures (Sec. 4.1), straight from phones, scanners and web pages. What can be read
without guessing is read: EXIF orientation, colour profiles, CMYK, 16 bits a channel, palettes, transparency
(on white), animations (their first frame), a JPEG called `.png`. What cameras, chats and file managers put beside
pictures is left alone, and said. Everything else is refused before any work starts, all problems of the folder in
one message.
"""

from __future__ import annotations

import io
import json
import logging
import random
import unicodedata
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageEnhance, ImageFile, ImageOps, UnidentifiedImageError

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config

log = logging.getLogger(__name__)

CONCEPTS = Path("data/concepts")
MAX_PICTURES = 100
MAX_PIXELS = 120_000_000  # the largest phone sensors in common use make 108 megapixels
MIN_SIDE = 32
MOST_OBLONG = 2  # longer side over the shorter, of pictures that are trained in shapes near their own
KEPT_SIDE = 1024  # pictures are reduced while the short side stays at or above this

# What operating systems and notebooks leave behind, beside everything whose name starts with a dot: not worth a word.
_LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx"}
# What may lie beside pictures and is none, by the end of its name: left alone, and said.
_BESIDE = {
    "zone.identifier": "Windows' mark of a download",
    ".aae": "edits of Apple Photos",
    ".json": "metadata of an export",
    ".jsonl": "metadata",
    ".xmp": "metadata of a photo editor",
    ".thm": "a camera's thumbnail",
    **dict.fromkeys((".mov", ".mp4", ".m4v", ".3gp", ".avi", ".webm"), "a video"),
    **dict.fromkeys((".txt", ".md", ".csv", ".html", ".htm"), "text"),
    **dict.fromkeys((".ini", ".db", ".lnk", ".url"), "a file manager's"),
}
_FOLDERS_BESIDE = {
    "@eadir": "thumbnails of a network drive",
    "#recycle": "a waste bin",
    "lost+found": "a file system's",
}
# Formats that cannot be read, left alone where the same picture lies beside them as one that can.
_ORIGINALS = {".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
_MASK = "-mask"  # dog-mask.png is the mask of dog.jpg
CAPTIONS = "metadata.jsonl"
_CAPTION_LINE = 'lines such as {"file_name": "dog.jpg", "text": "a photo of {subject}"}'
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


class _Refused(Exception):
    """Why one file cannot be used."""

    def __init__(self, found: str, expected: str, fix: str) -> None:
        super().__init__(f"found {found}; expected {expected}. Fix: {fix}.")


def concept_folder(name: str) -> Path:
    """Where the pictures of the concept `name` lie, from the root of a checkout."""
    return CONCEPTS / name


def load_concept_images(
    folder: str | Path,
    *,
    minimum: int = 1,
    maximum: int = MAX_PICTURES,
    min_side: int = MIN_SIDE,
    masks: bool = False,
    captions: bool = True,
) -> list[ConceptImage]:
    """Load every picture of a concept folder, sorted by file name.

    Args:
        folder: the folder; pictures are read from its top level. What lies beside them (`left_alone`) is ignored.
        minimum: fewest pictures accepted.
        maximum: most pictures accepted, against pointing at the wrong folder.
        min_side: fewest pixels along the shorter side.
        masks: read masks beside pictures as well, and refuse those that cannot be used.
        captions: read captions beside pictures, and refuse those that name no subject.

    Returns:
        Upright 8-bit RGB pictures. Very large ones are reduced by a whole factor, their shorter side staying
        at 1024 pixels or more. What was doubtful about a picture stands in its `notes`, which are logged too.

    Raises:
        SvdiffError: the folder is missing, empty or too full, or holds anything that cannot be used; the
            message names every such file, what was found, what was expected and the fix.
    """
    folder = Path(folder)
    files, _ = _candidates(folder)
    if not minimum <= len(files) <= maximum:
        raise SvdiffError(
            f"Concept folder {folder} holds {_count(len(files))}; expected {_expected(minimum, maximum)}. "
            + (
                "Fix: put 3 to 5 JPEG or PNG pictures of the subject there."
                if len(files) < minimum
                else "Fix: point at the folder of one subject, or keep its best 3 to 5 pictures."
            )
        )
    pictures, problems = [], []
    texts = _captions(folder, files) if captions else {}
    mask_files = _mask_files(folder.iterdir()) if masks else {}
    for path in files:
        try:
            picture = replace(_load(path, min_side), caption=texts.get(path))
            pictures.append(_with_mask(picture, mask_files.get(path)) if masks else picture)
        except _Refused as refusal:
            problems.append(f"  {path.name}: {refusal}")
    if problems:
        raise SvdiffError(
            f"Concept folder {folder}: {len(problems)} of {_count(len(files))} cannot be used; "
            "nothing was started.\n" + "\n".join(problems)
        )
    for picture in pictures:
        for note in picture.notes:
            log.warning("%s: %s", picture.path, note)
    return pictures


def left_alone(folder: str | Path, *, masks: bool = False) -> list[str]:
    """What lies beside the pictures of a concept folder and is not read, each with what it is; `masks`: those are read."""
    return _candidates(Path(folder), masks)[1]


def load_picture(path: str | Path, *, min_side: int = MIN_SIDE) -> ConceptImage:
    """One picture by its path, read as those of a concept folder are.

    Raises:
        SvdiffError: it cannot be used; the message names the file, what was found, what was expected and the fix.
    """
    try:
        picture = _load(Path(path), min_side)
    except _Refused as refusal:
        raise SvdiffError(f"Picture {path}: {refusal} Nothing was started.") from None
    for note in picture.notes:
        log.warning("%s: %s", path, note)
    return picture


def check_concepts(config: Config, concepts: Iterable[str] | None = None) -> None:
    """Refuse bad concept folders of the configuration (all concepts, or those named) before any work.

    Raises:
        SvdiffError: with the problems of all folders in one message.
    """
    problems = []
    for name in config.concepts if concepts is None else concepts:
        try:
            load_concept_images(concept_folder(name))
        except SvdiffError as error:
            problems.append(str(error))
    if problems:
        raise SvdiffError("\n".join(problems))


def to_square(image: Image.Image, size: int, fit: str = "crop") -> Image.Image:
    """A picture as `size` × `size` (Lanczos, also upwards).

    `crop` takes the centred square of the shorter side, so what lies outside it is never seen (`crop_loss`); `pad` keeps
    the whole picture, on white.
    """
    return to_shape(image, (size, size), fit)


def to_shape(image: Image.Image, shape: tuple[int, int], fit: str = "crop") -> Image.Image:
    """A picture as one of width and height `shape`, as `to_square` makes squares."""
    return _shaped(image, shape, fit, Image.Resampling.LANCZOS, "white")


def mask_to_shape(mask: Image.Image, shape: tuple[int, int], fit: str = "crop") -> Image.Image:
    """A mask as `to_shape` makes its picture, in averages over areas: Lanczos rings beyond the edge; on black."""
    return _shaped(mask, shape, fit, Image.Resampling.BOX, "black")


def _shaped(
    image: Image.Image, shape: tuple[int, int], fit: str, method: Image.Resampling, background: str
) -> Image.Image:
    if fit == "pad":
        return ImageOps.pad(image, shape, method=method, color=background)
    return ImageOps.fit(image, shape, method=method, centering=(0.5, 0.5))


def training_shape(image: Image.Image, size: int, fit: str, grid: int = 1) -> tuple[int, int]:
    """Width and height that a picture is trained in: a square of `size`, or for `bucket` one of `buckets`."""
    if fit != "bucket":
        return size, size
    shapes = buckets(size, grid) or [(size, size)]
    return min(shapes, key=lambda shape: (round(crop_loss(image, shape), 9), -shape[0] * shape[1]))


def buckets(size: int, grid: int) -> list[tuple[int, int]]:
    """Shapes of at most size² pixels and about 2 : 1, whose sides are multiples of `grid`: of each width the highest."""
    shapes = [(width, size * size // width // grid * grid) for width in range(grid, MOST_OBLONG * size, grid)]
    return [shape for shape in shapes if max(shape) <= MOST_OBLONG * min(shape)]


def jittered(image: Image.Image, strength: float, *key: object) -> Image.Image:
    """A picture in other light: brightness, contrast and saturation by factors of 1 ± `strength` that follow from `key`."""
    chance = random.Random(repr(key))
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(1 + chance.uniform(-strength, strength))
    return image


def crop_loss(image: Image.Image, shape: tuple[int, int] = (1, 1)) -> float:
    """Share of a picture that a crop of another shape leaves out, by default a square."""
    aspect, other = image.width / image.height, shape[0] / shape[1]
    return 1 - min(aspect, other) / max(aspect, other)


def looks_like_a_mask(picture: ConceptImage) -> bool:
    """Whether a picture is named as the mask of another one."""
    return picture.path.stem.casefold().endswith(_MASK)


def _candidates(folder: Path, masks: bool = False) -> tuple[list[Path], list[str]]:
    """What should be a picture, in an order that does not depend on the file system or locale; and what is left alone."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise SvdiffError(
            f"Concept folder {folder}: found {found} there; expected a folder of pictures. "
            "Fix: create it and put 3 to 5 JPEG or PNG pictures of the subject there."
        )
    entries = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _LITTER]
    entries.sort(key=lambda path: (unicodedata.normalize("NFC", path.name), path.name))
    stems = {path.stem.casefold() for path in entries if path.suffix.lower() in Image.registered_extensions()}
    used = {*_caption_files(entries), *(_mask_files(entries).values() if masks else ())}
    files, beside = [], []
    for path in entries:
        what = _beside(path, stems)
        if what is None:
            files.append(path)
        elif path not in used:
            beside.append(f"{path.name} is left alone: {what}")
    return files, beside


def _beside(path: Path, stems: set[str]) -> str | None:
    """What a file or folder is that lies beside pictures; None for what should be a picture."""
    name, stem = path.name.casefold(), path.stem.casefold()
    if path.is_dir():
        return _FOLDERS_BESIDE.get(name)
    if path.suffix.lower() in _ORIGINALS and stem in stems:
        return f"the same picture lies beside it, as {path.stem} in another format"
    if stem.endswith(_MASK) and stem.removesuffix(_MASK) in stems:
        return "a mask, which training uses with `train.masks: loss`"
    return next((what for end, what in _BESIDE.items() if name.endswith(end)), None)


def _mask_files(entries: Iterable[Path]) -> dict[Path, Path]:
    """The mask of each picture that has one beside it: dog-mask.png beside dog.jpg."""
    pictures = [path for path in entries if path.suffix.lower() in Image.registered_extensions()]
    masks = {path.stem.casefold(): path for path in pictures if path.stem.casefold().endswith(_MASK)}
    of = {path: masks.get(path.stem.casefold() + _MASK) for path in pictures}
    return {path: mask for path, mask in of.items() if mask is not None}


def _with_mask(picture: ConceptImage, path: Path | None) -> ConceptImage:
    """A picture with the mask that lies beside it, else with that of its alpha channel."""
    what = "an alpha channel" if path is None else f"the mask {path.name}"
    if path is not None:
        try:
            read = _load(path, 1)
        except _Refused as refusal:
            raise _Refused(f"{what}, of which: {refusal}", "a picture of black and white", "export it again") from None
        mask = read.image.convert("L")
        if read.mask is not None:  # white on nothing
            mask = ImageChops.multiply(mask, read.mask)
        if mask.size != picture.image.size:
            sizes = [f"{width} × {height}" for width, height in (mask.size, picture.image.size)]
            raise _Refused(f"{what} of {sizes[0]}", f"the picture's own {sizes[1]}", "export it at the picture's size")
        picture = replace(picture, mask=mask)
    if picture.mask is not None and picture.mask.getextrema() == (0, 0):  # all black
        raise _Refused(
            f"{what} that marks nothing", "white where the subject is", "draw it, or set `train.masks: ignore`"
        )
    return picture


def _caption_files(entries: Iterable[Path]) -> dict[Path, list[Path]]:
    """Files of captions, and the pictures that each is about: dog.txt beside dog.jpg, or metadata.jsonl."""
    entries = list(entries)
    pictures = [path for path in entries if path.suffix.lower() in Image.registered_extensions()]
    found = {path: [p for p in pictures if p.stem == path.stem] for path in entries if path.suffix.lower() == ".txt"}
    return {path: about for path, about in found.items() if about} | {
        path: pictures for path in entries if path.name == CAPTIONS
    }


def _captions(folder: Path, files: list[Path]) -> dict[Path, str]:
    """The caption of each picture that has one. Raises SvdiffError for captions that cannot be read, or name no {subject}."""
    found: dict[Path, str] = {}
    for source, about in _caption_files(folder.iterdir()).items():
        try:
            text = source.read_text(encoding="utf-8-sig").strip()
            if source.name != CAPTIONS:
                found |= dict.fromkeys(about, text)
                continue
            for row in map(json.loads, filter(None, text.splitlines())):
                found[folder / row["file_name"]] = str(row["text"]).strip()
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise SvdiffError(
                f"captions {source}: found {type(error).__name__}: {error}; expected "
                f"{_CAPTION_LINE if source.name == CAPTIONS else 'UTF-8 text'}. Fix: write it so, or move the file out of the folder"
            ) from None
    problems = [
        f"  {path.name}: found caption '{text}'; expected one with {{subject}}, which becomes the token and the class word, "
        "and without any other braces. Fix: write {subject} where the subject is named"
        for path, text in found.items()
        if path in files and (text.count("{") != 1 or text.count("}") != 1 or "{subject}" not in text)
    ]
    if problems:
        raise SvdiffError(
            f"Concept folder {folder}: captions that would not train the subject.\n" + "\n".join(problems)
        )
    return found


def _load(path: Path, min_side: int) -> ConceptImage:
    """Decode one file completely, or raise `_Refused`."""
    if path.is_dir():
        raise _Refused("a folder", "pictures only", "move the pictures up, or the folder elsewhere")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _Refused(
            f"an unreadable file ({error.strerror})",
            "a readable picture",
            "check it exists and its permissions",
        ) from error
    if not content:
        raise _Refused("an empty file", "a picture", "copy it again or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size and metadata warnings: judged below
            image = Image.open(io.BytesIO(content))
            return _decode(path, image, min_side)
    except _Refused:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(path, content) from error
    except Image.DecompressionBombError as error:
        raise _too_large(str(error)) from error
    except Exception as error:  # decoders of damaged files raise almost anything
        raise _Refused(
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
        raise _Refused(
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
        raise _Refused("floating-point pixels", "8 or 16 bits a channel", "export it as PNG or JPEG")
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
        raise _Refused("more than 16 bits a channel", "8 or 16 bits a channel", "export it as PNG or JPEG")
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


def _unidentified(path: Path, content: bytes) -> _Refused:
    if content[4:8] == b"ftyp" and content[8:12] in {b"heic", b"heix", b"mif1", b"msf1", b"hevc"}:
        return _Refused("an HEIC photo", "JPEG or PNG", "export it as JPEG")
    sample = content[:1024]
    text = b"\0" not in sample and all(byte >= 32 or byte in b"\t\n\r\f\x1b" for byte in sample)
    found = ("a text file" if text else "a file of an unknown kind") + (f" named {path.suffix}" if path.suffix else "")
    return _Refused(
        found,
        "a picture (JPEG, PNG, WebP, GIF, TIFF, BMP)",
        "replace it by the picture or move it out of the folder",
    )


def _too_large(found: str) -> _Refused:
    return _Refused(f"too many pixels ({found})", f"at most {MAX_PIXELS // 1_000_000} megapixels", "scale it down")


def _count(number: int) -> str:
    return f"{number} file" if number == 1 else f"{number} files"


def _expected(minimum: int, maximum: int) -> str:
    return f"{minimum} to {maximum} pictures"

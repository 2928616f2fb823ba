"""The page: complete, self-contained, and readable by those who do not see the pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from evaluation_parts import PLAIN, PROMPTS, drawing, write_drift
from PIL import Image

from svdiff.config import Config
from svdiff.evaluation.correlation import correlate
from svdiff.evaluation.score import score
from svdiff.report.figures import LARGEST_WEBP, _uri
from svdiff.report.page import report


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
    targets = {attributes["href"] for attributes in page.all("a")} - {"scores.csv"}
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


def test_what_was_not_trained_says_so(checkout: Path, config: Config) -> None:
    for name in config.concepts:
        (checkout / f"out/train/{name}/curve.csv").unlink()
        (checkout / f"out/sample/{name}/images.csv").unlink()
    assert report(config).read_text().count("Not trained yet") == 2
    none = Config.model_validate({"classes": [], "concepts": {}, "sample": {"prompts": ["a {subject}"]}})
    assert "Nothing is trained yet" in report(none).read_text()


def test_drift_is_shown_with_the_pictures_that_it_was_measured_on(checkout: Path, config: Config) -> None:
    varied = ["goldenrod", "navy", "hotpink", "black"]
    write_drift(checkout / "out/sample/red-dog/drift", "dog", {"trained": ["crimson"], "base": varied})
    score(config, "red-dog", evaluators=PLAIN)
    html = report(config).read_text()
    page = Page(html)
    assert page.open == []
    assert [image for image in page.all("img") if image["alt"] == "4 pictures of “a dog” by the trained model"]
    assert "Variety kept" in page.text
    assert re.search(r'<td class="worse">\+0\.\d+', without_pictures(html)), (
        "a class word that gained identity is worse"
    )
    assert "not scored yet" in page.text  # the other concept


def test_hundreds_of_concepts_are_paged_and_the_worst_are_listed(
    checkout: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"dog-{number:03d}" for number in range(45)]
    many = Config.model_validate(
        {
            "classes": ["dog"],
            "concepts": {name: {"class_word": "dog"} for name in names},
            "sample": {"prompts": ["a {subject}"]},
        }
    )
    score(config, "red-dog", evaluators=PLAIN)
    known = json.loads((checkout / "out/score/red-dog/metrics.json").read_text())
    for number, name in enumerate(names):
        (checkout / "data/concepts" / name).mkdir()
        drawing("crimson", seed=number, side=96).save(checkout / "data/concepts" / name / "0.png")
        (checkout / "out/score" / name).mkdir(parents=True)
        metrics = known | {"identity_gain": number / 100}
        (checkout / "out/score" / name / "metrics.json").write_text(json.dumps(metrics))
    for bound, value in {"LISTED": 10, "DRAWN": 20, "NEAR": 0}.items():
        monkeypatch.setattr(f"svdiff.report.page.{bound}", value)
    folder = report(many).parent
    assert {path.name for path in folder.iterdir()} == {"index.html", "page-2.html", "page-3.html", "scores.csv"}
    table = pd.read_csv(folder / "scores.csv", index_col="name")
    assert list(table.index) == names
    assert table.loc["dog-007", "identity_gain"] == 0.07
    pages = {name: Page((folder / name).read_text()) for name in ("index.html", "page-2.html", "page-3.html")}
    ids = {name: {f"#{a['id']}" for _, a in page.tags if a.get("id")} for name, page in pages.items()}
    for name, page in pages.items():
        assert page.open == []
        for link in {str(a["href"]) for a in page.all("a")} - {"scores.csv"}:
            file, _, anchor = link.partition("#")
            assert not anchor or f"#{anchor}" in ids[file or name], link
    rows = [str(a["href"]) for a in pages["index.html"].all("a") if "#concept-dog" in str(a["href"])]
    assert rows[-10:] == [f"#concept-{name}" for name in names[:10]], "the lowest gains of identity"
    text = " ".join(pages["index.html"].text.split())
    assert "The 10 of 45 with the lowest gain" in text
    assert "15 of 45, evenly over the gains" in text
    assert "concepts: 45, in params.yaml" in text
    assert {str(a["href"]) for a in pages["index.html"].all("a")}.isdisjoint({"page-2.html"})
    assert {"index.html", "page-3.html"} <= {str(a["href"]) for a in pages["page-2.html"].all("a")}


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


def test_a_row_wider_than_the_format_is_shrunk() -> None:
    wide = Image.new("RGB", (20_000, 40))
    content = _uri(wide).partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(content))).width == LARGEST_WEBP
    assert wide.width == 20_000

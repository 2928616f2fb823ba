"""The report's section on edits: what was made is shown, what was not is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from svdiff.config import Config, EditConfig
from svdiff.report.edits import edit_parts
from svdiff.report.page import report

NUMBERS = {
    "input_edit": 0.1,
    "reconstruction_psnr": 21.5,
    "autoencoder_psnr": 25.25,
    **{f"noise_{name}": 0.4 for name in ("faithfulness", "edit")},
    **{f"inversion_{name}": 0.62 for name in ("faithfulness", "edit")},
}


@pytest.fixture
def edited(checkout: Path, config: Config) -> Config:
    edits = {
        name: EditConfig(
            image="photo.png", prompt="a dog on a blue background", targets=["a dog on a red <background>"]
        )
        for name in ("made", "not-yet")
    }
    folder = checkout / "out/edit/made"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(NUMBERS))
    Image.new("RGB", (60, 20), "red").save(folder / "sheet.png")
    return config.model_copy(update={"edits": edits})


def test_parts_are_of_edits_that_were_made(edited: Config) -> None:
    [part] = edit_parts(edited)
    assert part.name == "made"
    assert [(score.start, score.edit) for score in part.scores] == [("noise", 0.4), ("inversion", 0.62)]
    assert part.scores[0].how == "without inversion, η 0"
    assert part.scores[1].how == "η 0.5, α 0"
    assert "a dog on a red <background>" in part.sheet.alt


def test_the_page_shows_them(edited: Config) -> None:
    html = report(edited).read_text()
    section = html[html.index('<section id="edits">') : html.index('<section id="method">')]
    for words in ("made: “a dog on a blue background”", "0.620", "21.5", "25.2", "red &lt;background&gt;"):
        assert words in section
    assert "not-yet" not in section

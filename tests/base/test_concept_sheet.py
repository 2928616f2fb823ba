from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svdiff.base.captions import vocabulary
from svdiff.base.concept_sheet import CELL, NAMES, PROMPTS, sheet, with_concepts
from svdiff.config import load_config

ROOT = Path(__file__).parents[2]


def test_eight_concepts_of_two_hands_with_tokens_of_their_own() -> None:
    config = with_concepts(load_config(ROOT / "params.yaml"), NAMES)
    assert list(config.concepts) == list(NAMES)
    assert len(NAMES) == 8
    assert len({name.partition("-")[0] for name in NAMES}) == 2
    assert len({concept.token for concept in config.concepts.values()}) == 8
    assert all(name.endswith(f"-{concept.class_word}") for name, concept in config.concepts.items())
    assert not config.pairs
    assert not config.edits


def test_prompts_are_in_words_that_the_base_knows() -> None:
    words = {word for prompt in PROMPTS for word in prompt.replace("{subject}", "sks dog").split()}
    assert words <= set(vocabulary())


def test_the_sheet_shows_each_picture_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = []
    for number, name in enumerate(("one", "two")):
        folder = tmp_path / "data" / "concepts" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), (10, 100 * number, 0)).save(folder / "00.png")
        rows.append((name, [Image.new("RGB", (64, 64), (200, 100 * number, 20 * i)) for i in range(len(PROMPTS))]))
    found = np.asarray(sheet(rows))
    height = (found.shape[0] - 44) // 2
    for number in range(2):
        middle = 44 + number * height + CELL // 2
        assert tuple(found[middle, CELL // 2]) == (10, 100 * number, 0)
        for i in range(len(PROMPTS)):
            assert tuple(found[middle, (i + 1) * (CELL + 4) + CELL // 2]) == (200, 100 * number, 20 * i)

"""Small real evaluators and a checkout with finished stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_parts import (
    CONCEPTS,
    PROMPTS,
    SEEDS,
    TinyClip,
    TinyLpips,
    drawing,
    embed,
    write_samples,
    write_training,
)

from svdiff.config import Config
from svdiff.evaluation.evaluators import Evaluators


@pytest.fixture(scope="session")
def clip() -> TinyClip:
    return TinyClip()


@pytest.fixture(scope="session")
def lpips() -> TinyLpips:
    return TinyLpips()


@pytest.fixture(scope="session")
def tiny(clip: TinyClip, lpips: TinyLpips) -> Evaluators:
    return Evaluators(clip.encode_images, clip.encode_texts, lpips, embed)


@pytest.fixture
def evaluators(monkeypatch: pytest.MonkeyPatch, clip: TinyClip, lpips: TinyLpips) -> None:
    """The small evaluators in the place of the configured ones."""
    import svdiff.evaluation.evaluators as module

    monkeypatch.setattr(module, "load_clip", lambda _: (clip.encode_images, clip.encode_texts))
    monkeypatch.setattr(module, "load_lpips", lambda _: lpips)


@pytest.fixture
def config() -> Config:
    return Config.model_validate(
        {
            "classes": ["dog", "cat"],
            "evaluators": {"clip_model": "tiny", "clip_pretrained": "random", "lpips_weights": None},
            "concepts": {name: {"class_word": word, "token": token} for name, (word, token, _) in CONCEPTS.items()},
            "sample": {"prompts": PROMPTS, "seeds": SEEDS},
            "rank": {"concepts": ["red-dog"], "ranks": [4, 1], "steps": 2, "seeds": [0, 1]},
        }
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Config) -> Path:
    """The working folder of a checkout in which every concept is trained and sampled."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    for index, (name, (word, token, colour)) in enumerate(CONCEPTS.items()):
        pictures = tmp_path / "data/concepts" / name
        pictures.mkdir(parents=True)
        for number in range(3):
            drawing(colour, seed=number, side=96).save(pictures / f"{number}.png")
        write_samples(tmp_path / "out/sample" / name, token, word, colour)
        write_training(tmp_path / "out/train" / name, index, config, name)
    return tmp_path

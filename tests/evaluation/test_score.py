"""Stage `score` on real pictures with small evaluators."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from evaluation_parts import (
    CLIP_CONFIG,
    PLAIN,
    PROMPTS,
    SEEDS,
    TinyClip,
    TinyLpips,
    drawing,
    write_drift,
    write_tiny_identity,
)
from safetensors.torch import save_file

from svdiff.config import Config, EvaluatorsConfig
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES
from svdiff.evaluation.evaluators import describe_evaluators
from svdiff.evaluation.score import score
from svdiff.files import sha256_file


@pytest.mark.usefixtures("evaluators")
def test_files_and_numbers(checkout: Path, config: Config) -> None:
    folder = score(config, "red-dog")
    metrics = json.loads((folder / "metrics.json").read_text())
    images = pd.read_csv(folder / "images.csv")
    assert len(images) == 2 * len(PROMPTS) * len(SEEDS)
    assert metrics["pairs"] == len(PROMPTS) * len(SEEDS)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in metrics.values())
    for measure in MEASURES:
        means = images.groupby("model")[measure].mean()
        assert metrics[measure] == pytest.approx(means["trained"], abs=2e-6)
        assert metrics[f"base_{measure}"] == pytest.approx(means["base"], abs=2e-6)
    for short, measure in zip(("identity", "image", "text", "clip_i"), MEASURES, strict=True):
        assert metrics[f"{short}_gain"] == pytest.approx(metrics[measure] - metrics[f"base_{measure}"], abs=3e-6)
        assert metrics[f"{short}_gain_low"] <= metrics[f"{short}_gain"] <= metrics[f"{short}_gain_high"]
    assert json.loads((folder / "evaluators.json").read_text()) == describe_evaluators(config.evaluators)
    # The trained pictures have the concept's colour, the base's do not.
    assert metrics["image_gain_low"] > 0


def test_a_class_word_that_became_the_concept_has_drifted_and_lost_its_variety(checkout: Path, config: Config) -> None:
    varied = ["goldenrod", "navy", "hotpink", "black"]
    write_drift(checkout / "out/sample/red-dog/drift", "dog", {"trained": ["crimson"], "base": varied})
    folder = score(config, "red-dog", evaluators=PLAIN)
    metrics, table = json.loads((folder / "metrics.json").read_text()), pd.read_csv(folder / "drift.csv")
    means = table.groupby("model")["identity"].mean()
    assert metrics["drift_identity"] == pytest.approx(means["trained"], abs=2e-6)
    assert metrics["base_drift_identity"] == pytest.approx(means["base"], abs=2e-6)
    assert metrics["drift_gain"] > metrics["drift_gain_low"] > 0
    assert metrics["variety"] < metrics["base_variety"]
    assert metrics["variety_kept_low"] <= metrics["variety_kept"] <= metrics["variety_kept_high"] < 0.5
    assert metrics["drift_pairs"] == 4
    assert "embedding" not in table.columns


def test_a_class_word_that_was_left_alone_has_not_drifted(checkout: Path, config: Config) -> None:
    varied = ["goldenrod", "navy", "hotpink", "black"]
    write_drift(checkout / "out/sample/red-dog/drift", "dog", {"trained": varied, "base": varied})
    metrics = json.loads((score(config, "red-dog", evaluators=PLAIN) / "metrics.json").read_text())
    assert metrics["drift_gain"] == metrics["drift_gain_low"] == metrics["drift_gain_high"] == 0
    assert metrics["variety_kept"] == 1


def test_without_class_pictures_drift_is_not_claimed(checkout: Path, config: Config) -> None:
    folder = score(config, "red-dog", evaluators=PLAIN)
    assert pd.read_csv(folder / "drift.csv").empty
    assert not [name for name in json.loads((folder / "metrics.json").read_text()) if "drift" in name]


@pytest.mark.usefixtures("evaluators")
def test_the_same_pictures_make_the_same_files(checkout: Path, config: Config) -> None:
    folder = score(config, "red-dog")
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    score(config, "red-dog")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


@pytest.mark.usefixtures("evaluators")
def test_the_evaluator_reads_prompts_without_the_token(
    checkout: Path, config: Config, clip: TinyClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def remember(texts: list[str]):
        read.extend(texts)
        return clip.encode_texts(texts)

    import svdiff.evaluation.evaluators as module

    monkeypatch.setattr(module, "load_clip", lambda _: (clip.encode_images, remember))
    score(config, "green-cat")
    assert set(read) == {"a cat on a blue background", "a big cat"}


@pytest.mark.usefixtures("evaluators")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "images.csv").unlink(), "svdiff sample red-dog"),
        (lambda folder: (folder / "base/p00-s0003.png").unlink(), "base/p00-s0003.png"),
        (
            lambda folder: (folder / "images.csv").write_text(
                "\n".join((folder / "images.csv").read_text().splitlines()[:-1]) + "\n"
            ),
            "for each prompt and seed",
        ),
        (lambda folder: drawing("red", side=32).save(folder / "base/p00-s0003.png"), "one square size"),
    ],
)
def test_damaged_samples_are_refused(checkout: Path, config: Config, damage, message: str) -> None:
    damage(checkout / "out/sample/red-dog")
    with pytest.raises(SvdiffError, match=message):
        score(config, "red-dog")
    assert not (checkout / "out/score").exists() or not any((checkout / "out/score").iterdir())


def test_evaluators_are_described_by_weights_and_transform(tmp_path: Path) -> None:
    clip, lpips = tmp_path / "clip", tmp_path / "backbone.safetensors"
    clip.mkdir()
    transform = {"mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    (clip / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 8}, "preprocess_cfg": transform})
    )
    (clip / "open_clip_model.safetensors").write_bytes(b"weights")
    lpips.write_bytes(b"backbone")
    config = EvaluatorsConfig(clip_model=f"{clip}", lpips_weights=str(lpips))
    described = describe_evaluators(config)
    assert described["clip"]["transform"] == transform
    assert described["clip"]["weights_sha256"] == {
        "open_clip_model.safetensors": sha256_file(clip / "open_clip_model.safetensors")
    }
    assert described["lpips"]["weights_sha256"] == sha256_file(lpips)
    assert str(tmp_path) not in json.dumps(described), "the same evaluators elsewhere are the same evaluators"
    lpips.write_bytes(b"another")
    assert describe_evaluators(config) != described


def test_models_on_disk_give_the_same_scores_as_in_memory(
    checkout: Path, config: Config, clip: TinyClip, lpips: TinyLpips, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way with open_clip's and lpips's own loading, offline."""
    folder = checkout / "models/clip"
    folder.mkdir(parents=True)
    preprocess = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}))
    save_file(clip.model.state_dict(), folder / "open_clip_model.safetensors")
    save_file(lpips.net.net.state_dict(), checkout / "models/backbone.safetensors")
    write_tiny_identity(checkout / "models/identity")
    evaluators = EvaluatorsConfig(
        clip_model="models/clip",
        lpips_net="squeeze",
        lpips_weights="models/backbone.safetensors",
        identity_model="models/identity",
    )
    on_disk = json.loads(
        (score(config.model_copy(update={"evaluators": evaluators}), "red-dog") / "metrics.json").read_text()
    )

    import svdiff.evaluation.evaluators as module

    monkeypatch.setattr(module, "load_clip", lambda _: (clip.encode_images, clip.encode_texts))
    monkeypatch.setattr(module, "load_lpips", lambda _: lpips)
    identity = module.load_identity("models/identity")
    monkeypatch.setattr(module, "load_identity", lambda _: identity)
    config = config.model_copy(
        update={"evaluators": config.evaluators.model_copy(update={"identity_model": "models/identity"})}
    )
    in_memory = json.loads((score(config, "red-dog") / "metrics.json").read_text())
    assert on_disk == pytest.approx(in_memory, abs=2e-5)

"""Joint training of a pair: what each sample shows, attention losses that cost nothing when off, and exact resuming."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from svdiff.config import BaseModelConfig, Config, TrainConfig, load_config
from svdiff.data.mixes import load_mixes, make_mixes
from svdiff.models import family_of, load_pipeline
from svdiff.training import train
from svdiff.training.attention import AttentionRecorder, token_map, token_positions
from svdiff.training.attention_losses import AttentionLosses
from svdiff.training.batches import Dataset, draw_batch, generator
from svdiff.training.datasets import read_training_data
from svdiff.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("few_levels")


@pytest.fixture
def checkout(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pair of a red dog and a blue cat with its mixes, and the tiny base; the current folder of the test."""
    for name, word, colour in (("red", "dog", "red"), ("blue", "cat", "blue")):
        for folder, count in ((f"data/concepts/{name}", 3), (f"out/prior/{word}", 5)):
            (tmp_path / folder).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (40, 40), "white")
                ImageDraw.Draw(image).ellipse((6 + i, 8, 30 + i, 34), fill=colour if count == 3 else "grey")
                image.save(tmp_path / folder / f"{i:03d}.png")
    params = {
        "base": {"model": str(tiny_base)},
        "classes": ["dog", "cat"],
        "concepts": {
            "red": {"class_word": "dog", "token": "sks"},
            "blue": {"class_word": "cat", "token": "zwx"},
        },
        "pairs": {"both": {"concepts": ["red", "blue"]}},
        "mix": {"mixes": 8},
        "train": {"steps": 4, "lr": 1e-2, "lr_1d": 1e-3, "save_every": 1, "validate_every": 2, "validation_seeds": [0]},
        "sample": {"prompts": ["a {subject}"], "steps": 2},
        "rank": {"concepts": ["red"]},
        "tracking": {"live": "none"},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    make_mixes(load_config(), "both")
    return tmp_path


def pair_dataset(config: Config, **overrides: Any) -> Dataset:
    data = read_training_data(config, config.entry("both"), config.train_config("both", overrides))
    return data.encode(family_of(load_pipeline(config.base)))


def test_samples_are_mixes_with_their_probability_and_priors_are_their_counterparts(checkout: Path) -> None:
    config = load_config()
    dataset, mixes = pair_dataset(config), load_mixes(config.entry("both")).mixes
    assert dataset.prior is not None
    kinds: Counter[str] = Counter()
    for sample in range(1500):
        instance, prior = dataset.order(sample)
        shown, prompt = dataset.instance.shown[instance], dataset.instance.prompts[instance]
        if len(shown) == 2:
            kinds["mix"] += 1
            assert instance == prior < len(mixes)
            assert dataset.prior.prompts[prior] == mixes[instance].prior_prompt
            assert {s.token: s.region for s in shown} == {
                config.concepts[name].token: region for name, region in mixes[instance].regions.items()
            }
        else:
            [one] = shown
            kinds[one.token] += 1
            assert prompt == f"a {one.token} {one.class_word}"
            assert dataset.prior.prompts[prior] == f"a {one.class_word}"
        assert dataset.prior.shown[prior] == ()
    assert kinds["mix"] / 1500 == pytest.approx(0.6, abs=0.04)  # three standard deviations
    assert kinds["sks"] / 1500 == pytest.approx(0.2, abs=0.035)
    again = pair_dataset(config)
    assert [again.order(n) for n in range(50)] == [dataset.order(n) for n in range(50)]


@pytest.mark.parametrize("fit", ["cover", pytest.param("cut-out", marks=pytest.mark.slow)])
def test_mixes_without_counterparts_go_with_prior_images_of_either_class(checkout: Path, fit: str) -> None:
    params = yaml.safe_load((checkout / "params.yaml").read_text())
    changed = {"mixes": 8, "mix_priors": False, "fit": fit}
    (checkout / "params.yaml").write_text(yaml.safe_dump(params | {"mix": changed}))
    config = load_config()
    make_mixes(config, "both")
    dataset = pair_dataset(config)
    assert dataset.prior is not None
    assert len(dataset.prior.prompts) == 10
    seen: Counter[tuple[int, str]] = Counter()
    for sample in range(200):
        instance, prior = dataset.order(sample)
        shown = dataset.instance.shown[instance]
        seen[len(shown), dataset.prior.prompts[prior]] += 1
        if len(shown) == 1:
            assert dataset.prior.prompts[prior] == f"a {shown[0].class_word}"
    assert {(count, f"a {word}") for count in (1, 2) for word in ("dog", "cat")} == set(seen)
    assert train(config, "both").is_file()


def test_without_cut_mix_unmix_only_single_subjects_are_shown(checkout: Path) -> None:
    dataset = pair_dataset(load_config(), mix_probability=0.0)
    assert len(dataset.instance.prompts) == 6
    assert {dataset.instance.prompts[dataset.order(n)[0]] for n in range(60)} == {"a sks dog", "a zwx cat"}
    assert {len(dataset.instance.shown[dataset.order(n)[0]]) for n in range(60)} == {1}


def test_without_prior_preservation_there_are_no_prior_samples(checkout: Path) -> None:
    dataset = pair_dataset(load_config(), prior_weight=0.0)
    assert dataset.prior is None
    assert draw_batch(dataset, 3, 2, generator("x"))[0].instances == 2
    assert len(draw_batch(dataset, 3, 2, generator("x"))[0].latents) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({}, id="cut-mix-unmix"),
        pytest.param({"mix_probability": 0.0}, id="without"),
        pytest.param({"unmix_weight": 2.0, "single_subject_weight": 0.5}, id="regularised"),
        pytest.param({"method": "custom-diffusion"}, id="custom-diffusion"),
    ],
)
def test_a_pair_resumed_twice_equals_one_left_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any]
) -> None:
    straight = load_file(train(load_config(), "both", overrides=overrides))
    curve = pd.read_csv("out/train/both/curve.csv").drop(columns="seconds")
    monkeypatch.setenv("SVDIFF_HOME", str(checkout / "again"))
    original, died = Trainer._loss, []

    def dying(self: Trainer, number: int) -> Any:
        if number in (1, 3) and number not in died:
            died.append(number)
            raise KeyboardInterrupt
        return original(self, number)

    monkeypatch.setattr(Trainer, "_loss", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(load_config(), "both", Path("resumed"), overrides)
        assert not Path("resumed").exists()
    resumed = load_file(train(load_config(), "both", Path("resumed"), overrides))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    pd.testing.assert_frame_equal(pd.read_csv("resumed/curve.csv").drop(columns="seconds"), curve)
    summary = json.loads(Path("resumed/train.json").read_text())
    assert (summary["kind"], summary["concept"], summary["token"]) == ("pair", "both", "sks, zwx")


@pytest.mark.slow
def test_attention_losses_are_in_the_curve_and_change_the_delta(checkout: Path) -> None:
    config = load_config()
    plain = load_file(train(config, "both"))
    assert "loss_unmix" not in pd.read_csv("out/train/both/curve.csv")
    # The maps of random weights are nearly even: a low threshold would take everything for the subject.
    weights = {"unmix_weight": 5.0, "single_subject_weight": 5.0, "subject_threshold": 0.98, "batch_size": 3}
    regularised = load_file(train(config, "both", Path("regularised"), weights))
    curve = pd.read_csv("regularised/curve.csv")
    assert (curve["loss_unmix"] > 0).any()
    assert (curve["loss_single_subject"] > 0).any()
    total = curve["loss_instance"] + curve["loss_prior"] + 5 * curve["loss_unmix"] + 5 * curve["loss_single_subject"]
    assert (curve["loss"] - total).abs().max() < 1e-5
    assert any(not torch.equal(plain[name], regularised[name]) for name in plain)


def test_weights_of_zero_leave_no_trace(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the attention machinery is touched: no processor is exchanged, and the loss is the very same object."""
    monkeypatch.setattr(AttentionRecorder, "__init__", lambda *_, **__: pytest.fail("attention is recorded"))
    pipe = load_pipeline(load_config().base)
    losses = AttentionLosses(pipe, TrainConfig(unmix_weight=0.0, single_subject_weight=0.0))
    loss = object()
    assert losses.add_to(loss, None) is loss  # type: ignore[arg-type]
    before = pipe.unet.attn_processors
    with losses.recording():
        assert pipe.unet.attn_processors == before


def test_terms_by_hand(checkout: Path, tiny_base: Path) -> None:
    """Both terms on one recorded batch, against sums written out."""
    config = load_config()
    pipe = load_pipeline(BaseModelConfig(model=str(tiny_base)))
    dataset = pair_dataset(config)
    [batch] = draw_batch(dataset, 0, 6, generator("batch"))
    settings = TrainConfig(
        unmix_weight=1.0,
        single_subject_weight=1.0,
        subject_threshold=0.98,
        attention_layers="down_blocks",
        attention_sides=[8],
    )
    losses = AttentionLosses(pipe, settings)
    tokens = pipe.tokenizer(batch.prompts, padding="max_length", return_tensors="pt").input_ids
    with losses.recording(), torch.no_grad():
        pipe.unet(batch.latents, 500, encoder_hidden_states=pipe.text_encoder(tokens)[0])
    assert losses.recorder is not None
    assert set(losses.recorder.maps) == {"down_blocks.0.attentions.0.transformer_blocks.0.attn2"}

    def word_map(row: int, word: str) -> torch.Tensor:
        maps = {name: value[[row]] for name, value in losses.recorder.maps.items()}  # type: ignore[union-attr]
        return token_map(maps, [token_positions(pipe.tokenizer, batch.prompts[row], word)])[0]

    unmix, single = [], []
    for row in range(batch.instances):
        shown = batch.shown[row]
        if len(shown) == 2:
            for subject, other in (shown, shown[::-1]):
                box = other.region.pixels(8, 8)
                there = word_map(row, subject.token)[box[1] : box[3], box[0] : box[2]]
                unmix.append(there.square().mean())
        else:
            special, coarse = word_map(row, shown[0].token), word_map(row, shown[0].class_word)
            single.append(special[coarse <= 0.98 * coarse.max()].square().sum())
    assert unmix
    assert single
    assert torch.stack(single).mean() > 0
    torch.testing.assert_close(losses._unmix(batch), torch.stack(unmix).mean())
    torch.testing.assert_close(losses._single_subject(batch), torch.stack(single).mean())

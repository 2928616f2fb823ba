"""Pictures as people have them: what the batches of a training hold, and what is learned from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from svdiff.config import Config
from svdiff.models import family_of, load_pipeline
from svdiff.training import train
from svdiff.training.batches import Batch, Dataset, LatentImages, draw_batch, generator, in_buckets
from svdiff.training.datasets import JITTERS, read_training_data
from svdiff.training.loop import Trainer

pytestmark = pytest.mark.usefixtures("few_levels")

NAMES = ("a", "b", "c")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def pet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a concept with three pictures, in a checkout with prior images of its class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    folder = tmp_path / "data/concepts/pet"
    folder.mkdir(parents=True)
    (tmp_path / "out/prior/dog").mkdir(parents=True)
    for seed, name in enumerate(NAMES):
        picture(seed).save(folder / f"{name}.png")
        picture(9 + seed).save(tmp_path / f"out/prior/dog/{seed:03d}.png")
    return folder


def config(base: Path, **settings: object) -> Config:
    defaults = {"steps": 2, "batch_size": 2, "validate_every": 2, "validation_seeds": [0], "lr": 1e-2, "lr_1d": 1e-3}
    return Config.model_validate(
        {
            "base": {"model": str(base)},
            "classes": ["dog"],
            "concepts": {"pet": {"class_word": "dog"}},
            "train": defaults | settings,
            "sample": {"prompts": ["a {subject}"], "steps": 2},
            "tracking": {"live": "none"},
        }
    )


def drawn(params: Config, steps: int = 2) -> tuple[Dataset, list[Batch]]:
    """What the stage `train` trains on, and the batches of its first steps as the network sees them."""
    settings = params.train_config("pet")
    data = read_training_data(params, params.entry("pet"), settings)
    dataset = data.encode(family_of(load_pipeline(params.base)))
    size = settings.batch_size
    return dataset, [
        batch for step in range(steps) for batch in draw_batch(dataset, step, size, generator("step", step))
    ]


def gradient_of(base: Path, params: Config, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Where the loss of a batch depends on what the network predicts for its instance samples: (B, C, h, w) of booleans."""
    from accelerate import Accelerator

    from svdiff.training.methods import apply_method

    pipe, settings = load_pipeline(params.base), params.train_config("pet")
    dataset = read_training_data(params, params.entry("pet"), settings).encode(family_of(pipe))
    trainer = Trainer(pipe, apply_method(pipe, settings, ["sks"]), settings, dataset, Accelerator(cpu=True))
    predictions = []
    predict = trainer._predict

    def seen(*arguments: Any) -> tuple[Tensor, Tensor]:
        predicted, target = predict(*arguments)
        predicted.retain_grad()
        predictions.append(predicted)
        return predicted, target

    monkeypatch.setattr(trainer, "_predict", seen)
    trainer._loss(0).total.backward()
    return predictions[0].grad != 0


def left_half(size: int = 32) -> Image.Image:
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


def test_nothing_is_learned_outside_the_mask(pet: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        left_half().save(pet / f"{name}-mask.png")
    reached = gradient_of(tiny_base, config(tiny_base, masks="loss"), monkeypatch)
    instance, prior = reached[:2], reached[2:]
    assert instance[..., :4].all()
    assert not instance[..., 4:].any()
    assert prior.all()
    assert gradient_of(tiny_base, config(tiny_base), monkeypatch).all()


def test_masks_are_averaged_over_the_areas_of_the_latents(pet: Path, tiny_base: Path) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 6, 32))  # one and a half of eight columns
    for name in NAMES:
        mask.save(pet / f"{name}-mask.png")
    dataset, batches = drawn(config(tiny_base, masks="loss", flip=True))
    masks = dataset.instance.masks
    assert masks is not None
    assert masks.shape == (6, 1, 8, 8)
    columns = masks.mean(dim=(1, 2))
    assert torch.allclose(columns[0], torch.tensor([1, 0.5, *[0] * 6]), atol=0.01)
    assert torch.allclose(columns[1], columns[0].flip(0), atol=0.01)
    for batch in batches:
        assert batch.masks is not None
        assert (batch.masks[2:] == 1).all()
        assert (batch.masks[:2].mean(dim=(1, 2, 3)) < 0.25).all()


def test_captions_reach_the_network_in_the_words_of_the_concept(pet: Path, tiny_base: Path) -> None:
    (pet / "a.txt").write_text("a photo of {subject} on the left")
    (pet / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "{subject} sitting"}\n')
    dataset, batches = drawn(config(tiny_base, batch_size=3))
    assert dataset.instance.prompts == ["a photo of sks dog on the left", "sks dog sitting", "a sks dog"]
    for batch in batches:  # each holds every picture once
        assert sorted(batch.prompts[:3]) == sorted(dataset.instance.prompts)
        assert batch.prompts[3:] == ["a dog"] * 3
        for row, prompt in enumerate(batch.prompts[:3]):
            own = dataset.instance.prompts.index(prompt)
            latents = dataset.instance.latents
            assert ((batch.latents[row] - latents.mean[own]).abs() <= 6 * latents.deviation[own]).all()


def test_variations_of_a_picture_are_trained_on_with_its_caption(
    pet: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pet / "a.txt").write_text("{subject} sitting")
    seen: list[np.ndarray] = []
    encode = LatentImages.encode.__func__

    def encoded(cls: Any, family: Any, images: list[Image.Image]) -> LatentImages:
        seen.append(np.stack([np.asarray(image, dtype=int) for image in images]))
        return encode(cls, family, images)

    monkeypatch.setattr(LatentImages, "encode", classmethod(encoded))
    each = 2 + JITTERS
    dataset, batches = drawn(config(tiny_base, batch_size=3 * each, flip=True, jitter=0.3))
    pictures = seen[0]
    assert len(pictures) == len(dataset.instance.prompts) == 3 * each
    assert dataset.instance.prompts == ["sks dog sitting"] * each + ["a sks dog"] * 2 * each
    for first in range(0, len(pictures), each):
        picture, mirrored, *lit = pictures[first : first + each]
        assert np.abs(mirrored - picture[:, ::-1]).max() <= 1
        assert all(np.abs(light - picture).max() > 1 for light in lit)
        assert len({light.tobytes() for light in lit}) == JITTERS
    for batch in batches:  # each holds every variation once
        assert sorted(batch.prompts[: 3 * each]) == sorted(dataset.instance.prompts)


def oblong(pet: Path, base: Path, **settings: object) -> Config:
    """Two portraits with masks, a panorama and a square, trained in shapes near their own."""
    for name, size in {"a": (48, 72), "b": (52, 80), "c": (128, 64), "d": (64, 64)}.items():
        noise = np.random.default_rng(len(name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(pet / f"{name}.png")
    for name in ("a", "b"):
        mask = Image.new("L", Image.open(pet / f"{name}.png").size)
        mask.paste(255, (0, 0, mask.width, mask.height // 2))
        mask.save(pet / f"{name}-mask.png")
    return config(base, fit="bucket", masks="loss", **settings)


def test_oblong_pictures_are_trained_in_shapes_near_their_own(pet: Path, tiny_base: Path) -> None:
    params = oblong(pet, tiny_base, steps=6, validate_every=6)
    dataset, batches = drawn(params, steps=6)
    assert len(batches) == 10
    assert train(params, "pet", overrides={"steps": 1, "validate_every": 1}).is_file()
    shapes = [tuple(mean.shape[1:]) for mean in dataset.instance.latents.mean]
    assert shapes == [(10, 6), (10, 6), (6, 10), (8, 8)]
    assert [tuple(mask.shape[1:]) for mask in dataset.instance.masks or ()] == shapes
    assert dataset.instance.masks is not None
    assert (dataset.instance.masks[0][:, :5] == 1).all()
    assert not dataset.instance.masks[0][:, 5:].any()
    # An epoch is three batches, one a shape; square prior images need a pass of their own beside those that are not.
    seen = [(tuple(batch.latents.shape), batch.instances, batch.prompts[0]) for batch in batches]
    assert seen.count(((2, 4, 10, 6), 2, "a sks dog")) == 2
    assert seen.count(((2, 4, 6, 10), 2, "a sks dog")) == 2
    assert seen.count(((4, 4, 8, 8), 2, "a sks dog")) == 2
    assert seen.count(((2, 4, 8, 8), 2, "a dog")) == 4


def test_of_several_shapes_the_loss_is_that_of_both_passes(
    pet: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    from svdiff.training.methods import apply_method

    params = oblong(pet, tiny_base, prior_weight=0.5)
    pipe, settings = load_pipeline(params.base), params.train_config("pet")
    dataset = read_training_data(params, params.entry("pet"), settings).encode(family_of(pipe))
    trainer = Trainer(pipe, apply_method(pipe, settings, ["sks"]), settings, dataset, Accelerator(cpu=True))
    predict, parts = trainer._predict, []

    def seen(*arguments: Any) -> tuple[Tensor, Tensor]:
        predicted, target = predict(*arguments)
        parts.append((predicted - target).detach().square())
        return predicted, target

    monkeypatch.setattr(trainer, "_predict", seen)
    compared = 0
    for number in range(3):
        parts.clear()
        with torch.no_grad():
            loss = trainer._loss(number)
        if len(parts) == 1:
            continue
        compared += 1
        instance, prior = parts
        assert float(loss.prior) == pytest.approx(float(prior.mean()), rel=1e-5)
        assert float(loss.total) == pytest.approx(float(loss.instance + 0.5 * loss.prior), rel=1e-5)
        counts = instance[:, :, :5] if instance.shape[-2:] == (10, 6) else instance  # the masked half alone
        assert float(loss.instance) == pytest.approx(float(counts.mean()), rel=1e-5)
    assert compared
    assert trainer.fixed_noise_loss() > 0


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_batches_of_buckets_show_every_picture_as_often(size: int) -> None:
    groups = [[0, 1, 2, 3], [4, 5], [6]]
    turns = sum(-(-len(group) // size) for group in groups)
    epochs = 12 // min(size, 4) * 4
    batches = [in_buckets(groups, number, size, "seed") for number in range(turns * epochs)]
    assert all(any(set(batch) <= set(group) for group in groups) for batch in batches)
    shown = [picture for batch in batches for picture in batch]
    for group in groups:
        counts = [shown.count(picture) for picture in group]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) == epochs * -(-len(group) // size) * size
    assert in_buckets(groups, 5, size, "seed") == batches[5]
    assert [in_buckets(groups, n, size, "other") for n in range(20)] != batches[:20]

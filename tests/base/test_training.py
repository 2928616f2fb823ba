"""Trainings of a few steps on the tiny world: what they write, and that they resume bit for bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner
from world_parts import tiny_config

from svdiff.base import (
    autoencoder,
    cli,
    clip,
    identity,
    linear_code,
    loop,
    lpips,
    text_encoder,
    tokenizer,
    unet,
)
from svdiff.base.captions import vocabulary
from svdiff.base.config import BaseTrainingConfig, load_base_training
from svdiff.base.words import COLOURS, SPECIAL_WORDS, made_up_words
from svdiff.base.world import World
from svdiff.errors import SvdiffError

Home = Callable[[str], None]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.rglob("*.safetensors")
    return load_file(path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "part",
    [text_encoder, *(pytest.param(part, marks=pytest.mark.slow) for part in (identity, lpips, clip, autoencoder))],
    ids=lambda part: part.__name__.rpartition(".")[2],
)  # fmt: skip
def test_a_training_resumes_bit_for_bit_and_writes_again_what_was_removed(
    part, world_folder: Path, tmp_path: Path, home: Home
) -> None:
    config = tiny_config(world_folder)
    assert part.train(config, tmp_path / "one")
    home("halves")
    assert not part.train(config, tmp_path / "two", stop_after=2)
    if part is identity:  # in its second phase
        assert not part.train(config, tmp_path / "two", stop_after=config.identity.steps + 1)
    halfway = weights(tmp_path / "two") if (tmp_path / "two").exists() else {}
    assert part.train(config, tmp_path / "two")
    one = weights(tmp_path / "one")
    assert same(one, weights(tmp_path / "two"))
    assert not same(one, halfway)
    shutil.rmtree(tmp_path / "two")
    assert part.train(config, tmp_path / "two")
    assert same(one, weights(tmp_path / "two"))
    home("other-seed")
    assert part.train(config.model_copy(update={"seed": 4}), tmp_path / "three")
    assert not same(one, weights(tmp_path / "three"))


@pytest.mark.slow
def test_unet_training_resumes_bit_for_bit_and_loads_as_stable_diffusion(
    world_folder: Path, tmp_path: Path, home: Home
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    config = tiny_config(world_folder)
    vae, text = tmp_path / "vae", tmp_path / "text"
    autoencoder.train(config, vae)
    text_encoder.train(config, text)
    assert unet.train(config, vae, text, tmp_path / "one")
    home("halves")
    unet.train(config, vae, text, tmp_path / "two", stop_after=1)
    assert unet.train(config, vae, text, tmp_path / "two")
    assert same(weights(tmp_path / "one" / "unet"), weights(tmp_path / "two" / "unet"))
    assert json.loads((tmp_path / "one" / unet.TRAINING_FILE).read_text())["pictures"] == 4 * 4

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "one")  # and nothing else, as anybody would
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    picture = pipe("a sks cat on a blue background", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other("a cat", image=picture, strength=0.5, num_inference_steps=4).images[0].size == (64, 64)


def test_a_batch_of_the_unet_is_a_function_of_its_step_and_some_captions_are_empty(
    world_folder: Path, world: World
) -> None:
    config = tiny_config(world_folder, unet={"batch_size": 64, "dropout": 0.5, "named": 1.0, "pairs": 0.0})
    places, backgrounds, texts = unet.batch(config, world, 3)
    assert places.shape == (64, 2, 5)
    assert 16 < texts.count("") < 48
    names = set(made_up_words())
    assert sum(bool(names & set(text.split())) for text in texts) > 10
    again = unet.batch(config, world, 3)
    assert torch.equal(places, again[0])
    assert torch.equal(backgrounds, again[1])
    assert texts == again[2]
    assert unet.batch(config, world, 4)[2] != texts


def test_the_unet_needs_autoencoder_and_text_encoder(world_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match="base train autoencoder"):
        unet.train(tiny_config(world_folder), tmp_path / "nothing", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(SvdiffError, match="base train text"):
        unet.train(tiny_config(world_folder), tmp_path / "vae", tmp_path / "nothing", tmp_path / "out")


def test_one_command_trains_every_part_in_order_and_stops_where_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, Path]] = []
    stopped: list[str] = []

    def record(part: str) -> Callable[..., bool]:
        def train(config: BaseTrainingConfig, *folders: Path) -> bool:
            trained.append((part, folders[-1]))
            return part not in stopped

        return train

    parts = {"autoencoder": autoencoder, "text": text_encoder, "unet": unet, "identity": identity, "clip": clip, "lpips": lpips}  # fmt: skip
    for name, module in parts.items():
        monkeypatch.setattr(module, "train", record(name))
    asked = ["--config", str(tmp_path / "none.yaml"), "--models", str(tmp_path)]
    assert CliRunner().invoke(cli.app, ["train", "all", *asked]).exit_code == 0
    assert [part for part, _ in trained] == list(parts)
    places = dict(trained)
    assert places["autoencoder"] == loop.scratch("vae")
    assert places["text"] == loop.scratch("text-encoder")
    assert places["unet"] == tmp_path / "base"
    assert all(places[name] == tmp_path / name for name in ("identity", "clip", "lpips"))

    trained.clear()
    stopped.append("text")
    result = CliRunner().invoke(cli.app, ["train", "all", *asked])
    assert result.exit_code == 130
    assert "stopped in text" in result.output
    assert [part for part, _ in trained] == ["autoencoder", "text"]
    trained.clear()
    assert CliRunner().invoke(cli.app, ["train", "clip", *asked]).exit_code == 0
    assert trained == [("clip", tmp_path / "clip")]


def test_clip_is_open_clips(world_folder: Path, world: World, tmp_path: Path) -> None:
    import open_clip

    assert clip.train(tiny_config(world_folder, clip={"steps": 1, "batch_size": 4, "width": 8}), tmp_path / "clip")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'clip'}")
    picture = transform(world.picture(world.scene(0, 0)))[None]
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(["a cat on a blue background"])
    with torch.no_grad():
        assert model.encode_image(picture).shape == model.encode_text(ids).shape == (1, 128)


def test_views_for_identity_show_the_individual_and_companions_as_unseen_as_asked(world: World) -> None:
    draw = random.Random(0)
    who = world.others["critters"][0]
    for seen in (True, False):
        scenes = [identity.view(who, draw, world, seen=seen) for _ in range(200)]
        assert all(sum(one.what == who for one in scene.placed) == 1 for scene in scenes)
        others = [one.what for scene in scenes for one in scene.placed if one.what != who]
        people = [other for other in others if hasattr(other, "number")]
        assert len(people) > 10
        assert all(other.kind != who.kind and (other.number < 100_000) == seen for other in people)
        assert len({scene.colour for scene in scenes}) == len(COLOURS)
        for scene in scenes:
            world.array(scene)


def test_look_alikes_are_those_of_a_style_that_differ_least_and_visibly(world: World) -> None:
    alike = identity.LookAlikes(world, {style: group for style, group in world.known.items() if group})
    chance = random.Random(0)
    for _ in range(20):
        first, *others = alike.draw(chance, 3, among=2)
        group = world.known[first.style]
        drawings = dict(zip(group, alike.drawings[first.style].astype(int), strict=True))
        distances = {one: abs(drawings[one] - drawings[first]).mean() for one in group}
        visible = sorted((one for one in group if distances[one] >= identity.VISIBLE), key=lambda one: distances[one])
        assert first not in others
        assert set(others) == set(visible[:2])


def test_contrast_tells_each_picture_from_the_others_of_its_individual() -> None:
    individuals = torch.eye(4)[None].repeat(3, 1, 1)
    loss, right = identity.contrast(individuals, 100.0)
    assert loss < 1e-3
    assert right == 1
    strangers = torch.stack([torch.eye(4), torch.eye(4).roll(1, 0), torch.eye(4).roll(2, 0)])
    _, right = identity.contrast(strangers, 100.0)
    assert right == 0
    views, scale = (
        torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), dim=2),
        7.0,
    )
    of_pairs = scale * views[0] @ views[1].T
    expected = (
        torch.nn.functional.cross_entropy(of_pairs, torch.arange(5))
        + torch.nn.functional.cross_entropy(of_pairs.T, torch.arange(5))
    ) / 2
    torch.testing.assert_close(identity.contrast(views, scale)[0], expected)


def test_identity_loads_as_a_transformers_model_with_its_preprocessing(
    world_folder: Path, world: World, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    assert identity.train(tiny_config(world_folder), tmp_path / "identity")
    model = AutoModel.from_pretrained(tmp_path / "identity")
    prepare = AutoImageProcessor.from_pretrained(tmp_path / "identity")
    picture = world.picture(world.scene(0, 0)).resize((256, 256))
    x = prepare(picture, return_tensors="pt").pixel_values
    assert x.shape == (1, 3, 128, 128)
    assert x.min() >= -1
    assert model(x).pooler_output.flatten(1).shape == (1, 16)


def test_cells_are_where_the_picture_shows_something(world: World) -> None:
    labels = text_encoder.Labels(world.kinds)
    for index in range(60):
        scene = world.scene(8, index, pairs=0.5)
        what, number = (grid.view(8, 8) for grid in labels.cells(scene))
        assert ((number == -1) == (what == len(labels.whats))).all()
        picture = torch.from_numpy(world.array(scene).astype(int))
        drawn = (picture != torch.tensor(COLOURS[scene.colour])).any(2).view(8, 8, 8, 8).any(3).any(1)
        assert not (drawn & (number == -1)).any()
        for n, one in enumerate(scene.placed):
            assert (what[number == n] == labels.whats.index(one.what.kind)).all()


def test_labels_tell_every_trait_of_an_individual_and_nothing_of_others(world: World) -> None:
    labels = text_encoder.Labels(world.kinds)
    for index in range(60):
        (one,) = world.scene(8, index, pairs=0.0).placed
        answers = labels.traits_of(one)
        assert len(answers) == len(labels.sizes)
        assert all(answer < size for answer, size in zip(answers, labels.sizes, strict=True))
        if hasattr(one.what, "traits"):
            found = {}
            for answer, ((style, trait), values) in zip(answers[3:], labels.traits.items(), strict=True):
                if style == one.what.style and answer < len(values):
                    found[trait] = values[answer]
                assert (answer == text_encoder.NOT_ASKED) == (style != one.what.style)
            assert found == dict(one.what.traits)
    assert set(labels.traits_of(None)) == {text_encoder.NOT_ASKED}


def test_special_words_start_as_names_that_are_nobodys(world_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(world_folder)
    names = text_encoder.named_count(config)
    tokens = text_encoder.load_tokenizer(config)
    encoder = text_encoder.build(config.text, tokens)
    ids = tokens.convert_tokens_to_ids([f"{word}</w>" for word in SPECIAL_WORDS])
    known = tokens.convert_tokens_to_ids([f"{word}</w>" for word in made_up_words()[:names]])
    with torch.no_grad():
        table = encoder.get_input_embeddings().weight
        table[known] = 5 + 2 * torch.randn(names, table.shape[1], generator=torch.Generator().manual_seed(0))
        before = table.clone()
        text_encoder._draw_special_words(encoder, tokens, names, 0)
    found = table[ids].detach()
    assert found.mean() == pytest.approx(5, abs=0.6)
    assert found.std() == pytest.approx(2, rel=0.3)
    assert (torch.cdist(found, found) + torch.eye(len(ids)) * 1e9).min() > 1
    others = [n for n in range(len(table)) if n not in ids]
    assert torch.equal(table[others], before[others])


@pytest.mark.slow
def test_reading_learns_kinds_and_order(world_folder: Path, world: World, tmp_path: Path) -> None:
    """After a minute on captions alone: which of two is on the left."""
    config = tiny_config(world_folder, text={"steps": 1000, "batch_size": 32, "layers": 2, "width": 64, "lr": 3e-3})
    assert text_encoder.train(config, tmp_path / "text")
    labels = text_encoder.Labels(world.kinds)
    tokens = text_encoder.load_tokenizer(config)
    reader = text_encoder.Reader(text_encoder.build(config.text, tokens), 64, labels)
    reader.load_state_dict(torch.load(loop.scratch("text") / "state.pt", weights_only=True)["state"]["reader"])
    answers = []
    for text in ("a cat on the left and a tree on the right", "a tree on the left and a cat on the right"):
        ids = tokens(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states = reader.text_encoder(ids).last_hidden_state
            asked, _ = reader.ask(reader.cells[None], states, states)
            grid = reader.what(reader.think(asked)).view(8, 8, -1)[..., :-1].argmax(-1)
        answers.append((labels.whats[int(grid[4, 1])], labels.whats[int(grid[4, 6])]))
    assert answers == [("cat", "tree"), ("tree", "cat")]


def test_the_linear_code_is_the_principal_components(world_folder: Path, world: World) -> None:
    torch.manual_seed(0)
    pictures = autoencoder.pixels(world, [world.scene(0, i) for i in range(40)])
    vae = autoencoder.build(tiny_config(world_folder).autoencoder)
    linear_code.write_encoder(vae, *linear_code.fit(pictures, vae.config.latent_channels))
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(
        linear_code.encode(*linear_code.read_encoder(vae), pictures), latents, atol=0.02, rtol=0.01
    )
    # Against first principles: centred patches and their singular value decomposition.
    rows = linear_code.patches(pictures).permute(0, 2, 3, 1).reshape(-1, 192).double()
    vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
    expected = (rows - rows.mean(0)) @ vh[:4].T
    found = latents[:, :4].permute(0, 2, 3, 1).reshape(-1, 4).double()
    torch.testing.assert_close(found.abs(), expected.abs(), atol=0.02, rtol=0.02)


def test_every_word_is_one_token_and_any_text_tokenises(tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer", 448)
    tokens = tokenizer.load(tmp_path / "tokenizer")
    assert [word for word in vocabulary(448) if len(tokens.tokenize(word)) != 1] == []
    assert len({tokens.convert_tokens_to_ids(f"{word}</w>") for word in SPECIAL_WORDS}) == len(SPECIAL_WORDS)
    strange = tokens("a Xylophone, 3 kávé 猫!").input_ids
    assert tokens.decode(strange, skip_special_tokens=True).replace(" ", "") == "axylophone,3kávé猫!"
    length = tokenizer.MAX_TOKENS
    assert tokens(["a cat"] * 2, padding="max_length", truncation=True, return_tensors="pt").input_ids.shape == (
        2,
        length,
    )
    assert len(tokens(" ".join(["cat"] * 60), truncation=True).input_ids) == length


def test_the_training_distance_is_the_lpips_packages() -> None:
    import lpips as package

    model = lpips.Trunk()
    whole = package.LPIPS(net="alex", lpips=False, pnet_rand=True, pretrained=False, verbose=False)
    whole.net.load_state_dict(model.trunk.state_dict())
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = whole(x, y).flatten() / (2 * whole.L)
        found = lpips.distances(model.features(x), model.features(y))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_schedule_and_draws_are_functions_of_the_step() -> None:
    rates = [loop.cosine_rate(step, 100, 10, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[30] == 1
    assert rates == sorted(rates[:10]) + rates[10:]
    assert rates[-1] < 0.01
    draws = [torch.randn(4, generator=loop.step_generator(3, 7)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.randn(4, generator=loop.step_generator(3, 8)))


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("base_training:\n  unet:\n    step: 3\n")
    with pytest.raises(SvdiffError, match=r"base_training\.unet\.step"):
        load_base_training(path)
    assert load_base_training(tmp_path / "none.yaml") == BaseTrainingConfig()

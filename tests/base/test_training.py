from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from svdiff.base import autoencoder, clip, linear_code, loop, lpips, muon, reading, tokenizer, unet, widening, winograd
from svdiff.base.captions import NEUTRAL_WORDS, vocabulary
from svdiff.base.config import BaseTrainingConfig, load_base_training
from svdiff.base.diffusion import LatentPool
from svdiff.base.things import COLOURS, HAND_WORDS, SPECIAL_WORDS
from svdiff.base.world import World
from svdiff.errors import SvdiffError


def tiny(world_folder: Path, **parts: object) -> BaseTrainingConfig:
    settings: dict[str, object] = {
        "world": str(world_folder),
        "things": None,
        "autoencoder": {"pool": 64, "steps": 3, "batch_size": 4},
        "text": {"steps": 4, "batch_size": 4, "layers": 1, "width": 32},
        "unet": {
            "steps": 4, "batch_size": 4, "channels": (32, 64), "heads": 2, "pool": 8, "passes": 1, "warmup": 1,
        },
        "lpips": {"steps": 4, "batch_size": 4, "pool": 16},
        "clip": {"steps": 2, "batch_size": 8, "pool": 16, "width": 8},
    }  # fmt: skip
    return BaseTrainingConfig.model_validate({**settings, **parts})


def test_the_linear_code_is_the_principal_components(world_folder: Path) -> None:
    torch.manual_seed(0)
    config = tiny(world_folder).autoencoder
    world = World(world_folder)
    pictures = autoencoder.pixels([world.picture(world.scene(0, i)) for i in range(40)])
    vae = autoencoder.build(config)
    linear_code.write_encoder(vae, *linear_code.fit(pictures, config.latent_channels))
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean
    torch.testing.assert_close(linear_code.encode(vae, pictures), latents, atol=0.02, rtol=0.01)
    # Against first principles: centred patches and their singular value decomposition.
    rows = linear_code.patches(pictures).permute(0, 2, 3, 1).reshape(-1, 192).double()
    vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
    expected = (rows - rows.mean(0)) @ vh[:4].T
    found = latents[:, :4].permute(0, 2, 3, 1).reshape(-1, 4).double()
    torch.testing.assert_close(found.abs(), expected.abs(), atol=0.02, rtol=0.02)


def test_every_word_is_one_token_and_any_text_tokenises(tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    tokens = tokenizer.load(tmp_path / "tokenizer")
    assert [word for word in vocabulary() if len(tokens.tokenize(word)) != 1] == []
    assert len({tokens.convert_tokens_to_ids(f"{word}</w>") for word in SPECIAL_WORDS}) == len(SPECIAL_WORDS)
    strange = tokens("a Xylophone, 3 kávé 猫!").input_ids
    assert tokens.decode(strange, skip_special_tokens=True).replace(" ", "") == "axylophone,3kávé猫!"
    assert tokens(["a dog"] * 2, padding="max_length", truncation=True, return_tensors="pt").input_ids.shape == (2, 24)
    assert len(tokens(" ".join(["dog"] * 60), truncation=True).input_ids) == 24


def test_lpips_training_resumes_bit_for_bit(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    config = tiny(world_folder)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "straight"))
    assert lpips.train(config, tmp_path / "one")
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "halves"))
    assert not lpips.train(config, tmp_path / "two", stop_after=2)
    assert not (tmp_path / "two").exists()
    assert lpips.train(config, tmp_path / "two")
    one, two = (load_file(tmp_path / name / "backbone.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_wider_code_says_what_the_narrower_said_in_the_same_numbers(world_folder: Path) -> None:
    world = World(world_folder)
    pictures = autoencoder.pixels([world.picture(world.scene(0, i)) for i in range(40)])
    vaes = []
    for channels in (4, 8):
        vae = autoencoder.build(BaseTrainingConfig().autoencoder.model_copy(update={"latent_channels": channels}))
        linear_code.write_encoder(vae, *linear_code.fit(pictures, channels, vaes[0] if vaes else None))
        vaes.append(vae)
    narrow, wide = (linear_code.encode(vae, pictures) for vae in vaes)
    torch.testing.assert_close(wide[:, :4], narrow, atol=1e-4, rtol=1e-4)
    direct, _ = linear_code.fit(pictures, 8)
    spans = [torch.linalg.qr(rows.T.double()).Q for rows in (direct, linear_code.read_encoder(vaes[1])[0])]
    torch.testing.assert_close(torch.linalg.svdvals(spans[0].T @ spans[1]), torch.ones(8).double(), atol=1e-3, rtol=0)


def test_a_widened_unet_starts_as_the_narrower_one(world_folder: Path) -> None:
    config = tiny(world_folder).unet
    narrow, wide = unet.build_unet(config, 4, 32), unet.build_unet(config, 8, 32)
    widening.load_widened(wide, narrow.state_dict(), "narrow")
    z, t, states = torch.randn(2, 8, 8, 8), torch.tensor([10, 900]), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected, found = (net(x, t, states).sample for net, x in ((narrow, z[:, :4]), (wide, z)))
    torch.testing.assert_close(found[:, :4], expected, atol=1e-5, rtol=1e-5)
    assert not found[:, 4:].any()
    with pytest.raises(SvdiffError, match=r"wide: conv_in\.weight"):
        widening.load_widened(narrow, wide.state_dict(), "wide")


def test_the_training_distance_is_the_lpips_packages() -> None:
    import lpips as package

    model = lpips.Classifier("squeeze", 3, 2, 2)
    whole = package.LPIPS(net="squeeze", lpips=False, pnet_rand=True, pretrained=False, verbose=False)
    whole.net.load_state_dict(model.trunk.state_dict())
    x, y = torch.rand(3, 3, 64, 64) * 2 - 1, torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = whole(x, y).flatten() / (2 * whole.L)
        found = lpips.distances(model.features(x), model.features(y))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_muon_steps_are_orthogonal_and_as_large_as_the_rate_says() -> None:
    matrix = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    for shape in (matrix, matrix.T):
        values = torch.linalg.svdvals(muon.orthogonal(shape))
        assert values.min() > 0.6
        assert values.max() < 1.3
    # The authors' iteration, written out on the singular values in double precision.
    u, sigma, vh = torch.linalg.svd((matrix / matrix.norm()).double(), full_matrices=False)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    torch.testing.assert_close(muon.orthogonal(matrix).double(), u @ torch.diag(sigma) @ vh, atol=1e-4, rtol=1e-4)
    weight = torch.nn.Parameter(torch.zeros(12, 10, 2, 2))
    weight.grad = matrix.view(12, 10, 2, 2)
    muon.Muon([weight], lr=0.1).step()
    assert 0.01 < weight.detach().pow(2).mean().sqrt() < 0.03


@pytest.mark.slow
def test_unet_training_resumes_bit_for_bit_and_loads_as_stable_diffusion(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
    from safetensors.torch import load_file

    config = tiny(world_folder)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "straight"))
    vae, text = tmp_path / "vae", tmp_path / "text"
    autoencoder.train(config, vae)
    reading.train(config, text)
    assert unet.train(config, vae, text, tmp_path / "one")
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "halves"))
    unet.train(config, vae, text, tmp_path / "two", stop_after=1)
    assert unet.train(config, vae, text, tmp_path / "two")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        one, two = (load_file(tmp_path / run / part / f"{name}.safetensors") for run in ("one", "two"))
        assert all(torch.equal(one[key], two[key]) for key in one)

    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "third"))
    further = config.unet.model_copy(update={"start_from": str(tmp_path / "two"), "lr": 1e-9})
    again = config.model_copy(update={"unet": further, "seed": 1})  # whose own first weights are others
    assert unet.train(again, vae, text, tmp_path / "two")  # in place, as a new version replaces the old
    third = load_file(tmp_path / "two" / "unet" / "diffusion_pytorch_model.safetensors")
    start = load_file(tmp_path / "one" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.allclose(third[key], start[key], atol=1e-3) for key in third)
    past = json.loads((tmp_path / "two" / "training.json").read_text())
    assert past["started_from"]["started_from"] is None

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "one")  # and nothing else, as anybody would
    pipe.set_progress_bar_config(disable=True)
    assert pipe.safety_checker is None
    picture = pipe("a sks dog on a blue background", num_inference_steps=2).images[0]
    assert picture.size == (64, 64)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    assert other("a dog", image=picture, strength=0.5, num_inference_steps=4).images[0].size == (64, 64)


def test_the_pool_shows_hands_and_names_them(world_folder: Path) -> None:
    world = World(world_folder)
    vae = autoencoder.build(tiny(world_folder).autoencoder)
    rows = autoencoder.pixels([world.picture(world.scene(0, i)) for i in range(8)])
    linear_code.write_encoder(vae, *linear_code.fit(rows, vae.config.latent_channels))
    pools = {}
    for share in (0.0, 0.5, 1.0):
        settings = {"batch_size": 32, "pool": 32, "passes": 4, "dropout": 0.0, "hands": share}
        pools[share] = LatentPool(world, vae, tiny(world_folder, unet=settings))
    drawn = {share: [pool.batch(step) for step in range(3)] for share, pool in pools.items()}

    def names_a_hand(share: float) -> list[bool]:
        return [bool(set(HAND_WORDS) & set(text.split())) for _, texts in drawn[share] for text in texts]

    assert all(names_a_hand(1.0))
    assert not any(names_a_hand(0.0))
    assert (pools[1.0].latents != pools[0.0].latents).flatten(1).any(1).all()
    redrawn = [any(thing.hand for thing in scene.things) for scene in pools[0.5].scenes]
    assert 4 < sum(redrawn) < 32
    changed = (pools[0.5].latents != pools[0.0].latents).flatten(1).any(1)
    assert changed.tolist() == redrawn


def test_clip_training_resumes_goes_on_and_is_open_clips(
    world_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from safetensors.torch import load_file

    def weights(folder: Path) -> dict[str, torch.Tensor]:
        return load_file(folder / "open_clip_model.safetensors")

    config = tiny(world_folder, clip={"steps": 3, "batch_size": 8, "pool": 16, "width": 8})
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "straight"))
    assert clip.train(config, tmp_path / "one")
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "halves"))
    assert not clip.train(config, tmp_path / "two", stop_after=2)
    assert clip.train(config, tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(one[key], two[key]) for key in one)

    further = config.clip.model_copy(update={"start_from": str(tmp_path / "one"), "lr": 1e-9})
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "third"))
    # Under another seed, whose own first weights are others.
    assert clip.train(config.model_copy(update={"clip": further, "seed": 1}), tmp_path / "three")
    learned = [key for key, value in one.items() if value.is_floating_point() and "running" not in key]
    assert all(torch.allclose(weights(tmp_path / "three")[key], one[key], atol=1e-3) for key in learned)
    with pytest.raises(SvdiffError, match=r"one \.safetensors file, and holds 0"):
        widening.load_start(torch.nn.Linear(1, 1), tmp_path)

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'one'}")
    world = World(world_folder)
    picture = transform(world.picture(world.scene(0, 0)))[None]
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'one'}")(["a dog on a blue background"])
    with torch.no_grad():
        assert model.encode_image(picture).shape == model.encode_text(ids).shape == (1, 128)


def test_the_unet_needs_autoencoder_and_text_encoder(world_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match="base train autoencoder"):
        unet.train(tiny(world_folder), tmp_path / "nothing", tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(SvdiffError, match="base train text"):
        unet.train(tiny(world_folder), tmp_path / "vae", tmp_path / "nothing", tmp_path / "out")


def test_special_words_are_as_large_as_words_for_hands(world_folder: Path, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    tokens = tokenizer.load(tmp_path / "tokenizer")
    encoder = reading.build_text_encoder(tiny(world_folder).text, tokens)
    with torch.no_grad():
        table = encoder.get_input_embeddings().weight
        table.mul_(torch.rand(len(table), 1) * 10)
        reading._spread_special_words(encoder, tokens, 0)
    ids = tokens.convert_tokens_to_ids([f"{word}</w>" for word in SPECIAL_WORDS])
    hands = tokens.convert_tokens_to_ids([f"{word}</w>" for word in HAND_WORDS])
    special, hand = table[ids].norm(dim=1), table[hands].norm(dim=1)
    assert 0.6 * hand.mean() < special.mean() < 1.6 * hand.mean()
    assert (torch.cdist(table[ids], table[ids]) + torch.eye(len(ids)) * 1e9).min() > 0.1


def test_cells_are_where_the_picture_shows_something(world_folder: Path) -> None:
    world = World(world_folder)
    for index in range(60):
        scene = world.scene(8, index)
        grid = reading.cells(scene, world.words).view(8, 8)
        assert set(grid.unique().tolist()) <= {len(world.words), *(world.words.index(t.word) for t in scene.things)}
        picture = torch.tensor(np.asarray(world.picture(scene)).astype(int))
        drawn = (picture != torch.tensor(COLOURS[scene.colour])).any(2).view(8, 8, 8, 8).any(3).any(1)
        assert not (drawn & (grid == len(world.words))).any()
        for thing in scene.things:
            assert grid[int(thing.y * 8 - 0.5), int(thing.x * 8 - 0.5)] == world.words.index(thing.word)


def test_cells_of_hands_are_those_of_their_things(world_folder: Path) -> None:
    world = World(world_folder)
    asked = 0
    for index in range(60):
        scene = world.scene(8, index, pairs=0.5, hands=0.5)
        things, hands = reading.cells(scene, world.words), reading.hand_cells(scene)
        assert torch.equal(hands == reading.NOT_ASKED, things == len(world.words))
        for thing in scene.things:
            own = hands[things == world.words.index(thing.word)].unique().tolist()
            assert own == [len(HAND_WORDS) if thing.hand is None else HAND_WORDS.index(thing.hand)]
            asked += thing.hand is not None
    assert asked > 20


def test_reading_tells_hands_apart_and_goes_on(world_folder: Path, tmp_path: Path) -> None:
    """A word that names a hand leaves its mark on what the encoder says, more than one that names nothing."""
    from transformers import CLIPTextModel

    settings = {"steps": 150, "batch_size": 32, "layers": 2, "width": 64, "lr": 3e-3}
    assert reading.train(tiny(world_folder, text=settings), tmp_path / "one")
    shutil.rmtree(loop.scratch("text"))
    again = settings | {"steps": 1, "lr": 1e-9, "start_from": str(tmp_path / "one")}
    assert reading.train(tiny(world_folder, text=again, seed=5), tmp_path / "two")
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    first, second = (CLIPTextModel.from_pretrained(tmp_path / name) for name in ("one", "two"))

    def said(encoder: CLIPTextModel, word: str) -> torch.Tensor:
        ids = tokens(f"a {word} dog", padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids).last_hidden_state[0]

    def spread(words: tuple[str, ...]) -> float:
        return float(torch.stack([said(first, word) for word in words]).std(0).norm())

    assert spread(HAND_WORDS) > 1.5 * spread(NEUTRAL_WORDS)
    assert torch.allclose(said(first, HAND_WORDS[0]), said(second, HAND_WORDS[0]), atol=1e-4)


def test_reading_learns_order(world_folder: Path, tmp_path: Path) -> None:
    """After a few seconds on four things: which of two captions' things is on the left."""
    config = tiny(world_folder, text={"steps": 250, "batch_size": 32, "layers": 2, "width": 64, "lr": 3e-3})
    assert reading.train(config, tmp_path / "text")
    world = World(world_folder)
    state = torch.load(loop.scratch("text") / "state.pt", weights_only=True)["state"]["reader"]
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    reader = reading.Reader(reading.build_text_encoder(config.text, tokens), 64, len(world.words), len(world.artists))
    reader.load_state_dict(state)
    answers = {}
    for text in ("a dog on the left and a tree on the right", "a tree on the left and a dog on the right"):
        ids = tokens(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            states = reader.text_encoder(ids).last_hidden_state
            asked, _ = reader.ask(reader.cells[None], states, states)
            grid = reader.thing(reader.think(asked)).view(8, 8, -1)[..., :-1].argmax(-1)
        answers[text] = world.words[int(grid[4, 1])], world.words[int(grid[4, 6])]
    assert list(answers.values()) == [("dog", "tree"), ("tree", "dog")]


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


@pytest.mark.parametrize("size", [4, 8])
def test_winograd_convolutions_are_convolutions(size: int) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 10, 3, padding=1).to(memory_format=torch.channels_last)
    other = copy.deepcopy(plain)
    winograd.use_winograd(other)
    assert type(other) is winograd.WinogradConv2d
    exact = copy.deepcopy(plain).double()
    x = torch.randn(3, 6, size, size).contiguous(memory_format=torch.channels_last)
    upstream = torch.randn(3, 10, size, size)
    results = []
    for conv in (exact, other):
        given = x.to(conv.weight.dtype).requires_grad_()
        y = conv(given)
        results.append([y, *torch.autograd.grad(y, [given, *conv.parameters()], upstream.to(y.dtype))])
    for expected, found in zip(*results, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_strided_and_wide_convolutions_stay_as_they_are() -> None:
    kept = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, stride=2, padding=1), torch.nn.Conv2d(4, 4, 1))
    winograd.use_winograd(kept)
    assert all(type(conv) is torch.nn.Conv2d for conv in kept)


def test_scene_heads_ask_nothing_of_a_hand_that_is_not_shown(world_folder: Path) -> None:
    world = World(world_folder)
    heads = clip.SceneHeads(16, world)
    scenes = [world.scene(0, index) for index in range(12)]
    own, restyled = heads.labels(scenes, [False] * 12), heads.labels(scenes, [True] * 12)
    assert [world.artists[n] for n in own[:, 2]] == [scene.artist for scene in scenes]
    assert (restyled[:, 2] == -100).all()
    assert torch.equal(own[:, [0, 1, 3, 4]], restyled[:, [0, 1, 3, 4]])
    alone = torch.tensor([scene.layout == "one" for scene in scenes])
    assert ((own[:, 1] == len(world.words)) == alone).all()
    vectors = torch.randn(12, 16)
    loss = heads(vectors, own)
    loss.backward()
    assert heads.linear.weight.grad is not None
    assert heads.linear.weight.grad.abs().sum() > 0

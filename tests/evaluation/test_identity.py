"""The identity score against its definitions: who is recognised, what a class word keeps, and which network says so."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from evaluation_parts import drawing, write_tiny_identity

from svdiff.config import EvaluatorsConfig
from svdiff.errors import SvdiffError
from svdiff.evaluation.evaluators import BATCH, describe_evaluators, load_clip, load_identity, load_lpips
from svdiff.evaluation.identity import (
    _resampled_variety,
    both_identified,
    identity,
    identity_rank,
    identity_top1,
    told_apart,
    variety,
    variety_kept,
)
from svdiff.files import sha256_file


def around(centre: np.ndarray, count: int, spread: float, seed: int) -> np.ndarray:
    points = centre + spread * np.random.default_rng(seed).standard_normal((count, len(centre)))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


CENTRES = np.linalg.qr(np.random.default_rng(7).standard_normal((16, 16)))[0]
CONCEPT, OTHER = around(CENTRES[0], 5, 0.1, 1), around(CENTRES[1], 4, 0.1, 2)
RIVALS = [around(CENTRES[place], 3, 0.1, place) for place in range(2, 16)]


def test_identity_is_the_mean_cosine_and_does_not_grow_with_the_number_of_pictures() -> None:
    pictures = around(CENTRES[0], 6, 0.2, 3)
    scores = identity(pictures, CONCEPT)
    assert scores == pytest.approx([np.mean([p @ c for c in CONCEPT]) for p in pictures])
    np.testing.assert_allclose(identity(pictures, np.repeat(CONCEPT, 3, axis=0)), scores)
    np.testing.assert_allclose(identity(CONCEPT[:1], CONCEPT[0]), 1)


def test_the_concept_is_found_among_others_and_strangers_are_not() -> None:
    assert identity_top1(around(CENTRES[0], 20, 0.1, 4), CONCEPT, RIVALS).all()
    assert not identity_top1(around(CENTRES[5], 20, 0.1, 5), CONCEPT, RIVALS).any()
    assert identity_rank(RIVALS[0], CONCEPT, RIVALS).min() >= 1
    single = [rival[0] for rival in RIVALS]  # one embedding each
    assert identity_top1(around(CENTRES[0], 20, 0.1, 4), CONCEPT, single).all()


def test_a_twin_is_no_rival() -> None:
    shown, twin = around(CENTRES[0], 40, 0.1, 6), around(CENTRES[0], 5, 0.1, 8)
    assert 0.1 < identity_top1(shown, CONCEPT, [*RIVALS, twin]).mean() < 0.9
    left = told_apart(shown, CONCEPT, [*RIVALS[:3], twin, *RIVALS[3:]])
    assert len(left) == len(RIVALS)
    assert all(one is rival for one, rival in zip(left, RIVALS, strict=True))


def test_nobody_is_favoured_for_having_uniform_pictures() -> None:
    picture = CENTRES[0]
    near, spread = picture + 0.5 * CENTRES[1], np.stack([picture + side * CENTRES[2] for side in (2, -2)])
    uniform = np.repeat(near[None] / np.linalg.norm(near), 2, axis=0)
    varied = spread / np.linalg.norm(spread, axis=1, keepdims=True)  # in the mean exactly the picture's direction
    assert identity(picture[None], uniform) > identity(picture[None], varied)
    assert identity_top1(picture[None], varied, [uniform]).all()


def test_chance_finds_one_in_as_many_as_there_are() -> None:
    noise = np.random.default_rng(0).standard_normal((20_000, 16))
    found = identity_top1(noise, CENTRES[0], list(CENTRES[1:10])).mean()
    assert found == pytest.approx(0.1, abs=0.01)


def test_a_draw_with_a_rival_does_not_count() -> None:
    assert not identity_top1(CONCEPT, CONCEPT, [CONCEPT]).any()


def test_both_are_identified_whichever_is_where_and_neither_twice() -> None:
    one, other = around(CENTRES[0], 8, 0.1, 8), around(CENTRES[1], 8, 0.1, 9)
    assert both_identified((one, other), (CONCEPT, OTHER), RIVALS).all()
    assert both_identified((other, one), (CONCEPT, OTHER), RIVALS).all()
    assert not both_identified((one, one), (CONCEPT, OTHER)).any()
    stranger = around(CENTRES[4], 8, 0.1, 10)
    assert not both_identified((one, stranger), (CONCEPT, OTHER), RIVALS).any()


def test_variety_is_0_of_equal_pictures_and_1_of_unrelated_ones() -> None:
    assert variety(np.repeat(CENTRES[:1], 4, axis=0)) == pytest.approx(0)
    assert variety(CENTRES) == pytest.approx(1)


def test_pictures_drawn_twice_make_no_pair_with_themselves() -> None:
    random = np.random.default_rng(0)
    pictures = random.standard_normal((6, 4))
    pictures /= np.linalg.norm(pictures, axis=1, keepdims=True)
    chosen = random.integers(0, 6, (50, 6))
    expected = []
    for drawn in chosen:
        pairs = [(i, j) for i in drawn for j in drawn if i != j]
        expected.append(1 - np.mean([pictures[i] @ pictures[j] for i, j in pairs]))
    assert _resampled_variety(pictures, chosen) == pytest.approx(np.array(expected), abs=1e-12)


def test_variety_kept_compares_prompt_by_prompt() -> None:
    wide = [around(CENTRES[0], 12, 0.5, 1), around(CENTRES[1], 12, 0.5, 2)]
    narrow = [around(CENTRES[0], 12, 0.1, 1), around(CENTRES[1], 12, 0.1, 2)]
    spread, base_spread, kept = variety_kept(narrow, wide, resamples=500, seed=0)
    assert kept.mean == pytest.approx(spread / base_spread)
    assert kept.low < kept.mean < kept.high < 0.5
    assert variety_kept(wide, wide, resamples=500, seed=0)[2] == pytest.approx((1, 1, 1))
    same = [np.repeat(CENTRES[:1], 4, axis=0)]
    assert variety_kept(same, same, resamples=100, seed=0)[2] == (1, 1, 1), "a base without variety loses none"


@pytest.mark.parametrize("kind", ["resnet", "dinov2"])
def test_any_embedding_of_transformers_is_used_as_it_pools_itself(tmp_path: Path, kind: str) -> None:
    from transformers import AutoImageProcessor, AutoModel

    folder = str(write_tiny_identity(tmp_path / kind, kind))
    pictures = [drawing("crimson", seed=seed) for seed in range(3)]
    found = load_identity(folder)(pictures)
    with torch.no_grad():
        pixels = AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
        pooled = AutoModel.from_pretrained(folder).eval()(**pixels).pooler_output.flatten(1)
    torch.testing.assert_close(found, torch.nn.functional.normalize(pooled, dim=1))
    many = load_identity(folder)([pictures[0]] * BATCH + pictures)
    torch.testing.assert_close(many[BATCH:], found, atol=1e-5, rtol=0)


def test_a_model_without_a_pooled_output_is_averaged(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel, BitImageProcessor, ViTMAEConfig, ViTMAEModel

    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16, mask_ratio=0.0
    )
    ViTMAEModel(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
    picture = [drawing("crimson")]
    with torch.no_grad():
        pixels = AutoImageProcessor.from_pretrained(tmp_path)(images=picture, return_tensors="pt")
        last = AutoModel.from_pretrained(tmp_path).eval()(**pixels).last_hidden_state
    expected = torch.nn.functional.normalize(last.mean(dim=1), dim=1)
    torch.testing.assert_close(load_identity(str(tmp_path))(picture), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("clip_model 'RN50'", {"clip_model": "RN50", "clip_pretrained": "weights-that-nobody-has"}),
        ("clip_model 'no-such-network'", {"clip_model": "no-such-network", "clip_pretrained": "openai"}),
        ("identity_model 'nobody/nothing'", {"identity_model": "nobody/nothing"}),
        ("lpips_net 'squeeze'", {"lpips_net": "squeeze", "lpips_weights": None}),
    ],
)
def test_a_network_that_cannot_be_loaded_is_named(
    monkeypatch: pytest.MonkeyPatch, key: str, values: dict[str, str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    load = {"clip": load_clip, "identity": lambda config: load_identity(config.identity_model), "lpips": load_lpips}
    with pytest.raises(SvdiffError, match=f"evaluators.{key} cannot be loaded: "):
        load[key.partition("_")[0]](EvaluatorsConfig(**values))


def test_scores_say_which_network_made_them(tmp_path: Path) -> None:
    folder = write_tiny_identity(tmp_path / "identity")
    described = describe_evaluators(
        EvaluatorsConfig(clip_model="RN50", clip_pretrained="openai", lpips_weights=None, identity_model=str(folder))
    )["identity"]
    assert described["model"] == "ResNetModel"
    assert described["weights_sha256"] == {"model.safetensors": sha256_file(folder / "model.safetensors")}
    assert described["transform"]["crop_size"] == {"height": 32, "width": 32}
    assert str(tmp_path) not in json.dumps(described), "the same network elsewhere is the same network"
    without = describe_evaluators(EvaluatorsConfig(clip_model="RN50", clip_pretrained="openai", lpips_weights=None))[
        "identity"
    ]
    assert without["model"] == "the image encoder of clip"


@pytest.mark.parametrize("name", ["models/nowhere", "./nowhere", "a/b/c"])
def test_a_network_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(SvdiffError, match=f"identity_model '{name}' is not a folder here"):
        load_identity(name)


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    (write_tiny_identity(tmp_path) / "preprocessor_config.json").unlink()
    with pytest.raises(SvdiffError, match=r"holds no preprocessor_config\.json"):
        load_identity(str(tmp_path))

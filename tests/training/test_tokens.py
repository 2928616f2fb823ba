"""Special tokens: where their embeddings start, training them beside every method, and loading them with the delta."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import family_of
from svdiff.sampling.stage import personalise, personalise_with
from svdiff.spectral import SpectralDelta
from svdiff.spectral.tokens import mix_changes
from svdiff.training.methods import apply_method
from svdiff.training.methods.tokens import draw_embedding

pytestmark = pytest.mark.usefixtures("few_levels")

METHODS = ("svdiff", "full", "lora", "custom-diffusion")


@pytest.fixture(autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path_factory.getbasetemp() / "scratch"))


def conditions(pipe: Any, prompt: str) -> torch.Tensor:
    return family_of(pipe).encode([prompt])["encoder_hidden_states"]


def predict(pipe: Any, prompt: str) -> torch.Tensor:
    family, latents = family_of(pipe), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return family.predict(latents, torch.tensor([300]), family.encode([prompt]))


def take_steps(pipe: Any, method: Any, steps: int = 2) -> None:
    trained = [p for group in method.parameters().values() for p in group]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    for _ in range(steps):
        predict(pipe, "a sks dog").square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_start_is_drawn_from_mean_and_deviation_by_the_tokens_text() -> None:
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 7) + 5
    drawn = torch.stack([draw_embedding(rows, f"token{i}") for i in range(4000)])
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(drawn.std(0), rows.std(0), atol=0, rtol=0.06)
    assert torch.equal(draw_embedding(rows, "sks"), draw_embedding(rows, "sks"))
    assert not torch.equal(draw_embedding(rows, "sks"), draw_embedding(rows, "zwx"))


def test_a_token_starts_among_the_names_where_the_base_has_some(tiny_pipe: Any, tmp_path: Path) -> None:
    table = tiny_pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    config = TrainConfig(token_init="distribution")

    def start(token: str) -> torch.Tensor:
        method = apply_method(tiny_pipe, config, [token])
        [embedding] = method.tokens.values()
        method.detach()
        return embedding.value.detach().clone()

    torch.testing.assert_close(start("sks"), draw_embedding(table, "sks"))
    tiny_pipe.tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "names.json").write_text(json.dumps(["dog", "zwx"]))
    names = table[tiny_pipe.tokenizer.convert_tokens_to_ids(["dog</w>", "zwx</w>"])]
    torch.testing.assert_close(start("sks"), draw_embedding(names, "sks"))
    assert torch.equal(start("zwx"), names[1])  # a name already: the base was trained with its embedding
    (tmp_path / "names.json").write_text('{"panda": 1}')
    with pytest.raises(SvdiffError, match="expected a list of words"):
        start("sks")
    assert torch.equal(tiny_pipe.text_encoder.get_input_embeddings().weight, table)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_trained_token_is_loaded_with_its_delta_and_unloaded(
    tiny_pipe: Any, tmp_path: Path, method: str, text_encoder: bool
) -> None:
    if method == "custom-diffusion" and text_encoder:
        pytest.skip("refused")
    base, other = predict(tiny_pipe, "a sks dog"), conditions(tiny_pipe, "a dog")
    config = TrainConfig(method=method, train_token=True, token_init="distribution", text_encoder=text_encoder)
    made = apply_method(tiny_pipe, config, ["sks"])
    start = made.state()
    take_steps(tiny_pipe, made)
    [name] = made.tokens
    assert not torch.equal(made.state()[name], start[name])
    trained = predict(tiny_pipe, "a sks dog")
    if not text_encoder:
        assert torch.equal(conditions(tiny_pipe, "a dog"), other)  # no other word has moved
    made.save(tmp_path / "delta.safetensors", {})
    made.load_state(start)
    assert torch.equal(made.state()[name], start[name])
    made.detach()
    assert torch.equal(predict(tiny_pipe, "a sks dog"), base)

    personal = personalise(tiny_pipe, tmp_path / "delta.safetensors")
    torch.testing.assert_close(predict(tiny_pipe, "a sks dog"), trained, rtol=1e-3, atol=1e-4)
    personal.unload()
    assert torch.equal(predict(tiny_pipe, "a sks dog"), base)


def test_tokens_survive_fusing_and_scale_with_their_delta(tiny_pipe: Any, tmp_path: Path) -> None:
    made = apply_method(tiny_pipe, TrainConfig(train_token=True, text_encoder=True), ["sks"])
    take_steps(tiny_pipe, made)
    made.save(tmp_path / "delta.safetensors", {})
    made.detach()
    base = conditions(tiny_pipe, "a sks dog")
    personal: Any = personalise_with(tiny_pipe, [(tmp_path / "delta.safetensors", 1.0)])
    active = conditions(tiny_pipe, "a sks dog")
    personal.fuse()
    torch.testing.assert_close(conditions(tiny_pipe, "a sks dog"), active, rtol=1e-4, atol=1e-5)
    personal.unfuse()
    torch.testing.assert_close(conditions(tiny_pipe, "a sks dog"), active, rtol=1e-4, atol=1e-5)
    personal.set_deltas({})
    torch.testing.assert_close(conditions(tiny_pipe, "a sks dog"), base, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_token_is_exported_with_plain_weights_and_beside_a_lora(
    tiny_pipe: Any, tmp_path: Path, text_encoder: bool
) -> None:
    from diffusers import StableDiffusionPipeline

    from svdiff.config import BaseModelConfig
    from svdiff.models import load_pipeline
    from svdiff.spectral.tokens import export_tokens

    made = apply_method(tiny_pipe, TrainConfig(train_token=True, text_encoder=text_encoder), ["sks"])
    take_steps(tiny_pipe, made)
    made.save(tmp_path / "delta.safetensors", {})
    [trained] = [embedding.value.detach().clone() for embedding in made.tokens.values()]
    made.detach()
    before = tiny_pipe.text_encoder.get_input_embeddings().weight.clone()
    personal: Any = personalise(tiny_pipe, tmp_path / "delta.safetensors")
    expected = conditions(tiny_pipe, "a sks dog")
    personal.fuse()
    tiny_pipe.save_pretrained(tmp_path / "plain")
    personal.unload()
    assert torch.equal(tiny_pipe.text_encoder.get_input_embeddings().weight, before)
    plain = load_pipeline(BaseModelConfig(model=str(tmp_path / "plain")))
    torch.testing.assert_close(conditions(plain, "a sks dog"), expected, rtol=1e-4, atol=1e-5)

    delta = SpectralDelta.load(tmp_path / "delta.safetensors")
    [path] = export_tokens(tiny_pipe, delta.tokens, tmp_path / "concept.safetensors")
    assert path.name == "concept-sks.safetensors"
    other: StableDiffusionPipeline = tiny_pipe
    other.load_textual_inversion(str(path), token="<mine>")
    row = other.text_encoder.get_input_embeddings().weight[other.tokenizer.convert_tokens_to_ids("<mine>")]
    torch.testing.assert_close(row, trained)


def test_deltas_that_share_a_token_give_it_their_mean(tmp_path: Path) -> None:
    a, b = {"text_encoder.special_token.7": torch.ones(3)}, {"text_encoder.special_token.7": 3 * torch.ones(3)}
    [mixed] = mix_changes([(a, 1.0), (b, 1.0)]).values()
    assert mixed.tolist() == [2, 2, 2]  # Eq. 4 would make a name of nobody
    [between] = mix_changes([(a, 0.25), (b, 0.75)]).values()
    assert between.tolist() == [2.5, 2.5, 2.5]  # Eq. 5
    [scaled] = mix_changes([(a, 2.0)]).values()
    assert scaled.tolist() == [2, 2, 2]
    delta = SpectralDelta({}, {}, a)
    delta.save(tmp_path / "d.safetensors")
    read = SpectralDelta.load(tmp_path / "d.safetensors")
    assert read.tokens.keys() == a.keys()
    assert read.tensors == {}
    assert read.hash == delta.hash != SpectralDelta({}, {}, b).hash


def test_a_token_of_another_width_is_refused(tiny_pipe: Any) -> None:
    from svdiff.spectral.pipeline import SpectralPipeline

    personal = SpectralPipeline(tiny_pipe)
    with pytest.raises(SvdiffError, match="trained on another base"):
        personal.load_delta(SpectralDelta({}, {}, {"text_encoder.special_token.7": torch.ones(5)}), "x")

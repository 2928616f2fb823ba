"""What each method trains, what it leaves alone, and that it can be undone and loaded again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.sampling import Job, sample_images
from svdiff.sampling.weights_delta import (
    is_weights_delta,
    load_weights_delta,
    load_weights_deltas,
    read_weights_delta,
)
from svdiff.spectral import SpectralDelta, SpectralPipeline, select
from svdiff.training.methods import Method, apply_method

pytestmark = pytest.mark.usefixtures("few_levels")

METHODS = ("svdiff", "full", "lora", "custom-diffusion")
BASELINES = METHODS[1:]


@pytest.fixture(autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path_factory.getbasetemp() / "scratch"))


def weights_of(pipe) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the trained networks and the autoencoder."""
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder", "vae")
        for name, tensor in getattr(pipe, part).state_dict().items()
    }


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def noise_prediction(pipe, prompt: str = "a sks dog") -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    tokens = pipe.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 8, 8, generator=random)
    return pipe.unet(latents, 400, encoder_hidden_states=pipe.text_encoder(tokens)[0]).sample


def take_steps(pipe, method: Method, steps: int = 2) -> None:
    """AdamW on a loss that every parameter matters for."""
    optimizer = torch.optim.AdamW([p for group in method.parameters().values() for p in group], lr=1e-2, weight_decay=0)
    for _ in range(steps):
        noise_prediction(pipe).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", METHODS)
def test_step_zero_is_the_base_and_detach_restores_its_bits(tiny_pipe, name: str) -> None:
    before, prediction = weights_of(tiny_pipe), noise_prediction(tiny_pipe)
    method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
    torch.testing.assert_close(noise_prediction(tiny_pipe), prediction, rtol=1e-4, atol=1e-5)
    take_steps(tiny_pipe, method)
    assert (noise_prediction(tiny_pipe) - prediction).abs().max() > 1e-4
    method.detach()
    assert same_bits(weights_of(tiny_pipe), before)
    assert torch.equal(noise_prediction(tiny_pipe), prediction)
    assert not any(p.requires_grad for p in [*tiny_pipe.unet.parameters(), *tiny_pipe.text_encoder.parameters()])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_parameters_are_float32_and_all_receive_gradients(tiny_pipe, name: str, text_encoder: bool) -> None:
    if name == "custom-diffusion" and text_encoder:
        pytest.skip("refused, see below")
    method = apply_method(tiny_pipe, TrainConfig(method=name, text_encoder=text_encoder), ["sks"])
    take_steps(tiny_pipe, method, steps=1)  # LoRA's A has no gradient while B is zero
    noise_prediction(tiny_pipe).square().mean().backward()
    trainable = [p for group in method.parameters().values() for p in group]
    assert len({id(p) for p in trainable}) == len(trainable)
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trainable)
    open_parameters = [
        p for part in (tiny_pipe.unet, tiny_pipe.text_encoder) for p in part.parameters() if p.requires_grad
    ]
    assert {id(p) for p in open_parameters} <= {id(p) for p in trainable}  # nothing else is open


def test_full_trains_every_weight_and_bias_of_the_unet_only(tiny_pipe) -> None:
    before = weights_of(tiny_pipe)
    method = apply_method(tiny_pipe, TrainConfig(method="full"), ["sks"])
    groups = method.parameters()
    assert all(p.ndim > 1 for p in groups["lr"])
    assert all(p.ndim == 1 for p in groups["lr_1d"])
    take_steps(tiny_pipe, method)
    changed = {name for name, tensor in weights_of(tiny_pipe).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("unet.")}


def test_custom_diffusion_trains_keys_values_and_one_row(tiny_pipe) -> None:
    before = weights_of(tiny_pipe)
    method = apply_method(tiny_pipe, TrainConfig(method="custom-diffusion"), ["sks"])
    before_other = noise_prediction(tiny_pipe, "a panda")
    take_steps(tiny_pipe, method)
    after = weights_of(tiny_pipe)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {n for n in before if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    # The embedding table itself is untouched; the special token's row lives beside it.
    token_id = tiny_pipe.tokenizer("sks").input_ids[1]
    embedding = tiny_pipe.text_encoder.get_input_embeddings()
    looked_up, table = embedding(torch.arange(embedding.num_embeddings)), embedding.weight
    others = torch.arange(embedding.num_embeddings) != token_id
    assert torch.equal(looked_up[others], table[others])
    assert not torch.equal(looked_up[token_id], table[token_id])
    assert not torch.equal(noise_prediction(tiny_pipe, "a panda"), before_other)  # W^K and W^V are shared
    method.detach()


def test_lora_is_rank_one_on_every_matrix_and_trains_norms(tiny_pipe) -> None:
    before = weights_of(tiny_pipe)
    layers = {n for n, m in tiny_pipe.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    method = apply_method(tiny_pipe, TrainConfig(method="lora"), ["sks"])
    take_steps(tiny_pipe, method, steps=3)
    state = method.state()
    for name in layers:
        a, b = state[f"unet.{name}.lora_A.weight"], state[f"unet.{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == 1
        assert b.abs().max() > 0
    norms = {n for n, t in before.items() if n.startswith("unet.") and n.endswith(".weight") and t.ndim == 1}
    assert len(state) == 2 * len(layers) + len(norms)
    assert all(not torch.equal(state[name], before[name]) for name in norms)
    method.detach()


def test_lora_start_follows_from_the_seed_alone(tiny_pipe) -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        method = apply_method(tiny_pipe, TrainConfig(method="lora", seed=seed), ["sks"])
        states.append(method.state())
        method.detach()
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])


@pytest.mark.parametrize("name", METHODS)
def test_state_is_a_copy_that_can_be_restored(tiny_pipe, name: str) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
    take_steps(tiny_pipe, method)
    state, prediction = method.state(), noise_prediction(tiny_pipe)
    kept = {key: value.clone() for key, value in state.items()}
    take_steps(tiny_pipe, method)
    assert same_bits(state, kept)
    method.load_state(state)
    assert torch.equal(noise_prediction(tiny_pipe), prediction)
    with pytest.raises(SvdiffError):
        method.load_state(dict(list(state.items())[1:]))
    method.detach()


@pytest.mark.parametrize("name", METHODS)
def test_learning_does_not_depend_on_half_precision_bases(tiny_pipe, name: str) -> None:
    """Trainables are float32 even where the base is not, and the base comes back in its own type."""
    tiny_pipe.unet.to(torch.bfloat16)
    before = weights_of(tiny_pipe)
    method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
    assert all(p.dtype == torch.float32 for group in method.parameters().values() for p in group)
    method.detach()
    assert same_bits(weights_of(tiny_pipe), before)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_saved_delta_reproduces_training_at_any_scale(tiny_pipe, tmp_path: Path, name: str, text_encoder: bool) -> None:
    if name == "custom-diffusion" and text_encoder:
        pytest.skip("refused")
    base, base_prediction = weights_of(tiny_pipe), noise_prediction(tiny_pipe)
    method = apply_method(tiny_pipe, TrainConfig(method=name, text_encoder=text_encoder), ["sks"])
    take_steps(tiny_pipe, method, steps=4)
    trained = noise_prediction(tiny_pipe)
    assert (trained - base_prediction).abs().max() > 1e-3
    path = tmp_path / "delta.safetensors"
    method.save(path, {"concept": "a dog", "method": name})
    method.detach()
    assert is_weights_delta(path)

    loaded = load_weights_delta(tiny_pipe, path)
    torch.testing.assert_close(noise_prediction(tiny_pipe), trained, rtol=1e-4, atol=1e-4)
    assert loaded.metadata["concept"] == "a dog"
    full = weights_of(tiny_pipe)
    loaded.set_scale(0.5)
    for key, tensor in weights_of(tiny_pipe).items():  # W + sΔW
        torch.testing.assert_close(tensor, (base[key] + full[key]) / 2, rtol=1e-5, atol=1e-6)
    loaded.set_scale(0.0)
    assert same_bits(weights_of(tiny_pipe), base)
    loaded.set_scale(2.0)
    loaded.unload()
    assert same_bits(weights_of(tiny_pipe), base)
    assert torch.equal(noise_prediction(tiny_pipe), base_prediction)


def test_sampling_with_a_loaded_baseline(tiny_pipe, tmp_path: Path) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method="custom-diffusion"), ["sks"])
    take_steps(tiny_pipe, method, steps=4)
    jobs = [Job("a sks dog", 0), Job("a cat", 1)]
    trained = sample_images(tiny_pipe, jobs, steps=2, guidance=2.0)
    method.save(tmp_path / "delta.safetensors", {})
    method.detach()
    load_weights_delta(tiny_pipe, tmp_path / "delta.safetensors")
    for one, other in zip(trained, sample_images(tiny_pipe, jobs, steps=2, guidance=2.0), strict=True):
        difference = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
        assert difference.abs().max() <= 1


def test_custom_diffusion_of_two_tokens_is_loaded_whole(tiny_pipe, tmp_path: Path) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method="custom-diffusion"), ["sks", "zwx"])
    take_steps(tiny_pipe, method, steps=2)
    optimizer = torch.optim.AdamW(method.parameters()["lr"], lr=1e-2, weight_decay=0)
    noise_prediction(tiny_pipe, "a zwx cat").square().mean().backward()
    optimizer.step()
    trained = {prompt: noise_prediction(tiny_pipe, prompt) for prompt in ("a sks dog", "a zwx cat")}
    method.save(tmp_path / "delta.safetensors", {})
    method.detach()
    base = weights_of(tiny_pipe)
    loaded = load_weights_delta(tiny_pipe, tmp_path / "delta.safetensors")
    for prompt, expected in trained.items():
        torch.testing.assert_close(noise_prediction(tiny_pipe, prompt), expected, rtol=1e-4, atol=1e-4)
    loaded.unload()
    assert same_bits(weights_of(tiny_pipe), base)


def test_changes_of_weights_add_up(tiny_pipe, tmp_path: Path) -> None:
    """W₀ + w₁ΔW₁ + w₂ΔW₂ (Fig. 8), of full weights and LoRA together."""
    base, changes = weights_of(tiny_pipe), []
    for name in ("full", "lora"):
        method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
        take_steps(tiny_pipe, method, steps=2)
        method.save(tmp_path / f"{name}.safetensors", {})
        method.detach()
        loaded = load_weights_delta(tiny_pipe, tmp_path / f"{name}.safetensors")
        changes.append({key: tensor - base[key] for key, tensor in weights_of(tiny_pipe).items()})
        loaded.unload()
    both = load_weights_deltas(tiny_pipe, [(tmp_path / "full.safetensors", 0.5), (tmp_path / "lora.safetensors", -2.0)])
    for key, tensor in weights_of(tiny_pipe).items():
        expected = base[key] + 0.5 * changes[0][key] - 2 * changes[1][key]
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)
    both.unload()
    assert same_bits(weights_of(tiny_pipe), base)


@pytest.mark.parametrize("name", BASELINES)
def test_delta_files_have_equal_bytes_for_equal_content(tiny_pipe, tmp_path: Path, name: str) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method=name), ["sks"])
    hashes = set()
    for i in range(3):
        path = tmp_path / f"{i}.safetensors"
        method.save(path, {f"key{n}": "é" for n in range(8)})
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["key3"] == "é"
    assert len(hashes) == 1


def test_delta_of_another_base_is_refused(tiny_pipe, tmp_path: Path) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method="lora"), ["sks"])
    method.save(tmp_path / "delta.safetensors", {"base_model": "models/base"})
    method.detach()
    with torch.no_grad():
        tiny_pipe.unet.conv_in.weight[0, 0, 0, 0] += 1
    with pytest.raises(SvdiffError, match=r"another base \(models/base"):
        load_weights_delta(tiny_pipe, tmp_path / "delta.safetensors")


def test_other_files_are_refused(tiny_pipe, tmp_path: Path) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method="svdiff"), ["sks"])
    method.save(tmp_path / "shifts.safetensors", {})
    method.detach()
    (tmp_path / "text.safetensors").write_text("not a delta")
    for name in ("shifts", "text", "missing"):
        path = tmp_path / f"{name}.safetensors"
        assert not is_weights_delta(path)
        with pytest.raises(SvdiffError, match=name):
            read_weights_delta(path)


@pytest.mark.parametrize("name", ["svdiff", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "lora"))])
@pytest.mark.parametrize("subset", ["UNet-CA-KV", "Up-Blocks", "UNet-1D", "UNet-4D", r"mid_block.*attn1"])
def test_every_method_trains_the_subset_and_nothing_else(tiny_pipe, tmp_path: Path, name: str, subset: str) -> None:
    """An experiment may swap the method under any subset of Table 1."""
    before = weights_of(tiny_pipe)
    chosen = {f"unet.{n}" for n in select(tiny_pipe.unet, subset)}
    method = apply_method(tiny_pipe, TrainConfig(method=name, subset=subset), ["sks"])
    take_steps(tiny_pipe, method, steps=3)
    path = tmp_path / "delta.safetensors"
    method.save(path, {})
    method.detach()
    assert same_bits(weights_of(tiny_pipe), before)
    if name == "svdiff":
        changed = set(SpectralDelta.load(path).tensors)
    else:
        load_weights_delta(tiny_pipe, path)
        after = weights_of(tiny_pipe)
        changed = {n for n in before if not torch.equal(after[n], before[n])}
        if name == "full":  # which trains the biases of these layers as well
            biases = {n for n in changed if n.endswith(".bias")}
            assert biases <= {n.removesuffix("weight") + "bias" for n in chosen}
            changed -= biases
    assert changed == chosen


def test_full_weights_of_every_layer_are_all_there_are(tiny_pipe) -> None:
    method = apply_method(tiny_pipe, TrainConfig(method="full", text_encoder=True), ["sks"])
    everything = {
        f"{part}.{n}" for part in ("unet", "text_encoder") for n, _ in getattr(tiny_pipe, part).named_parameters()
    }
    assert method.state().keys() == everything


def test_a_subset_is_of_the_unet_and_the_text_encoder_is_trained_whole(tiny_pipe) -> None:
    for name in ("svdiff", "full", "lora"):
        kv = apply_method(tiny_pipe, TrainConfig(method=name, subset="UNet-CA-KV", text_encoder=True), ["sks"])
        text = {n for n in kv.state() if n.startswith("text_encoder.")}
        kv.detach()
        all_of_it = apply_method(tiny_pipe, TrainConfig(method=name, text_encoder=True), ["sks"])
        assert text == {n for n in all_of_it.state() if n.startswith("text_encoder.")} != set()
        all_of_it.detach()


@pytest.mark.parametrize("name", BASELINES)
def test_a_subset_that_selects_nothing_is_refused(tiny_pipe, name: str) -> None:
    before = weights_of(tiny_pipe)
    with pytest.raises(SvdiffError, match="subset"):
        apply_method(tiny_pipe, TrainConfig(method=name, subset="no such weight"), ["sks"])
    assert same_bits(weights_of(tiny_pipe), before)


def test_settings_without_an_effect_are_refused(tiny_pipe) -> None:
    for name in ("full", "custom-diffusion"):
        with pytest.raises(SvdiffError, match=f"train.rank is 4 with method {name}.*set rank: null"):
            apply_method(tiny_pipe, TrainConfig(method=name, rank=4), ["sks"])
    with pytest.raises(SvdiffError, match=r"train.subset is 'Up-CA' with method custom-diffusion.*subset: UNet"):
        apply_method(tiny_pipe, TrainConfig(method="custom-diffusion", subset="Up-CA"), ["sks"])


def test_custom_diffusion_refuses_what_it_cannot_do(tiny_pipe) -> None:
    with pytest.raises(SvdiffError, match="text_encoder: false"):
        apply_method(tiny_pipe, TrainConfig(method="custom-diffusion", text_encoder=True), ["sks"])
    with pytest.raises(SvdiffError, match="not one token"):
        apply_method(tiny_pipe, TrainConfig(method="custom-diffusion"), ["xyzzy"])


def test_training_at_a_limited_rank_decomposes_no_more_directions(
    tiny_pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path))
    method = apply_method(tiny_pipe, TrainConfig(rank=3, subset="UNet-2D"), ["sks"])
    stored = [path.name for path in (tmp_path / "bases").rglob("*.safetensors")]
    assert stored
    assert all(name.endswith(".weight.leading-3.safetensors") for name in stored)
    take_steps(tiny_pipe, method)
    prediction = noise_prediction(tiny_pipe)
    method.save(tmp_path / "delta.safetensors", {})
    method.detach()
    delta = SpectralDelta.load(tmp_path / "delta.safetensors")
    assert delta.directions("unet") == 3
    personal = SpectralPipeline(tiny_pipe, cache=tmp_path / "bases", progress=False)
    personal.load_delta(delta, "a")
    torch.testing.assert_close(noise_prediction(tiny_pipe), prediction, rtol=1e-4, atol=1e-5)
    personal.unload()

"""Recorded maps against a softmax by hand; attention losses against formulas and gradients of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.training.attention import AttentionRecorder, token_map, token_positions
from svdiff.training.losses import single_subject_loss, subject_mask, unmix_loss
from svdiff.training.methods import apply_method

pytestmark = pytest.mark.usefixtures("few_levels")

PROMPTS = ["a sks dog and a zwx cat", "a red house"]


def inputs(pipe) -> tuple[torch.Tensor, int, torch.Tensor]:
    tokens = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return z, 300, pipe.text_encoder(tokens)[0]


def predict(pipe) -> torch.Tensor:
    z, t, context = inputs(pipe)
    return pipe.unet(z, t, encoder_hidden_states=context).sample


@pytest.fixture(autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path_factory.getbasetemp() / "scratch"))


# ---- recorder ----


def test_maps_are_the_softmax_of_queries_and_keys(tiny_pipe) -> None:
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    layers = {n: m for n, m in tiny_pipe.unet.named_modules() if n.endswith("attn2")}
    assert len(layers) > 2
    for name, layer in layers.items():

        def keep(module, args, kwargs, name=name) -> None:
            seen[name] = (args[0].detach().double(), kwargs["encoder_hidden_states"].detach().double())

        layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), AttentionRecorder(tiny_pipe.unet) as recorder:
        predict(tiny_pipe)
    assert recorder.maps.keys() == layers.keys()
    for name, layer in layers.items():
        hidden, context = (tensor.numpy() for tensor in seen[name])
        q = hidden @ layer.to_q.weight.detach().double().numpy().T
        k = context @ layer.to_k.weight.detach().double().numpy().T
        width = q.shape[-1] // layer.heads
        expected = 0
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(width)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            expected = expected + weights / weights.sum(-1, keepdims=True) / layer.heads
        got = recorder.maps[name]
        side = int(np.sqrt(hidden.shape[1]))
        assert got.shape == (2, side, side, 16)
        np.testing.assert_allclose(got.numpy().reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.sum(-1), torch.ones(2, side, side))


@pytest.mark.parametrize("method", ["svdiff", "lora"])
def test_recording_changes_no_output_and_leaves_no_trace(tiny_pipe, method: str) -> None:
    apply_method(tiny_pipe, TrainConfig(method=method), ["sks"])
    before, processors = predict(tiny_pipe), tiny_pipe.unet.attn_processors
    with AttentionRecorder(tiny_pipe.unet) as recorder:
        assert tiny_pipe.unet.attn_processors != processors
        assert torch.equal(predict(tiny_pipe), before)
    assert recorder.maps
    after = tiny_pipe.unet.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processors[name] for name in processors)  # off: the very same objects as ever


def test_processors_come_back_after_an_error(tiny_pipe) -> None:
    processors = tiny_pipe.unet.attn_processors
    with pytest.raises(RuntimeError, match="stop"), AttentionRecorder(tiny_pipe.unet):
        raise RuntimeError("stop")
    assert all(tiny_pipe.unet.attn_processors[name] is processors[name] for name in processors)


def test_layers_and_resolutions_can_be_chosen(tiny_pipe) -> None:
    with torch.no_grad(), AttentionRecorder(tiny_pipe.unet, layers=r"^up_blocks\.1\.", sides={8}) as recorder:
        untouched = [n for n, p in tiny_pipe.unet.attn_processors.items() if type(p).__name__ != "_RecordingProcessor"]
        predict(tiny_pipe)
    assert recorder.maps
    assert all(name.startswith("up_blocks.1.") for name in recorder.maps)
    assert all(map_.shape[1] == 8 for map_ in recorder.maps.values())
    assert any(name.startswith("down_blocks") for name in untouched)
    with torch.no_grad(), AttentionRecorder(tiny_pipe.unet, sides={32}) as nothing:
        predict(tiny_pipe)
    assert nothing.maps == {}
    with pytest.raises(SvdiffError, match="no attention maps"):
        token_map(nothing.maps, [[1], [1]])
    with pytest.raises(SvdiffError, match="'nowhere'"):
        AttentionRecorder(tiny_pipe.unet, layers="nowhere")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_shifts_through_the_maps(tiny_pipe, checkpointing: bool) -> None:
    method = apply_method(tiny_pipe, TrainConfig(subset="UNet-CA-KV"), ["sks"])
    if checkpointing:
        tiny_pipe.unet.enable_gradient_checkpointing()
        tiny_pipe.unet.train()
    with AttentionRecorder(tiny_pipe.unet) as recorder:
        predict(tiny_pipe)
        token_map(recorder.maps, [[2], [2]]).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in method.shifts["unet"].named_parameters()}
    assert all(g is not None and g.abs().max() > 0 for name, g in gradients.items() if name.endswith("to_k.weight"))


def test_token_maps_average_layers_and_tokens(tiny_pipe) -> None:
    with torch.no_grad(), AttentionRecorder(tiny_pipe.unet, sides={8}) as recorder:
        predict(tiny_pipe)
    got = token_map(recorder.maps, [[2], [2, 3]])
    layers = list(recorder.maps.values())
    expected = torch.stack([sum(m[0, :, :, 2] for m in layers), sum(m[1, :, :, 2:4].mean(-1) for m in layers)])
    torch.testing.assert_close(got, expected / len(layers))
    constant = {"a": torch.full((1, 4, 4, 3), 0.25), "b": torch.full((1, 8, 8, 3), 0.75)}
    torch.testing.assert_close(token_map(constant, [[1]]), torch.full((1, 8, 8), 0.5))
    assert token_map(constant, [[1]], side=5).shape == (1, 5, 5)


def test_token_positions(tiny_pipe) -> None:
    assert token_positions(tiny_pipe.tokenizer, PROMPTS[0], "sks") == [2]
    assert token_positions(tiny_pipe.tokenizer, PROMPTS[0], "zwx cat") == [6, 7]
    with pytest.raises(SvdiffError, match="'panda' is not in the prompt"):
        token_positions(tiny_pipe.tokenizer, PROMPTS[0], "panda")


# ---- unmix and Eq. 8 ----


def some_map(seed: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def halves(batch: int = 2) -> list[torch.Tensor]:
    left = torch.zeros(batch, 4, 4, dtype=torch.float64)
    left[:, :, :2] = 1
    return [left, 1 - left]


def test_unmix_is_the_mse_over_the_other_subjects_region() -> None:
    first, second = some_map(0), some_map(1)
    expected = (first[:, :, 2:].numpy() ** 2).mean() / 2 + (second[:, :, :2].numpy() ** 2).mean() / 2
    assert float(unmix_loss([first, second], halves())) == pytest.approx(expected, rel=1e-12)


def test_unmix_with_three_subjects_and_pictures_without_regions() -> None:
    maps = [some_map(seed) for seed in range(3)]
    thirds = [torch.zeros(2, 4, 4, dtype=torch.float64) for _ in range(3)]
    for i, third in enumerate(thirds):
        third[0, i] = 1  # the second picture is not mixed
    expected = sum(np.mean([maps[i][0, j].numpy() ** 2 for j in range(3) if j != i]) / 2 for i in range(3)) / 3
    assert float(unmix_loss(maps, thirds)) == pytest.approx(expected, rel=1e-12)


def test_unmix_gradient_is_zero_at_home_and_pulls_away_from_the_other() -> None:
    first, second = some_map(0).requires_grad_(), some_map(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: unmix_loss([a, b], halves()), (first, second))
    unmix_loss([first, second], halves()).backward()
    assert first.grad is not None
    assert (first.grad[:, :, :2] == 0).all()
    assert (first.grad[:, :, 2:] > 0).all()


def test_subject_mask() -> None:
    class_map = torch.tensor([[[0.1, 0.2], [0.05, 0.4]], [[1.0, 8.0], [6.0, 2.0]]], requires_grad=True)
    mask = subject_mask(class_map, threshold=0.4)
    assert mask.tolist() == [[[0, 1], [0, 1]], [[0, 1], [1, 0]]]
    assert not mask.requires_grad


def test_eq_8() -> None:
    attention, mask = some_map(0), subject_mask(some_map(1))
    expected = sum((attention[i].numpy() - (attention[i] * mask[i]).numpy()) ** 2 for i in range(2)).sum() / 2
    assert float(single_subject_loss(attention, mask)) == pytest.approx(expected, rel=1e-12)


def test_eq_8_stops_the_gradient_of_the_masked_map() -> None:
    """By finite differences with sg's argument held fixed: what a stop-gradient means."""
    attention, mask = some_map(0).requires_grad_(), subject_mask(some_map(1))
    single_subject_loss(attention, mask).backward()
    fixed = (attention.detach() * mask).numpy()

    def value(a: np.ndarray) -> float:
        return float(((a - fixed) ** 2).sum() / 2)

    at = attention.detach().numpy()
    numeric = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[place] = 1e-6
        numeric[place] = (value(at + step) - value(at - step)) / 2e-6
    assert attention.grad is not None
    np.testing.assert_allclose(attention.grad.numpy(), numeric, atol=1e-8)
    # With soft masks the difference shows: without sg the gradient would be 2A(1 − M)², with it 2A(1 − M).
    soft = torch.full_like(mask, 0.5)
    attention.grad = None
    single_subject_loss(attention, soft).backward()
    torch.testing.assert_close(attention.grad, attention.detach() / 2)


def test_a_step_on_eq_8_moves_attention_off_the_background(tiny_pipe) -> None:
    """Through the whole network: the special token's leak shrinks under gradient steps on Eq. 8 alone."""
    method = apply_method(tiny_pipe, TrainConfig(), ["sks"])
    optimizer = torch.optim.Adam([p for group in method.parameters().values() for p in group], lr=1e-2)
    leaks = []
    for _ in range(8):
        with AttentionRecorder(tiny_pipe.unet) as recorder:
            predict(tiny_pipe)
        special, class_map = token_map(recorder.maps, [[2], [2]]), token_map(recorder.maps, [[3], [3]])
        loss = single_subject_loss(special, subject_mask(class_map, 0.9))
        leaks.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert leaks[-1] < 0.9 * leaks[0]

"""Attaching to a whole model: identity, gradients, way back, subsets, text encoder, precision."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import Basis, attach, load_basis, select, weights_hash
from svdiff.spectral.layers import SpectralLayer
from tests.spectral.conftest import perturb


def test_zero_shifts_are_the_identity_and_detaching_restores_every_bit(unet: nn.Module, basis: Basis, call) -> None:
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    kinds = [type(layer) for layer in unet.modules()]
    wanted = call()
    shifts = attach(unet, basis)
    assert (call() - wanted).abs().max() < 1e-5
    perturb(shifts)
    assert (call() - wanted).abs().max() > 1e-3
    shifts.zero()
    assert (call() - wanted).abs().max() < 1e-5
    perturb(shifts)
    shifts.detach()
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [type(layer) for layer in unet.modules()] == kinds
    assert weights_hash(unet) == basis.base_hash
    assert torch.equal(call(), wanted)


def test_parameters_are_the_shifts_and_nothing_else(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    norms = [n for n, layer in shifts.layers.items() if isinstance(layer.original, nn.LayerNorm | nn.GroupNorm)]
    assert len(shifts.parameters_1d()) == len(norms)
    assert (
        len(shifts.parameters_1d()) + len(shifts.parameters_spectral())
        == len(shifts.parameters())
        == len(shifts.layers)
    )
    assert not [n for n, p in unet.named_parameters() if p.requires_grad]
    call().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in shifts.parameters())
    sizes = {name: len(p) for name, p in shifts.named_parameters()}
    assert sizes["conv_in.weight"] == 16
    assert sizes["time_embedding.linear_1.weight"] == 16


def test_gradients_are_those_of_rebuilt_weights(unet: nn.Module, basis: Basis, call) -> None:
    """The whole network's gradient against autograd through `W = U diag(ReLU(σ + δ)) Vᵀ` on plain layers."""
    from svdiff.spectral.decompose import from_matrix

    shifts = attach(unet, basis)
    perturb(shifts, 0.02)
    call().square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in shifts.named_parameters()}
    values = shifts.state_dict()
    shifts.detach()
    deltas = {name: value.clone().requires_grad_() for name, value in values.items()}
    rebuilt = {}
    for name, delta in deltas.items():
        weight = unet.get_parameter(name)
        if name in basis:
            f = basis[name]
            rebuilt[name] = from_matrix(f.u @ torch.diag(torch.relu(f.sigma + delta)) @ f.vh, weight.shape)
        else:
            rebuilt[name] = weight + delta
    functional = lambda *args: torch.func.functional_call(unet, rebuilt, args)  # noqa: E731
    call(functional).square().sum().backward()
    for name, delta in deltas.items():
        error = (gradients[name] - delta.grad).norm() / delta.grad.norm().clamp_min(1e-6)
        assert error < 1e-3, name


@pytest.mark.parametrize("rank", [None, 3])
def test_the_state_dict_is_that_of_a_plain_model_with_the_weights_in_use(
    unet: nn.Module, basis: Basis, call, rank: int | None
) -> None:
    plain = copy.deepcopy(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    shifts = attach(unet, basis, rank=rank)
    state = unet.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before), "zero shifts: the base, bit for bit"
    unet.load_state_dict(before)
    perturb(shifts)
    state = unet.state_dict()
    plain.load_state_dict(state)
    assert torch.allclose(call(plain), call(), atol=1e-5)
    unet.load_state_dict(state)
    with pytest.raises(SvdiffError, match="detach the shifts before loading other weights"):
        unet.load_state_dict(before)


def test_shifts_save_and_load(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    perturb(shifts)
    wanted, state, delta = call(), shifts.state_dict(), shifts.delta(concept="teapot")
    assert delta.metadata["concept"] == "teapot"
    assert delta.metadata["base_hash"] == basis.base_hash
    for load in (lambda: shifts.load_state_dict(state), lambda: shifts.load(delta)):
        shifts.zero()
        load()
        assert torch.equal(call(), wanted)
    with pytest.raises(SvdiffError, match="names of the state"):
        shifts.load_state_dict({})
    wrong = {**state, "conv_in.weight": torch.zeros(3)}
    with pytest.raises(SvdiffError, match=r"'conv_in.weight' has \(3,\) shifts"):
        shifts.load_state_dict(wrong)
    assert torch.equal(call(), wanted), "a refused load changes nothing"


def test_rank_trains_the_leading_singular_values_only(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis, rank=3)
    call().square().mean().backward()
    assert {len(p) for p in shifts.parameters_spectral()} == {3}
    assert all(p.grad.all() for p in shifts.parameters())
    perturb(shifts)
    wanted, delta = call(), shifts.delta()
    sizes = {name: len(shift) for name, shift in delta.part("unet").items()}
    assert sizes["conv_in.weight"] == 16, "a delta has a shift for each singular value, zero beyond the rank"
    assert not delta.tensors["unet.conv_in.weight"][3:].any()
    shifts.detach()
    full = attach(unet, basis)
    full.load(delta)
    assert torch.allclose(call(), wanted, atol=1e-5)
    perturb(full)
    beyond = full.delta()
    full.detach()
    with pytest.raises(SvdiffError, match="beyond the leading 3"):
        attach(unet, basis, rank=3).load(beyond)


def test_full_rank_limit_changes_nothing(unet: nn.Module, basis: Basis, call) -> None:
    gradients = []
    for rank in (None, 10_000):
        shifts = attach(unet, basis, rank=rank)
        call().square().mean().backward()
        gradients.append([p.grad for p in shifts.parameters()])
        shifts.detach()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_subset_touches_nothing_else(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis, subset="UNet-CA")
    assert set(shifts.layers) == set(select(unet, "UNet-CA"))
    assert all("attn2" in name for name in shifts.layers)
    assert sum(isinstance(layer, SpectralLayer) for layer in unet.modules()) == len(shifts.layers)
    delta = shifts.delta()
    shifts.detach()
    kv = attach(unet, basis, subset="UNet-CA-KV")
    with pytest.raises(SvdiffError, match="outside the attached subset"):
        kv.load(delta)


def test_text_encoder(tiny_pipe, bases: Path) -> None:
    encoder = tiny_pipe.text_encoder
    ids = torch.randint(0, 90, (2, 16))
    wanted = encoder(ids)[0]
    basis = load_basis(encoder, bases, progress=False)
    shifts = attach(encoder, basis, prefix="text_encoder")
    assert list(shifts.layers) == select(encoder, "UNet"), "the same names after attaching"
    assert any(name.endswith("token_embedding.weight") for name in shifts.layers)
    assert (encoder(ids)[0] - wanted).abs().max() < 1e-5
    encoder(ids)[0].square().mean().backward()
    assert all(p.grad is not None for p in shifts.parameters())
    delta = shifts.delta()
    assert delta.prefixes() == ["text_encoder"]
    assert delta.metadata["text_encoder.base_hash"] == basis.base_hash
    assert encoder.dtype == torch.float32
    encoder.to(torch.bfloat16)
    assert encoder.dtype == torch.bfloat16
    assert {p.dtype for p in shifts.parameters()} == {torch.float32}
    assert encoder(ids)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_and_back(unet: nn.Module, basis: Basis, call, dtype: torch.dtype) -> None:
    plain = call()
    expected = {name: tensor.to(dtype) for name, tensor in unet.state_dict().items()}
    shifts = attach(unet, basis)
    unet.to(dtype)
    assert unet.dtype == dtype
    half = lambda x, t, c: unet(x.to(dtype), t, c.to(dtype))  # noqa: E731
    y = call(half)
    assert y.dtype == dtype
    assert (y - plain).abs().max() < 0.1
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in shifts.parameters())
    shifts.detach()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_autocast_and_checkpointing(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    call().square().mean().backward()
    wanted = [p.grad.clone() for p in shifts.parameters()]
    unet.train()
    unet.enable_gradient_checkpointing()
    for p in shifts.parameters():
        p.grad = None
    call().square().mean().backward()
    assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(shifts.parameters(), wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = call()
    y.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in shifts.parameters())


def test_channels_last(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    perturb(shifts)
    wanted = call()
    wanted.square().mean().backward()
    gradients = [p.grad.clone() for p in shifts.parameters()]
    unet.to(memory_format=torch.channels_last)
    for p in shifts.parameters():
        p.grad = None
    y = call(lambda x, t, c: unet(x.to(memory_format=torch.channels_last), t, c))
    assert torch.allclose(y, wanted, atol=1e-5)
    y.square().mean().backward()
    for p, gradient in zip(shifts.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-5, rtol=1e-3)
    shifts.fuse()
    assert torch.allclose(call(), wanted, atol=1e-5)
    shifts.detach()
    assert weights_hash(unet) == basis.base_hash


@pytest.mark.slow
def test_the_whole_model_compiles_as_its_base_does(unet: nn.Module, basis: Basis, call) -> None:
    """Output and gradients through dynamo and AOT autograd; the code generator behind them is not ours."""
    plain = torch.compile(unet, backend="aot_eager")
    base = call(plain)  # where this fails, spectral layers cannot be blamed
    torch._dynamo.reset()
    shifts = attach(unet, basis)
    assert torch.allclose(call(torch.compile(unet, backend="aot_eager")), base, atol=1e-5)
    perturb(shifts)
    wanted = call()
    wanted.square().mean().backward()
    gradients = [p.grad.clone() for p in shifts.parameters()]
    for p in shifts.parameters():
        p.grad = None
    torch._dynamo.reset()
    y = call(torch.compile(unet, backend="aot_eager"))
    assert torch.allclose(y, wanted, atol=1e-5)
    y.square().mean().backward()
    for p, gradient in zip(shifts.parameters(), gradients, strict=True):
        assert torch.allclose(p.grad, gradient, atol=1e-6, rtol=1e-3)
    torch._dynamo.reset()


def test_the_whole_model_runs_on_the_meta_device(unet: nn.Module, basis: Basis) -> None:
    shifts = attach(unet, basis)
    unet.to("meta")
    sample, text = torch.empty(1, 4, 8, 8, device="meta"), torch.empty(1, 16, 16, device="meta")
    y = unet(sample, torch.tensor([3], device="meta"), text).sample
    assert y.shape == sample.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in shifts.parameters())


def test_fuse_and_unfuse(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    perturb(shifts)
    wanted = call()
    shifts.fuse()
    assert not any(isinstance(layer, SpectralLayer) for layer in unet.modules())
    assert (call() - wanted).abs().max() < 1e-5
    with pytest.raises(SvdiffError, match="unfuse"):
        shifts.zero()
    shifts.unfuse()
    assert torch.equal(call(), wanted)
    shifts.fuse()
    shifts.detach()
    assert weights_hash(unet) == basis.base_hash


def test_a_fused_model_may_be_cast_before_it_is_unfused(unet: nn.Module, basis: Basis, call) -> None:
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in unet.state_dict().items()}
    shifts = attach(unet, basis)
    half = lambda x, t, c: unet(x.bfloat16(), t, c.bfloat16())  # noqa: E731
    shifts.fuse()
    unet.to(torch.bfloat16)
    wanted = call(half)
    shifts.unfuse()
    assert (call(half) - wanted).abs().max() < 0.1
    shifts.fuse()
    shifts.detach()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_optimising_lowers_the_loss(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    optimiser = torch.optim.AdamW(shifts.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (call() - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_wrong_use_is_refused(unet: nn.Module, basis: Basis, tiny_pipe) -> None:
    with pytest.raises(SvdiffError, match=r"wrap it in nn\.Sequential"):
        attach(nn.Linear(2, 2), load_basis(nn.Linear(2, 2), None, progress=False))
    with pytest.raises(SvdiffError, match="rank is 0"):
        attach(unet, basis, rank=0)
    with pytest.raises(SvdiffError, match="selects no weight"):
        attach(unet, basis, subset="nothing_is_called_so")
    with pytest.raises(SvdiffError, match="regular expression"):
        attach(unet, basis, subset="(")
    with pytest.raises(SvdiffError, match="made for another model"):
        attach(tiny_pipe.text_encoder, basis)
    with torch.no_grad():
        unet.conv_out.weight += 1
    with pytest.raises(SvdiffError, match=r"'conv_out\.weight' is not the weight in the basis"):
        attach(unet, basis)
    with torch.no_grad():
        unet.conv_out.weight.copy_(basis["conv_out.weight"].base_weight())
    attach(unet, basis)
    with pytest.raises(SvdiffError, match="detach them first"):
        attach(unet, basis)


def test_stable_diffusion_2_layout() -> None:
    """Linear projections around attention and heads that differ by block."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        attention_head_dim=(2, 4), use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    inputs = torch.randn(1, 4, 8, 8), 5, torch.randn(1, 7, 12)
    wanted = unet(*inputs).sample
    shifts = attach(unet, load_basis(unet, None, progress=False))
    assert list(shifts.layers) == select(unet, "UNet")
    assert (unet(*inputs).sample - wanted).abs().max() < 1e-5


def test_half_precision_copies_of_the_factors_are_made_once(unet: nn.Module, basis: Basis, call) -> None:
    shifts = attach(unet, basis)
    layer = shifts.layers["mid_block.attentions.0.proj_in.weight"]
    with torch.autocast("cpu", torch.bfloat16):
        call()
        first = layer._factors(torch.bfloat16)
        call()
        assert layer._factors(torch.bfloat16) is first
    unet.to(torch.bfloat16)
    assert layer._cast is None

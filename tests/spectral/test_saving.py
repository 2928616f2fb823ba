"""What is saved, copied, moved or compiled with an active delta draws what the pipeline drew, or is refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import SpectralPipeline, attach, fused_state_dict, load_basis, weights_hash
from svdiff.spectral.layers import SpectralLayer
from tests.spectral.conftest import perturb
from tests.spectral.test_pipeline import draw, make_delta


@pytest.fixture(
    params=[pytest.param(None, id="all directions"), pytest.param(4, id="leading directions", marks=pytest.mark.slow)]
)
def personal(request, tiny_pipe, bases: Path) -> SpectralPipeline:
    """A concept with the text encoder, on a live pipeline; of the leading four singular values, W stays in memory."""
    tiny_pipe.set_progress_bar_config(disable=True)
    delta = make_delta(tiny_pipe, bases, 1, text=True)
    other = make_delta(tiny_pipe, bases, 2, text=True)
    personal = SpectralPipeline(tiny_pipe, cache=bases, rank=request.param, progress=False)
    for name, one in (("teapot", delta), ("cat", other)):
        personal.load_delta(one if request.param is None else one.limit_rank(request.param), name)
    return personal


def test_a_saved_pipeline_draws_what_the_live_one_drew(personal: SpectralPipeline, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    live = draw(personal.pipe)
    personal.pipe.save_pretrained(tmp_path / "pipe")
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(loaded), live, atol=1e-4)
    personal.pipe.unet.save_pretrained(tmp_path / "unet")
    loaded.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.allclose(draw(loaded), live, atol=1e-4)
    torch.save(personal.pipe.unet.state_dict(), tmp_path / "state.pt")
    loaded.unet.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.allclose(draw(loaded), live, atol=1e-4)
    assert torch.equal(draw(personal.pipe), live), "saving changes nothing"


def test_without_an_active_delta_the_base_is_saved_bit_for_bit(personal: SpectralPipeline, tiny_base: Path) -> None:
    from diffusers import UNet2DConditionModel

    base = UNet2DConditionModel.from_pretrained(tiny_base / "unet").state_dict()
    personal.set_deltas([])
    state = personal.pipe.unet.state_dict()
    assert list(state) == list(base)
    assert all(torch.equal(state[name], base[name]) for name in base)


def test_a_fused_pipeline_is_saved_and_unloads_to_the_base(personal: SpectralPipeline, tiny_base: Path) -> None:
    from diffusers import UNet2DConditionModel

    live, state = draw(personal.pipe), personal.pipe.unet.state_dict()
    personal.fuse()
    assert not any(isinstance(layer, SpectralLayer) for layer in personal.pipe.unet.modules())
    fused = personal.pipe.unet.state_dict()
    assert all(torch.equal(fused[name], state[name]) for name in state)
    assert torch.allclose(draw(personal.pipe), live, atol=1e-4)
    personal.unfuse()
    assert torch.equal(draw(personal.pipe), live)
    personal.fuse()
    personal.unload()
    assert weights_hash(personal.pipe.unet) == weights_hash(UNet2DConditionModel.from_pretrained(tiny_base / "unet"))


def test_a_copy_draws_the_same_and_is_independent(personal: SpectralPipeline) -> None:
    live = draw(personal.pipe)
    bare = copy.deepcopy(personal.pipe)
    whole = copy.deepcopy(personal)
    personal.set_deltas("cat")
    for pipe in (bare, whole.pipe):
        pipe.set_progress_bar_config(disable=True)
        assert torch.equal(draw(pipe), live)
    of_cat = draw(personal.pipe)
    whole.set_deltas("cat")
    assert torch.equal(draw(whole.pipe), of_cat)
    whole.unload()
    assert torch.equal(draw(personal.pipe), of_cat), "the copy shares nothing with what it was made of"


def test_a_pickled_model_draws_the_same_and_takes_no_more_than_its_numbers(personal: SpectralPipeline) -> None:
    unet, inputs = personal.pipe.unet, (torch.randn(1, 4, 8, 8), 5, torch.randn(1, 16, 16))
    wanted = unet(*inputs).sample
    content = pickle.dumps(unet)
    assert torch.allclose(pickle.loads(content)(*inputs).sample, wanted, atol=1e-5)
    stream = io.BytesIO()
    torch.save(unet, stream)
    stream.seek(0)
    assert torch.allclose(torch.load(stream, weights_only=False)(*inputs).sample, wanted, atol=1e-5)
    personal.set_deltas([])
    assert abs(len(pickle.dumps(unet)) - len(content)) < 0.01 * len(content)


def test_moved_and_cast_pipelines_keep_their_delta_in_float32(personal: SpectralPipeline) -> None:
    live = draw(personal.pipe)
    personal.pipe.to(torch.bfloat16)
    assert (draw(personal.pipe).float() - live).abs().mean() < 0.05
    personal.set_deltas("cat")
    other = draw(personal.pipe).float()
    personal.set_deltas("teapot")
    assert (draw(personal.pipe).float() - live).abs().mean() < (other - live).abs().mean()
    for shifts in personal._shifts.values():
        assert {p.dtype for p in shifts.parameters()} == {torch.float32}


def test_offloading_keeps_the_delta(personal: SpectralPipeline) -> None:
    """As `enable_sequential_cpu_offload` does it, with the CPU as the device to compute on."""
    from accelerate import cpu_offload

    if personal._rank is not None:
        pytest.skip("that offloading finds weights by their names in the state dict, where these layers are plain ones")

    live = draw(personal.pipe)
    cpu_offload(personal.pipe.unet, execution_device=torch.device("cpu"))
    assert torch.allclose(draw(personal.pipe), live, atol=1e-5)
    personal.set_deltas("cat")
    assert (draw(personal.pipe) - live).abs().max() > 1e-3
    personal.set_deltas("teapot")
    assert torch.allclose(draw(personal.pipe), live, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 2])
def test_a_compiled_model_follows_the_switches(rank: int | None) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)), torch.randn(2, 6)
    deltas = []
    for seed in range(2):
        shifts = attach(model, load_basis(model, None, progress=False), rank=rank)
        perturb(shifts, 0.5, seed)
        deltas.append(shifts.delta())
        shifts.detach()
    compiled = torch.compile(model, backend="eager")
    compiled(x)  # before any layer is exchanged
    personal = SpectralPipeline(SimpleNamespace(unet=compiled), rank=rank, progress=False)
    for name, delta in zip(("teapot", "cat"), deltas, strict=True):
        personal.load_delta(delta, name)
    alone = []
    for name in ("teapot", "cat", []):
        personal.set_deltas(name)
        alone.append(model(x))
        assert torch.allclose(compiled(x), alone[-1], atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    with personal.concepts(["cat", "teapot"]):
        assert torch.allclose(compiled(x), torch.stack([alone[1][0], alone[0][1]]), atol=1e-5)
        assert torch.allclose(compiled(torch.cat([x, x]))[3], alone[0][1], atol=1e-5), "guidance"
    personal.unload()
    assert torch.allclose(compiled(x), alone[2], atol=1e-5)
    torch._dynamo.reset()


def test_a_delta_is_loaded_on_a_compiled_model(tiny_pipe, bases: Path) -> None:
    delta = make_delta(tiny_pipe, bases, 1)
    unet = tiny_pipe.unet
    tiny_pipe.unet = torch.compile(unet, backend="eager")
    personal = SpectralPipeline(tiny_pipe, cache=bases, progress=False)
    personal.load_delta(delta, "teapot")
    assert any(isinstance(layer, SpectralLayer) for layer in unet.modules())
    personal.unload()
    assert not any(isinstance(layer, SpectralLayer) for layer in unet.modules())


def test_switching_where_it_would_have_no_effect_is_refused(personal: SpectralPipeline) -> None:
    pipe, unet = personal.pipe, personal.pipe.unet
    pipe.unet = copy.deepcopy(unet)
    for action in (lambda: personal.set_deltas("cat"), personal.fuse):
        with pytest.raises(SvdiffError, match="another than the one that the deltas were loaded on"):
            action()
    pipe.unet = unet
    with torch.no_grad():
        pipe.fuse_qkv_projections()
    with pytest.raises(SvdiffError, match="unfuse_qkv_projections"):
        personal.set_deltas("cat")
    pipe.unfuse_qkv_projections()
    personal.set_deltas("cat")


def test_plain_weights_are_not_made_of_a_model_that_has_shifts_already(tiny_pipe, bases: Path) -> None:
    delta = make_delta(tiny_pipe, bases, 1)
    basis = load_basis(tiny_pipe.unet, bases, progress=False)
    attach(tiny_pipe.unet, basis)
    with pytest.raises(SvdiffError, match="has shifts in its layers already"):
        fused_state_dict(tiny_pipe.unet, basis, delta)


def test_a_trained_bias_is_saved(unet: nn.Module, bases: Path) -> None:
    for rank in (None, 3):
        shifts = attach(unet, load_basis(unet, bases, progress=False), rank=rank)
        with torch.no_grad():
            unet.conv_in.bias.add_(1)
        wanted = unet.conv_in.bias.clone()
        assert torch.equal(unet.state_dict()["conv_in.bias"], wanted)
        shifts.detach()
        assert torch.equal(unet.conv_in.bias, wanted)
        with torch.no_grad():
            unet.conv_in.bias.sub_(1)

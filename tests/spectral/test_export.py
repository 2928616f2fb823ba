"""Plain weights and LoRA, loaded by diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from svdiff.errors import SvdiffError
from svdiff.spectral import SpectralPipeline, export_lora, fused_state_dict, load_basis
from svdiff.spectral.export import changes, lora_factors
from tests.spectral.test_pipeline import draw, make_delta


def without_norms(delta, keep_embeddings: bool = False):
    norms = delta.norms
    gone = lambda n: n in norms or ("embedding.weight" in n and not keep_embeddings)  # noqa: E731
    return delta.map(lambda name, v: v * 0 if gone(name) else v)


@pytest.fixture
def pipe(tiny_pipe):
    tiny_pipe.set_progress_bar_config(disable=True)
    return tiny_pipe


def parts(pipe, bases: Path):
    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return modules, {name: load_basis(module, bases, progress=False) for name, module in modules.items()}


def test_plain_weights_are_exact(pipe, bases: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    delta = make_delta(pipe, bases, 1)
    state = fused_state_dict(pipe.unet, load_basis(pipe.unet, bases), delta)
    concepts = SpectralPipeline(pipe, cache=bases)
    concepts.load_delta(delta, "a")
    live = draw(pipe)
    concepts.fuse()
    assert all(torch.equal(state[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    pipe.save_pretrained(tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(plain), live, atol=1e-4)
    concepts.unload()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("text", [False, True])
def test_lora_at_full_rank_is_the_delta_without_its_norms(
    pipe, bases: Path, tmp_path: Path, layout: str, text: bool
) -> None:
    delta = make_delta(pipe, bases, 1, text=text)
    modules, decompositions = parts(pipe, bases)
    concepts = SpectralPipeline(pipe, cache=bases)
    concepts.load_delta(without_norms(delta), "a")
    wanted, base = draw(pipe), None
    concepts.unload()
    base = draw(pipe)
    with pytest.warns(UserWarning, match="LoRA has no place for"):
        dropped = export_lora(modules, decompositions, delta, tmp_path / "lora.safetensors", layout=layout)
    assert set(dropped) >= delta.norms
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert torch.allclose(draw(pipe), wanted, atol=2e-3)
    assert (wanted - base).abs().max() > 0.02
    pipe.unload_lora_weights()


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_every_layer_of_the_lora_is_the_change_of_its_weight(pipe, bases: Path, tmp_path: Path, layout: str) -> None:
    """Weight by weight, as PEFT merges it: W + BA, convolutions included."""
    delta = make_delta(pipe, bases, 1)
    modules, decompositions = parts(pipe, bases)
    wanted = dict(changes(pipe.unet, decompositions["unet"], delta))
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    with pytest.warns(UserWarning, match="LoRA has no place"):
        export_lora(modules, decompositions, delta, tmp_path / "lora.safetensors", layout=layout)
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora()
    merged = {n.replace(".base_layer", ""): p for n, p in pipe.unet.named_parameters() if "lora_" not in n}
    for name, change in wanted.items():
        if f"unet.{name}" not in delta.norms:
            assert torch.allclose(merged[name] - base[name], change, atol=1e-5), name
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_lora_of_rank_k_keeps_the_k_largest_changes_of_a_layer(pipe, bases: Path, rank: int) -> None:
    delta = make_delta(pipe, bases, 1)
    basis = load_basis(pipe.unet, bases)
    for name in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight", "time_embedding.linear_2.weight"):
        f, shifts = basis[name], delta.tensors[f"unet.{name}"]
        a, b = lora_factors(f, shifts, rank)  # type: ignore[misc]
        assert a.shape[0] == b.shape[1] == min(rank, len(shifts))
        change = (f.sigma + shifts).relu() - f.sigma
        kept = torch.zeros_like(change)
        largest = change.abs().topk(min(rank, len(change))).indices
        kept[largest] = change[largest]
        assert torch.allclose(b @ a, (f.u * kept) @ f.vh, atol=1e-6)
        # No other matrix of that rank is nearer (Eckart and Young).
        exact = (f.u * change) @ f.vh
        tail = torch.linalg.svdvals(exact)[rank:]
        assert torch.allclose((exact - b @ a).norm(), tail.norm(), atol=1e-4)


def test_nothing_to_say_is_refused(pipe, bases: Path, tmp_path: Path) -> None:
    modules, decompositions = parts(pipe, bases)
    norms = make_delta(pipe, bases, 1, subset="UNet-1D")
    with pytest.raises(SvdiffError, match="nothing of this delta"):
        export_lora(modules, decompositions, norms, tmp_path / "x.safetensors")
    with pytest.raises(SvdiffError, match="which is not among"):
        export_lora({}, {}, norms, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())

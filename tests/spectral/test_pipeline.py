"""Several concepts on one live pipeline."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from svdiff.errors import SvdiffError
from svdiff.spectral import SpectralDelta, SpectralPipeline, attach, load_basis, weights_hash
from svdiff.spectral.layers import SpectralLayer
from tests.spectral.conftest import perturb


def make_delta(pipe, bases: Path, seed: int, *, subset: str = "UNet", text: bool = False) -> SpectralDelta:
    """A concept as training would leave it."""
    parts = {"unet": subset} | ({"text_encoder": "UNet"} if text else {})
    deltas = []
    for prefix, chosen in parts.items():
        module = getattr(pipe, prefix)
        shifts = attach(module, load_basis(module, bases, progress=False), subset=chosen, prefix=prefix)
        perturb(shifts, seed=seed)
        deltas.append(shifts.delta())
        shifts.detach()
    return deltas[0] + deltas[1] if text else deltas[0]


def draw(pipe) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = pipe("a dog", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="pt").images
    return images[0]


@pytest.fixture
def concepts(tiny_pipe, bases: Path) -> SpectralPipeline:
    tiny_pipe.set_progress_bar_config(disable=True)
    return SpectralPipeline(tiny_pipe, cache=bases, progress=False)


def test_concepts_come_and_go(concepts: SpectralPipeline, tiny_pipe, bases: Path, tmp_path: Path) -> None:
    base = draw(tiny_pipe)
    a, b = make_delta(tiny_pipe, bases, 1), make_delta(tiny_pipe, bases, 2, text=True)
    b.save(tmp_path / "b.safetensors")
    concepts.load_delta(a, "a")
    assert concepts.active == {"a": 1.0}
    of_a = draw(tiny_pipe)
    concepts.load_delta(tmp_path / "b.safetensors", "b")
    assert concepts.active == {"a": 1.0}
    assert torch.allclose(draw(tiny_pipe), of_a, atol=1e-5)
    concepts.set_deltas("b")
    of_b = draw(tiny_pipe)
    assert (of_b - of_a).abs().max() > 1e-3
    concepts.set_deltas({"a": 0.5, "b": 0.25})
    both = draw(tiny_pipe)
    concepts.set_deltas(["b", "a"], [0.25, 0.5])
    assert torch.equal(draw(tiny_pipe), both)
    concepts.set_deltas([])
    assert torch.allclose(draw(tiny_pipe), base, atol=1e-4)
    concepts.set_deltas("a")
    assert torch.allclose(draw(tiny_pipe), of_a, atol=1e-5)
    concepts.delete_delta("a")
    assert (concepts.deltas, concepts.active) == (["b"], {})
    hashes = [weights_hash(tiny_pipe.unet), weights_hash(tiny_pipe.text_encoder)]
    concepts.unload()
    assert torch.equal(draw(tiny_pipe), base)
    assert hashes == [weights_hash(tiny_pipe.unet), weights_hash(tiny_pipe.text_encoder)]


def test_combination_is_the_sum_of_shifts(concepts: SpectralPipeline, tiny_pipe, bases: Path) -> None:
    a, b = make_delta(tiny_pipe, bases, 1), make_delta(tiny_pipe, bases, 2)
    concepts.load_delta(a, "a")
    concepts.load_delta(b, "b")
    concepts.load_delta(a * 0.3 + b * 0.7, "mixed")
    concepts.set_deltas({"a": 0.3, "b": 0.7})
    mixed = draw(tiny_pipe)
    concepts.set_deltas("mixed")
    assert torch.allclose(draw(tiny_pipe), mixed, atol=1e-6)


def test_fusing_leaves_no_spectral_layer_and_unfusing_every_bit(
    concepts: SpectralPipeline, tiny_pipe, bases: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_pipe.unet.state_dict().items()}
    concepts.load_delta(make_delta(tiny_pipe, bases, 1), "a")
    live = draw(tiny_pipe)
    concepts.fuse()
    assert concepts.fused
    assert not any(isinstance(m, SpectralLayer) for m in tiny_pipe.unet.modules())
    assert torch.allclose(draw(tiny_pipe), live, atol=1e-4)
    for action in (lambda: concepts.set_deltas("a"), lambda: concepts.delete_delta("a")):
        with pytest.raises(SvdiffError, match="unfuse before"):
            action()
    concepts.unfuse()
    assert torch.equal(draw(tiny_pipe), live)
    concepts.set_deltas([])
    assert all(torch.equal(tensor, before[n]) for n, tensor in tiny_pipe.unet.state_dict().items())
    concepts.set_deltas("a")
    concepts.fuse()
    concepts.unload()
    assert all(torch.equal(tensor, before[n]) for n, tensor in tiny_pipe.unet.state_dict().items())


def test_only_shifted_layers_are_swapped(concepts: SpectralPipeline, tiny_pipe, bases: Path) -> None:
    small = make_delta(tiny_pipe, bases, 1, subset="UNet-CA-KV")
    concepts.load_delta(small, "small")
    count = lambda: sum(isinstance(m, SpectralLayer) for m in tiny_pipe.unet.modules())  # noqa: E731
    assert count() == len(small.tensors)
    # A delta made without this pipeline's live layers, which grow to cover it.
    other = SpectralPipeline(tiny_pipe, cache=bases)
    concepts.unload()
    large = make_delta(tiny_pipe, bases, 2, subset="UNet-CA")
    other.load_delta(small, "small")
    of_small = draw(tiny_pipe)
    other.load_delta(large, "large")
    assert count() == len(large.tensors)
    assert torch.allclose(draw(tiny_pipe), of_small, atol=1e-5)


def test_half_precision_pipeline(concepts: SpectralPipeline, tiny_pipe, bases: Path) -> None:
    concepts.load_delta(make_delta(tiny_pipe, bases, 1, text=True), "a")
    live = draw(tiny_pipe)
    tiny_pipe.to(torch.bfloat16)
    assert (draw(tiny_pipe).float() - live).abs().mean() < 0.05
    concepts.fuse()
    assert (draw(tiny_pipe).float() - live).abs().mean() < 0.05


def test_wrong_use_is_refused(concepts: SpectralPipeline, tiny_pipe, bases: Path) -> None:
    delta = make_delta(tiny_pipe, bases, 1)
    with pytest.raises(SvdiffError, match="no delta named 'a'"):
        concepts.set_deltas("a")
    elsewhere = SpectralDelta({"prior.x.weight": torch.zeros(3)})
    with pytest.raises(SvdiffError, match="changes the 'prior' of a pipeline"):
        concepts.load_delta(elsewhere, "x")
    foreign = SpectralDelta(delta.tensors, delta.metadata | {"base_hash": "0" * 64})
    with pytest.raises(SvdiffError, match="load the base that it was trained on"):
        concepts.load_delta(foreign, "x")
    assert concepts.deltas == []
    concepts.load_delta(delta, "a")
    with pytest.raises(SvdiffError, match="loaded already"):
        concepts.load_delta(delta, "a")
    with pytest.raises(SvdiffError, match="2 weights"):
        concepts.set_deltas(["a"], [1, 2])


@pytest.mark.parametrize("when", ["decomposing", "attaching", "packing"])
def test_a_load_that_fails_leaves_all_as_it_was(
    concepts: SpectralPipeline, tiny_pipe, bases: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    small, large = make_delta(tiny_pipe, bases, 1, subset="UNet-CA"), make_delta(tiny_pipe, bases, 2)
    concepts.load_delta(small, "small")
    of_small = draw(tiny_pipe)
    module = import_module("svdiff.spectral.pipeline")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        if when == "decomposing":
            patch.setattr(module, "load_basis", full)
        elif when == "packing":
            patch.setattr(concepts._tokens, "load", full)
        else:
            calls, real = [], module.SpectralShifts

            def once(*positional: object, **named: object):
                calls.append(named)
                return full() if len(calls) == 1 else real(*positional, **named)

            patch.setattr(module, "SpectralShifts", once)
        concepts.load_delta(large, "large")
    assert (concepts.deltas, concepts.active) == (["small"], {"small": 1.0})
    assert torch.equal(draw(tiny_pipe), of_small)
    concepts.load_delta(large, "large")
    assert torch.allclose(draw(tiny_pipe), of_small, atol=1e-5)


def test_a_delta_of_another_base_is_refused_before_the_base_is_decomposed(
    concepts: SpectralPipeline, tiny_pipe, bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = make_delta(tiny_pipe, bases, 1)
    other = SpectralDelta(delta.tensors, dict(delta.metadata) | {"base_hash": "c" * 64})
    monkeypatch.setattr("svdiff.spectral.pipeline.load_basis", lambda *_, **__: pytest.fail("decomposed"))
    with pytest.raises(SvdiffError, match="load the base that it was trained on"):
        concepts.load_delta(other, "other")

"""Deltas as values: arithmetic laws, files, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import (
    Basis,
    SpectralDelta,
    attach,
    combine,
    cosine_similarity,
    interpolate,
    load_basis,
    mix_by_layer,
)
from tests.spectral.conftest import perturb

SIZES = {"a.weight": 6, "b.weight": 4, "norm.weight": 5}


def delta(seed: int, **metadata: str) -> SpectralDelta:
    generator = torch.Generator().manual_seed(seed)
    zeros = SpectralDelta.zeros(SIZES, ["norm.weight"], base_hash="b", basis_id="i", **metadata)
    return zeros.map(lambda name, v: torch.randn(v.shape, generator=generator))


def same(a: SpectralDelta, b: SpectralDelta, tolerance: float = 1e-6) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        torch.allclose(a.tensors[n], b.tensors[n], atol=tolerance) for n in a.tensors
    )


seeds, weights = st.integers(0, 50), st.floats(-2, 2)


@settings(max_examples=30, deadline=None)
@given(seeds, seeds, seeds, weights, weights)
def test_laws(s: int, t: int, r: int, v: float, w: float) -> None:
    a, b, c = delta(s), delta(t), delta(r)
    assert (a + b).hash == (b + a).hash
    assert same((a + b) + c, a + (b + c))
    assert same((a + b) * w, a * w + b * w)
    assert same(a * v + a * w, a * (v + w), 1e-5)
    assert (a * 1).hash == a.hash == (1 * a).hash
    assert not any(x.any() for x in (a * 0).tensors.values())
    assert same(combine([(a, v), (b, w)]), a * v + b * w)


@settings(max_examples=20, deadline=None)
@given(seeds, seeds, st.floats(0, 1))
def test_interpolation_is_equation_5(s: int, t: int, alpha: float) -> None:
    a, b = delta(s), delta(t)
    assert interpolate(a, b, 1).hash == a.hash
    assert interpolate(a, b, 0).hash == b.hash
    mixed = interpolate(a, b, alpha)
    for name in SIZES:
        name = f"unet.{name}"
        assert torch.allclose(mixed.tensors[name], alpha * a.tensors[name] + (1 - alpha) * b.tensors[name], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.integers(0, 8))
def test_rank_limit_keeps_the_leading_shifts_and_all_norms(s: int, rank: int) -> None:
    a = delta(s)
    cut = a.limit_rank(rank)
    for name, shifts in a.tensors.items():
        kept = len(shifts) if "norm" in name else min(rank, len(shifts))
        assert torch.equal(cut.tensors[name][:kept], shifts[:kept])
        assert not cut.tensors[name][kept:].any()
    assert a.limit_rank(6).hash == a.hash
    assert cut.limit_rank(rank).hash == cut.hash


def test_mixing_by_layer() -> None:
    a, b = delta(1), delta(2)
    mixed = mix_by_layer(a, b, lambda name: "a." in name)
    assert torch.equal(mixed.tensors["unet.a.weight"], a.tensors["unet.a.weight"])
    assert torch.equal(mixed.tensors["unet.b.weight"], b.tensors["unet.b.weight"])
    assert mixed.norms == {"unet.norm.weight"}
    assert mix_by_layer(a, b, lambda name: True).hash == a.hash
    assert mix_by_layer(a, b, lambda name: False).hash == b.hash


def test_cosine_similarity_by_layer() -> None:
    a = delta(1)
    assert all(abs(v - 1) < 1e-6 for v in cosine_similarity(a, a * 3).values())
    assert all(abs(v + 1) < 1e-6 for v in cosine_similarity(a, a * -1).values())
    assert set(cosine_similarity(a, a * 0).values()) == {0.0}
    assert list(cosine_similarity(a, delta(2))) == list(a.tensors)


def test_parts_of_a_pipeline_add_up_to_one_delta(tmp_path: Path) -> None:
    unet = delta(1, subset="UNet-CA", concept="cat")
    facts = {
        "text_encoder.base_hash": "t",
        "text_encoder.basis_id": "j",
        "text_encoder.subset": "UNet",
        "concept": "cat",
    }
    text = SpectralDelta.zeros({"x.weight": 3}, [], prefix="text_encoder", **facts)
    both = unet + text
    assert both.prefixes() == ["unet", "text_encoder"]
    assert both.metadata.items() >= {"subset": "UNet-CA", "concept": "cat", "base_hash": "b", **facts}.items()
    assert both.part("text_encoder").keys() == {"x.weight"}
    both.save(tmp_path / "both.safetensors")
    assert SpectralDelta.load(tmp_path / "both.safetensors").hash == both.hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_files_are_whole_plain_and_reproducible(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    a = delta(3, concept="teapot", config='{"lr": 1}')
    a.save(tmp_path / "a.safetensors", dtype)
    a.save(tmp_path / "b.safetensors", dtype)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    plain = load_file(tmp_path / "a.safetensors")
    assert plain.keys() == a.tensors.keys()
    assert all(tensor.dtype == dtype for tensor in plain.values())
    again = SpectralDelta.load(tmp_path / "a.safetensors")
    assert again.metadata["concept"] == "teapot"
    assert same(again, a, 0 if dtype == torch.float32 else 2e-3)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_broken_files_and_values_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(SvdiffError, match="there is no delta file"):
        SpectralDelta.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a delta")
    with pytest.raises(SvdiffError, match="damaged"):
        SpectralDelta.load(tmp_path / "bad.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(SvdiffError, match="not a file of spectral shifts"):
        SpectralDelta.load(tmp_path / "other.safetensors")
    broken = delta(1).map(lambda name, v: v / 0)
    with pytest.raises(SvdiffError, match="not finite"):
        broken.save(tmp_path / "x.safetensors")
    with pytest.raises(SvdiffError, match="float16"):
        (delta(1) * 1e6).save(tmp_path / "x.safetensors", torch.float16)
    with pytest.raises(SvdiffError, match="float32 or float16"):
        delta(1).save(tmp_path / "x.safetensors", torch.float64)
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(SvdiffError, match="nothing to combine"):
        combine([])


def test_deltas_of_other_bases_do_not_add_up() -> None:
    a = delta(1)
    for change in ({"base_hash": "c"}, {"basis_id": "k"}):
        with pytest.raises(SvdiffError, match="do not add up"):
            a + SpectralDelta(a.tensors, a.metadata | change)
    with pytest.raises(SvdiffError, match="4 and all singular directions of the unet do not become one file"):
        SpectralDelta(a.tensors, a.metadata | {"directions": "4"}) + a
    longer = SpectralDelta({**a.tensors, "unet.a.weight": torch.zeros(9)}, a.metadata)
    with pytest.raises(SvdiffError, match=r"'unet.a.weight' has 6 shifts in one delta, 9"):
        a + longer


def test_a_delta_on_the_wrong_base_is_refused(unet: nn.Module, basis: Basis, bases: Path) -> None:
    shifts = attach(unet, basis)
    perturb(shifts)
    trained = shifts.delta()
    shifts.detach()
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    other = load_basis(unet, None, progress=False)
    moved = attach(unet, other)
    with pytest.raises(SvdiffError, match="load the base that it was trained on"):
        moved.load(trained)
    assert not any(p.any() for p in moved.parameters())


def test_other_directions_of_the_same_base_are_refused_and_rounding_is_not(unet: nn.Module, basis: Basis) -> None:
    from dataclasses import replace

    shifts = attach(unet, basis)
    trained = shifts.delta()

    def elsewhere(change: float) -> Basis:
        factors = {n: replace(f, digest="x", fingerprint=f.fingerprint + change) for n, f in basis.items()}
        return Basis(factors, basis.base_hash)

    rounded, turned = elsewhere(1e-6), elsewhere(0.05)
    assert rounded.id != basis.id
    trained.check(rounded)
    with pytest.raises(SvdiffError, match="another decomposition of the same unet"):
        trained.check(turned)
    unknown = SpectralDelta(trained.tensors, {k: v for k, v in trained.metadata.items() if k != "fingerprints"})
    with pytest.raises(SvdiffError, match="another decomposition"):
        unknown.check(rounded)
    both = trained + SpectralDelta(trained.tensors, trained.metadata | {"basis_id": rounded.id})
    both.check(basis)
    mix_by_layer(both, trained, lambda name: "attn" in name).check(rounded)

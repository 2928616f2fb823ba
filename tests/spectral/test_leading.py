"""Shifts of the leading singular values only: found without the rest, beside a weight that stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import Basis, SpectralPipeline, attach, decompose, fused_state_dict, load_basis, weights_hash
from svdiff.spectral.decompose import leading_svd, svd
from svdiff.spectral.layers import LAYERS, SpectralConv, SpectralLinear, SpectralNorm
from tests.spectral.conftest import perturb
from tests.spectral.test_pipeline import draw, make_delta


def spectrum(kind: str, m: int, n: int) -> torch.Tensor:
    """A matrix whose singular values fall as a trained weight's, slowly, hardly at all, or to zero."""
    k = min(m, n)
    u, _ = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))
    steps = torch.arange(k, dtype=torch.float64)
    sigma = {
        "trained": 1 / (1 + steps) ** 0.5,
        "slow": 1 - 0.5 * steps / k,
        "flat": 1 + 1e-9 * steps.flip(0),
        "deficient": (1 - steps / 20).clamp_min(0),
    }[kind]
    return ((u * sigma) @ v.T).float()


@pytest.mark.parametrize("kind", ["trained", "slow", "flat", "deficient"])
@pytest.mark.parametrize(("m", "n"), [(100, 150), (150, 100)])
def test_leading_directions_are_those_of_the_whole_decomposition(kind: str, m: int, n: int) -> None:
    matrix, rank = spectrum(kind, m, n), 4
    (u, sigma, vh), whole = leading_svd(matrix, rank), svd(matrix)
    assert (u.shape, sigma.shape, vh.shape) == ((m, rank), (rank,), (rank, n))
    assert (sigma - whole[1][:rank]).abs().max() < (1e-6 if kind == "flat" else 1e-7)
    assert (u.T @ u - torch.eye(rank)).abs().max() < 1e-6
    assert (vh @ vh.T - torch.eye(rank)).abs().max() < 1e-6
    assert (matrix.double() @ vh.T - u * sigma).norm(dim=0).max() < 1e-6
    if kind in ("trained", "deficient"):  # elsewhere they are not unique
        agreement = (u * whole[0][:, :rank]).sum(0).abs()
        assert (1 - agreement).max() < 1e-6
    assert all(torch.equal(a, b) for a, b in zip(leading_svd(matrix, rank), (u, sigma, vh), strict=True))


def test_leading_directions_spare_the_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "svd", lambda matrix: pytest.fail("everything was decomposed"))
    state = torch.random.get_rng_state()
    leading_svd(spectrum("trained", 200, 300), 8)
    monkeypatch.undo()
    torch.random.set_rng_state(state)


def big() -> nn.Sequential:
    """A model with a matrix large enough to be decomposed in part."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(160, 140), nn.LayerNorm(140), nn.Conv1d(6, 150, 25))
    with torch.no_grad():
        model[0].weight.copy_(spectrum("trained", 140, 160))
    return model


def test_a_partial_basis_is_stored_read_and_told_from_the_whole(tmp_path: Path) -> None:
    first = load_basis(big(), tmp_path, rank=4, progress=False)
    second = load_basis(big(), tmp_path, rank=4, progress=False)
    assert first.id == second.id == load_basis(big(), None, rank=4, progress=False).id
    assert (second.rank, second["0.weight"].u.shape, second["0.weight"].source) == (4, (140, 4), None)
    assert {p.name for p in tmp_path.rglob("*.safetensors")} == {
        "0.weight.leading-4.safetensors",
        "2.weight.leading-4.safetensors",
    }
    whole = load_basis(big(), tmp_path, progress=False)
    assert whole.id != first.id
    assert whole["0.weight"].leading_fingerprint(4) == pytest.approx(first["0.weight"].fingerprint, abs=1e-3)
    with pytest.raises(SvdiffError, match=r"leading 4 directions of '0\.weight' alone"):
        attach(big(), first, subset=r"^0\.")
    with pytest.raises(SvdiffError, match="does not have the weights"):
        first["0.weight"].base_weight()


def test_a_delta_of_leading_directions_fits_every_basis_that_has_them(tmp_path: Path) -> None:
    model, x = big(), torch.randn(3, 160)
    shifts = attach(model, load_basis(model, None, rank=4, progress=False), subset=r"^[01]\.", rank=4)
    perturb(shifts)
    delta, wanted = shifts.delta(), model[:2](x)
    shifts.detach()
    for rank in (4, 6, None):
        basis = load_basis(model, tmp_path, rank=rank, progress=False)
        other = attach(model, basis, subset=r"^[01]\.", rank=rank)
        other.load(delta)
        assert torch.allclose(model[:2](x), wanted, atol=1e-5)
        other.detach()
        plain = copy.deepcopy(model)
        plain.load_state_dict(fused_state_dict(model, basis, delta))
        assert torch.allclose(plain[:2](x), wanted, atol=1e-5)
    with pytest.raises(SvdiffError, match="other singular directions"):
        delta.check(load_basis(model, None, rank=3, progress=False))
    with torch.no_grad():
        model[0].weight.add_(0.1)
    with pytest.raises(SvdiffError, match="not the weight in the basis"):
        attach(model, load_basis(big(), None, rank=4, progress=False), subset=r"^0\.", rank=4)


def test_only_what_is_asked_for_is_decomposed(unet: nn.Module, tmp_path: Path) -> None:
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{k}.weight" for k in "kv"]
    basis = load_basis(unet, tmp_path, names=names, progress=False)
    assert list(basis) == names
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert basis.base_hash == weights_hash(unet)
    assert load_basis(unet, tmp_path, names=names, base_hash=basis.base_hash, progress=False).id == basis.id
    shifts = attach(unet, basis, subset=r"mid_block.*attn2\.to_[kv]")
    perturb(shifts)
    delta = shifts.delta()
    shifts.detach()
    delta.check(load_basis(unet, tmp_path, progress=False))


def test_a_pipeline_decomposes_what_its_deltas_shift_and_grows(tiny_pipe, bases: Path, tmp_path: Path) -> None:
    tiny_pipe.set_progress_bar_config(disable=True)
    small, large = (make_delta(tiny_pipe, bases, i, subset=s) for i, s in enumerate(("UNet-CA-KV", "Mid-Block")))
    personal = SpectralPipeline(tiny_pipe, cache=tmp_path, progress=False)
    personal.load_delta(small, "small")
    of_small = draw(tiny_pipe)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(small.tensors)
    personal.load_delta(large, "large")
    assert len(personal.basis("unet", ())) < 40
    assert torch.allclose(draw(tiny_pipe), of_small, atol=1e-5)
    personal.unload()


def test_a_pipeline_leaves_the_weights_where_a_delta_has_leading_directions_only(
    tiny_pipe, bases: Path, tmp_path: Path
) -> None:
    tiny_pipe.set_progress_bar_config(disable=True)
    unet = tiny_pipe.unet
    base = draw(tiny_pipe)
    weight = unet.conv_in.weight
    shifts = attach(unet, load_basis(unet, tmp_path, rank=4, progress=False), rank=4)
    perturb(shifts)
    wanted, delta = draw(tiny_pipe), shifts.delta()
    shifts.detach()
    personal = SpectralPipeline(tiny_pipe, cache=tmp_path, progress=False)
    personal.load_delta(delta, "a")
    assert torch.allclose(draw(tiny_pipe), wanted, atol=1e-5)
    assert unet.conv_in.original.weight is weight
    personal.unload()
    assert torch.equal(draw(tiny_pipe), base)


def test_a_pipeline_deepens_its_basis_for_a_delta_of_more_directions(tiny_pipe, bases: Path, tmp_path: Path) -> None:
    tiny_pipe.set_progress_bar_config(disable=True)
    unet, base, wanted, deltas = tiny_pipe.unet, draw(tiny_pipe), {}, {}
    for rank in (4, 6, None):
        shifts = attach(unet, load_basis(unet, tmp_path, rank=rank, progress=False), rank=rank)
        perturb(shifts)
        wanted[rank], deltas[rank] = draw(tiny_pipe), shifts.delta()
        shifts.detach()
    for order in ((4, 6, None), (None, 4, 6)):
        personal = SpectralPipeline(tiny_pipe, cache=tmp_path, progress=False)
        for rank in order:
            personal.load_delta(deltas[rank], str(rank))
        assert personal.active == {str(order[0]): 1.0}
        for rank in order:
            personal.set_deltas(str(rank))
            assert torch.allclose(draw(tiny_pipe), wanted[rank], atol=1e-5)
        personal.unload()
        assert torch.equal(draw(tiny_pipe), base)


@pytest.mark.parametrize("rank", [2, 8])
def test_the_weight_stays_and_2k_over_n_is_added(rank: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    held = lambda: sum(t.nbytes for t in [*model.parameters(), *model.buffers()])  # noqa: E731
    weight, before = model[0].weight, held()
    shifts = attach(model, load_basis(model, None, rank=rank, progress=False), rank=rank)
    assert held() == before * (1 + 2 * rank / 64)
    assert model[0].original.weight is weight
    shifts.detach()
    assert model[0].weight is weight


class Int8Linear(nn.Linear):
    """A quantised layer as other libraries make them: codes in `weight`, decoded in its own forward."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        weight = layer.weight.detach()
        self.scale = nn.Buffer(weight.abs().amax(1, keepdim=True) / 127)
        codes = (weight / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1), requires_grad=False)  # packed, in another shape
        self.bias = nn.Parameter(layer.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.view(self.out_features, -1) * self.scale
        return F.linear(x, weight.to(x.dtype), self.bias)


@pytest.mark.parametrize("concepts", [None, 2])
def test_the_weight_beneath_may_be_quantised(concepts: int | None) -> None:
    model, x = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30)), torch.randn(2, 40)
    basis = load_basis(model, None, rank=4, progress=False)
    quantised = nn.Sequential(Int8Linear(model[0]), copy.deepcopy(model[1]))
    plain = quantised(x)
    with pytest.raises(SvdiffError, match=r"no spectral layer|is quantised"):
        attach(quantised, load_basis(model, None, progress=False))
    shifts = attach(quantised, basis, rank=4, concepts=concepts)
    if concepts:
        shifts.assign([0, 1])
    assert torch.allclose(quantised(x), plain)
    perturb(shifts, 0.3)
    y = quantised(x)
    for row in range(2):
        delta = shifts.delta() if concepts is None else shifts.delta(row)
        exact = copy.deepcopy(model)
        exact.load_state_dict(fused_state_dict(model, basis, delta))
        near, far = (y[row] - exact(x)[row]).norm(), (y[row] - plain[row]).norm()
        assert near < 0.1 * far
    y.sum().backward()
    assert all(p.grad is not None for p in shifts.parameters())
    if concepts is None:
        with pytest.raises(SvdiffError, match="quantised weight"):
            shifts.fuse()
        assert torch.equal(quantised(x), y), "a refusal changes nothing"
    shifts.detach()
    assert isinstance(quantised[0], Int8Linear)
    assert torch.equal(quantised(x), plain)
    wrong = load_basis(nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30)), None, rank=4, progress=False)
    with pytest.raises(SvdiffError, match="not the weight in the basis"):
        attach(quantised, wrong, rank=4)


def test_norms_of_transformers_have_spectral_layers() -> None:
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm

    for norm in (RMSNorm(12, eps=1e-6), RMSNorm(12, eps=1e-6, bias=True), nn.RMSNorm(12), FP32LayerNorm(12)):
        model, x = nn.Sequential(nn.Linear(12, 12), norm), torch.randn(2, 5, 12)
        wanted = model(x)
        shifts = attach(model, load_basis(model, None, progress=False))
        assert isinstance(model[1], SpectralNorm)
        assert torch.allclose(model(x), wanted, atol=1e-5)
        perturb(shifts)
        y = model(x)
        y.sum().backward()
        assert model[1].delta.grad.all()
        model.to(torch.bfloat16)
        assert (model(x.bfloat16()).float() - y).abs().max() < 0.2
        shifts.detach()


def test_more_layers_are_opened_by_their_type(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class SpectralScaled(SpectralLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model, x = nn.Sequential(Scaled(6, 5)), torch.randn(3, 6)
    basis, wanted = load_basis(model, None, progress=False), model(x)
    with pytest.raises(SvdiffError, match="belongs to a Scaled"):
        attach(model, basis)
    monkeypatch.setitem(LAYERS, Scaled, SpectralScaled)
    attach(model, basis)
    assert torch.allclose(model(x), wanted, atol=1e-5)


def test_a_grouped_convolution_keeps_its_weight_too() -> None:
    model, x = nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), torch.randn(2, 8, 5, 5)
    basis: Basis = load_basis(model, None, progress=False)
    shifts = attach(model, basis, rank=3)
    assert isinstance(model[0], SpectralConv)
    perturb(shifts)
    y, delta = model(x), shifts.delta()
    shifts.fuse()
    assert torch.allclose(model(x), y, atol=1e-5)
    shifts.detach()
    model.load_state_dict(fused_state_dict(model, basis, delta))
    assert torch.allclose(model(x), y, atol=1e-5)

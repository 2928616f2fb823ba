"""Every layer kind, by both contractions, against Eq. 2 written out in float64 and differentiated by autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from svdiff.errors import SvdiffError
from svdiff.spectral import cpu
from svdiff.spectral.basis import factorise, is_matrix
from svdiff.spectral.cpu import Geometry, convolve, convolve_backward, unfolding_is_cheaper
from svdiff.spectral.functions import materialising_is_cheaper
from svdiff.spectral.layers import SpectralConv, SpectralLayer, SpectralMatrix, make_layer

torch.manual_seed(0)
CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear wide": (nn.Linear(40, 24), (2, 7, 40)),
    "linear tall": (nn.Linear(24, 40, bias=False), (2, 7, 24)),
    "linear many tokens": (nn.Linear(8, 8), (50, 8)),
    "conv": (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 9, 8)),
    "conv few tokens": (nn.Conv2d(6, 60, 3, padding=1), (2, 6, 3, 2)),
    "conv few tokens, one picture": (nn.Conv2d(6, 60, 3, padding=1), (1, 6, 3, 4)),
    "conv strided": (nn.Conv2d(6, 40, 3, padding=1, stride=2), (1, 6, 5, 5)),
    "conv few tokens dilated": (nn.Conv2d(6, 60, 3, padding=2, dilation=2, stride=2), (2, 6, 5, 6)),
    "conv first": (nn.Conv2d(3, 32, 3, padding=1), (2, 3, 6, 6)),
    "conv 1x1": (nn.Conv2d(12, 20, 1), (2, 12, 5, 5)),
    "conv 1x1 square": (nn.Conv2d(8, 8, 1), (2, 8, 9, 9)),
    "conv 1x1 strided": (nn.Conv2d(4, 6, 1, stride=2), (1, 4, 5, 5)),
    "conv grouped": (nn.Conv2d(8, 12, 3, groups=2, padding=1), (2, 8, 5, 5)),
    "conv circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 5, 5)),
    "conv same": (nn.Conv2d(4, 6, (3, 5), padding="same"), (1, 4, 7, 7)),
    "conv 1-D": (nn.Conv1d(5, 7, 3, padding=1), (2, 5, 9)),
    "conv transposed": (nn.ConvTranspose2d(5, 7, 4, stride=2, padding=1), (2, 5, 4, 4)),
    "conv transposed 1-D": (nn.ConvTranspose1d(5, 7, 4, stride=2, padding=1, output_padding=1), (2, 5, 4)),
}


def _without_bias(norm: nn.Module) -> nn.Module:
    norm.bias = None
    return norm


class RootMeanSquare(nn.Module):
    """A norm that no layer here knows by its type."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6).to(x.dtype) * self.weight


NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "layer norm": (nn.LayerNorm(12), (2, 5, 12)),
    "layer norm 2-D": (nn.LayerNorm((3, 4)), (2, 3, 4)),
    "group norm": (nn.GroupNorm(4, 12), (2, 12, 5, 5)),
    "group norm without a bias": (_without_bias(nn.GroupNorm(4, 12)), (2, 12, 5, 5)),
    "RMS norm": (nn.RMSNorm(12), (2, 5, 12)),
    "unknown norm": (RootMeanSquare(12), (2, 5, 12)),
}


def spectral(original: nn.Module, rank: int | None = None, shift: float = 0.3) -> SpectralLayer:
    original = copy.deepcopy(original).requires_grad_(False)
    factors = factorise(original, original.weight) if is_matrix(original) else None
    layer = make_layer("layer.weight", original, factors, rank)
    with torch.no_grad():
        layer.delta.copy_(shift * torch.randn(layer.delta.shape))
    return layer


def written_out(layer: SpectralLayer, delta: torch.Tensor) -> torch.Tensor:
    """W_δ of Eq. 2, or w + δ, in float64."""
    if not isinstance(layer, SpectralMatrix):
        return layer.base_weight().double() + delta.view(layer.shape)
    f = layer.factors
    delta = F.pad(delta, (0, len(f.sigma) - len(delta)))  # a limited rank leaves the rest as it is
    matrix = f.u.double() @ torch.diag(F.relu(f.sigma.double() + delta)) @ f.vh.double()
    if layer.transposed:
        return matrix.view(layer.shape[1], layer.shape[0], *layer.shape[2:]).transpose(0, 1)
    return matrix.view(layer.shape)


def reference(original: nn.Module, layer: SpectralLayer, x: torch.Tensor, g: torch.Tensor):
    """Output and gradients by autograd through Eq. 2 in float64."""
    x, delta = x.detach().double().requires_grad_(), layer.delta.detach().double().requires_grad_()
    module = copy.deepcopy(original).double()
    y = torch.func.functional_call(module, {"weight": written_out(layer, delta)}, (x,))
    return y, *torch.autograd.grad(y, [x, delta], g.double())


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-12))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("contraction", ["factored", "materialised", "auto"])
@pytest.mark.parametrize("name", CASES | NORMS)
def test_matches_equation_2(name: str, contraction: str, rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpectralMatrix, "contraction", contraction)
    check_equation_2(name, rank)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("contraction", ["factored", "materialised"])
@pytest.mark.parametrize("name", CASES)
def test_matches_equation_2_by_onednn(name: str, contraction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpectralMatrix, "contraction", contraction)
    check_equation_2(name)


def check_equation_2(name: str, rank: int | None = None) -> None:
    original, shape = (CASES | NORMS)[name]
    layer = spectral(original, rank)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], g)
    expected = reference(original, layer, x, g)
    assert max(far(a, b) for a, b in zip((y, for_x, for_delta), expected, strict=True)) < 2e-6
    assert for_delta.dtype == torch.float32
    with torch.no_grad():
        assert far(layer(x), expected[0]) < 2e-6
    assert far(layer.weight, written_out(layer, layer.delta.detach().double())) < 2e-6
    assert far(layer.shifted_weight(), written_out(layer, layer.delta.detach().double())) < 2e-6


@pytest.mark.parametrize("rank", [None, 3])
def test_embedding_matches_equation_2(rank: int | None) -> None:
    for original in (nn.Embedding(30, 8), nn.Embedding(5, 12)):
        layer = spectral(original, rank)
        index = torch.randint(0, 5, (2, 7))
        delta = layer.delta.detach().double().requires_grad_()
        expected = F.embedding(index, written_out(layer, delta))
        g = torch.randn_like(expected)
        (for_delta,) = torch.autograd.grad(layer(index), layer.delta, g.float())
        (wanted,) = torch.autograd.grad(expected, delta, g)
        assert far(layer(index), expected) < 1e-6
        assert far(for_delta, wanted) < 1e-6


@pytest.mark.parametrize("name", CASES | NORMS)
def test_zero_shift_is_the_identity(name: str) -> None:
    original, shape = (CASES | NORMS)[name]
    x = torch.randn(shape)
    assert far(spectral(original, shift=0.0)(x), original.double()(x.double())) < 1e-6
    original.float()


@pytest.mark.parametrize("name", ["linear wide", "conv", "conv few tokens", "conv 1x1"])
def test_relu_stops_the_gradient_of_dead_directions(name: str) -> None:
    original, shape = CASES[name]
    layer = spectral(original, shift=0.0)
    with torch.no_grad():
        layer.delta[1::2] = -layer.sigma[1::2] - 0.1
    layer(torch.randn(shape, requires_grad=True)).square().sum().backward()
    assert (layer.delta.grad[1::2] == 0).all()
    assert (layer.delta.grad[::2] != 0).all()


@pytest.mark.parametrize("name", ["linear wide", "conv", "conv few tokens", "conv 1x1", "conv transposed"])
def test_no_gradient_is_made_where_none_is_asked(name: str) -> None:
    original, shape = CASES[name]
    layer = spectral(original)
    x = torch.randn(shape)
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert far(layer.delta.grad, reference(original, layer, x, g)[2]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES | NORMS)
def test_half_precision_keeps_float32_shifts(name: str, dtype: torch.dtype) -> None:
    original, shape = (CASES | NORMS)[name]
    layer = spectral(original)
    kept = layer.delta.detach().clone()
    layer.to(dtype)
    assert torch.equal(layer.delta, kept)
    assert layer.delta.dtype == torch.float32
    assert {b.dtype for b in layer.buffers()} == {dtype}
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    g = torch.randn_like(y)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], g)
    expected = reference(original, layer, x, g)
    assert for_delta.dtype == torch.float32
    assert max(far(a, b) for a, b in zip((y, for_x, for_delta), expected, strict=True)) < 0.05


@pytest.mark.parametrize("contraction", ["factored", "materialised"])
@pytest.mark.parametrize("name", ["linear wide", "conv", "conv few tokens", "conv 1x1", "conv grouped", "layer norm"])
def test_autocast(name: str, contraction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, shape = (CASES | NORMS)[name]
    monkeypatch.setattr(SpectralMatrix, "contraction", contraction)
    layer = spectral(original)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = layer(x), original(x)
    assert y.dtype == plain.dtype
    g = torch.randn_like(y)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], g)
    expected = reference(original, layer, x, g)
    assert for_delta.dtype == torch.float32
    assert for_x.dtype == torch.float32
    assert max(far(a, b) for a, b in zip((y, for_x, for_delta), expected, strict=True)) < 0.05


@pytest.mark.parametrize("name", [n for n in CASES if len(CASES[n][1]) == 4])
def test_channels_last(name: str) -> None:
    original, shape = CASES[name]
    layer = spectral(original).to(memory_format=torch.channels_last)
    x = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], g)
    expected = reference(original, layer, x, g)
    assert max(far(a, b) for a, b in zip((y, for_x, for_delta), expected, strict=True)) < 2e-6
    if y[0, 0].numel() > 1:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["linear wide", "conv", "conv few tokens", "conv grouped", "group norm"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    original, shape = (CASES | NORMS)[name]
    layer = spectral(original)
    x = torch.randn(shape, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    g = torch.randn_like(y)
    y.backward(g)
    expected = reference(original, layer, x, g)
    assert max(far(a, b) for a, b in zip((y, x.grad, layer.delta.grad), expected, strict=True)) < 2e-6


def test_trained_biases_get_their_gradient() -> None:
    for name in ("linear wide", "conv", "conv 1x1"):
        original, shape = CASES[name]
        layer = spectral(original)
        layer.bias.requires_grad_()
        y = layer(torch.randn(shape))
        y.sum().backward()
        assert torch.allclose(layer.bias.grad, torch.full_like(layer.bias, y.numel() / len(layer.bias)))


def test_no_weight_sized_tensor_is_saved_for_the_backward_pass() -> None:
    """Only h = Vᵀx is kept: K numbers a token."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    for original, shape, tokens in (
        (nn.Linear(512, 32), (1, 3, 512), 3),
        (nn.Conv2d(32, 8, 3, padding=1), (1, 32, 4, 4), 16),
    ):
        layer = spectral(original)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(torch.randn(shape, requires_grad=True))
        assert sum(sizes) == tokens * len(layer.delta)
        sizes.clear()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3), c=st.integers(1, 4), k=st.integers(1, 70), side=st.integers(3, 7), kernel=st.integers(1, 3),
    stride=st.integers(1, 2), padding=st.integers(0, 2), dilation=st.integers(1, 2), last=st.booleans(),
)  # fmt: skip
def test_all_routes_of_a_convolution_agree(batch, c, k, side, kernel, stride, padding, dilation, last) -> None:
    if side + 2 * padding < dilation * (kernel - 1) + 1:
        return
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, c, side, side).to(memory_format=layout).requires_grad_()
    w = torch.randn(k, c, kernel, kernel)
    geometry = Geometry((stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0), 1)
    expected = F.conv2d(x, w, None, stride, padding, dilation)
    y = convolve(x.detach(), w, geometry)
    assert torch.allclose(y, expected, atol=1e-4)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    assert torch.allclose(convolve_backward(g, x.shape, w, geometry), wanted, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("numbers", [1, 300, 1000])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_picture_is_unfolded_in_parts(batch: int, numbers: int, memory_format, monkeypatch) -> None:
    """No more than so many numbers at a time (one channel at least), and the same convolution."""
    monkeypatch.setattr(cpu, "_UNFOLDED", numbers)
    unfolded: list[int] = []
    real = F.unfold

    def spy(*args) -> torch.Tensor:
        columns = real(*args)
        unfolded.append(columns.numel())
        return columns

    monkeypatch.setattr(cpu.F, "unfold", spy)
    x = torch.randn(batch, 7, 4, 3).to(memory_format=memory_format).requires_grad_()
    w, geometry = torch.randn(90, 7, 3, 3), Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    expected = F.conv2d(x, w, padding=1)
    y = convolve(x.detach(), w, geometry)
    assert torch.allclose(y, expected, atol=1e-4)
    assert sum(unfolded) == 9 * x.numel()
    assert max(unfolded) <= max(numbers, 9 * batch * 12)
    g = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad(expected, x, g)
    for_x = convolve_backward(g, x.shape, w, geometry)
    assert torch.allclose(for_x, wanted, atol=1e-4)
    assert for_x.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("contraction", ["factored", "materialised"])
@pytest.mark.parametrize("name", CASES | NORMS)
def test_runs_on_the_meta_device(name: str, contraction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and gradients without numbers, as tools ask that plan memory or export graphs."""
    original, shape = (CASES | NORMS)[name]
    monkeypatch.setattr(SpectralMatrix, "contraction", contraction)
    layer = spectral(original)
    wanted = layer(torch.randn(shape))
    layer.to("meta")
    x = torch.randn(shape, device="meta", requires_grad=True)
    y = layer(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", wanted.shape, wanted.dtype)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], torch.empty_like(y))
    assert (for_x.shape, for_delta.shape) == (x.shape, layer.delta.shape)


def test_deep_layers_are_unfolded_and_wide_ones_are_not() -> None:
    deep, wide = torch.empty(1, 1280, 8, 8), torch.empty(1, 320, 64, 64)
    assert unfolding_is_cheaper(deep, torch.empty(1280, 1280, 3, 3), (8, 8))
    assert not unfolding_is_cheaper(wide, torch.empty(320, 320, 3, 3), (64, 64))


def test_contraction_is_chosen_by_shape_and_tokens() -> None:
    step = {"grad": True, "input_grad": True}
    assert materialising_is_cheaper(4096, 320, 320, **step)
    assert not materialising_is_cheaper(256, 1280, 1280, **step)
    assert not materialising_is_cheaper(4096, 2560, 320, **step)
    assert not materialising_is_cheaper(77, 320, 768, grad=True, input_grad=False)
    assert materialising_is_cheaper(4096, 320, 320, grad=False, input_grad=False)


def test_unsupported_layers_are_refused_by_name() -> None:
    for original in (nn.Bilinear(3, 4, 5), nn.Conv3d(2, 3, 3), nn.Embedding(4, 5, max_norm=1.0)):
        with pytest.raises(SvdiffError, match="'some.layer.weight' belongs to a " + type(original).__name__):
            make_layer("some.layer.weight", original, factorise(original, original.weight), None)


def test_compiles() -> None:
    """`torch.compile` traces through the layers' own gradients."""
    pytest.importorskip("torch._dynamo")
    layer = spectral(nn.Conv2d(4, 6, 3, padding=1))
    assert isinstance(layer, SpectralConv)
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = torch.compile(layer, backend="eager")(x)
    y.sum().backward()
    assert far(y, layer(x).double()) < 1e-6
    assert layer.delta.grad is not None

"""Many concepts in one batch: each layer, the whole pipeline with guidance and text encoder, and training."""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import SpectralDelta, SpectralPipeline, attach, cpu, load_basis
from svdiff.spectral.layers import SpectralLayer, SpectralMatrix
from svdiff.spectral.tokens import token_name
from tests.spectral.conftest import perturb
from tests.spectral.test_layers import CASES, NORMS, far, reference, spectral
from tests.spectral.test_pipeline import make_delta

INDEX = torch.tensor([2, 0, 2, 1])  # the concept of each of four pictures


def several(original: nn.Module, rank: int | None = None) -> tuple[SpectralLayer, torch.Tensor]:
    """A layer with the shifts of three concepts."""
    layer = spectral(original, rank)
    shifts = 0.3 * torch.randn(3, *layer.delta.shape)
    layer.delta.data = shifts.clone()
    layer.batch.assign(INDEX, 3)
    return layer, shifts


@pytest.mark.parametrize("contraction", ["factored", "materialised"])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("name", CASES | NORMS)
def test_each_picture_has_its_own_shifts(
    name: str, rank: int | None, contraction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures and gradients are those of each picture alone, by Eq. 2 in float64."""
    monkeypatch.setattr(SpectralMatrix, "contraction", contraction)
    original, shape = (CASES | NORMS)[name]
    layer, shifts = several(original, rank)
    x = torch.randn(4, *shape[1:], requires_grad=True)
    y = layer(x)
    g = torch.randn_like(y)
    for_x, for_delta = torch.autograd.grad(y, [x, layer.delta], g)
    wanted = torch.zeros(shifts.shape, dtype=torch.float64)
    for place, concept in enumerate(INDEX):
        alone = spectral(original, rank)
        alone.delta.data = shifts[concept]
        one = slice(place, place + 1)
        theirs = reference(original, alone, x[one], g[one])
        assert max(far(a, b) for a, b in zip((y[one], for_x[one]), theirs, strict=False)) < 5e-6
        wanted[concept] += theirs[2]
    assert far(for_delta, wanted) < 5e-6
    with torch.no_grad():
        assert far(layer(x), y.detach().double()) < 2e-6


@pytest.mark.parametrize(
    ("original", "shape"),
    [(nn.Linear(16, 16), (4, 9, 16)), (nn.Conv2d(16, 16, 1), (4, 16, 3, 3)), (nn.GroupNorm(2, 16), (4, 16, 3, 3))],
)
def test_what_a_layer_makes_of_the_shifts_stays_for_the_steps_of_a_batch_and_no_longer(
    original: nn.Module, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, shifts = several(original)
    x = torch.randn(shape)

    def right() -> bool:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(SpectralMatrix, "contraction", "factored")
            layer.batch.made, held = {}, layer.batch.made
            wanted = layer(x.clone())
            layer.batch.made = held
        return torch.allclose(layer(x.clone()), wanted, atol=1e-5)

    with torch.no_grad():
        steps = [right() for _ in range(4)]
        (made,) = layer.batch.made.values()
        assert all(steps)
        assert right()
        assert next(iter(layer.batch.made.values())) is made, "made again although nothing has changed"
        layer.delta.add_(0.1 * torch.randn_like(shifts))
        assert right()
        assert right()
    assert layer(x).requires_grad  # a training step on the same batch takes none of it
    layer.batch.assign(INDEX.flip(0), 3)
    assert not layer.batch.made
    with torch.no_grad():
        assert all(right() for _ in range(4))


@pytest.mark.parametrize("add", [None, 5])
@pytest.mark.parametrize("few", [1 << 24, 0])
@pytest.mark.parametrize(("a", "b"), [(4, 4), (4, 2), (2, 4), (6, 1)])
def test_products_of_pictures_and_of_their_copies(
    a: int, b: int, few: int, add: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_FEW_EACH", few)
    monkeypatch.setattr(cpu, "onednn_is_faster", lambda a, b: not few)
    one, other, bias = torch.randn(a, 7, 3), torch.randn(b, 3, 5), None if add is None else torch.randn(add)
    wanted = torch.stack([one[i % a] @ other[i % b] for i in range(max(a, b))]) + (0 if bias is None else bias)
    with torch.no_grad():
        torch.testing.assert_close(cpu.batched_product(one, other, bias), wanted)


@pytest.mark.parametrize(
    ("original", "shape"),
    [(nn.Linear(16, 16), (4, 9, 16)), (nn.Conv2d(16, 16, 1), (4, 16, 3, 3)), (nn.Conv2d(16, 16, 3), (4, 16, 5, 5))],
)
@pytest.mark.parametrize("copies", [2, 3])
@torch.no_grad()
def test_pictures_that_guidance_repeats_have_the_shifts_of_the_first(
    original: nn.Module, shape: tuple[int, ...], copies: int
) -> None:
    layer, _ = several(original)
    for _ in range(4):  # by factors first, then by weights that are held
        x = torch.randn(shape)
        layer.batch.follow(None, [x], {})
        wanted = layer(x)
        repeated = x.repeat(copies, *[1] * (x.ndim - 1))
        layer.batch.follow(None, [repeated], {})
        torch.testing.assert_close(layer(repeated), wanted.repeat(copies, *[1] * (x.ndim - 1)), atol=1e-5, rtol=1e-5)
    assert all(len(made[1]) == len(INDEX) for made in layer.batch.made.values())


def test_what_every_step_of_a_batch_brings_again_is_multiplied_in_the_first_two_alone() -> None:
    layer, _ = several(nn.Linear(16, 8))
    text, counted, multiply = torch.randn(4, 5, 16), [], layer._multiply
    layer._outside_tree("_multiply", lambda x: counted.append(x) or multiply(x))
    with torch.no_grad():
        wanted = layer(text)
        assert all(torch.equal(layer(text), wanted) for _ in range(4))
        assert len(counted) == 2
        assert torch.equal(layer(text.clone()), wanted)  # the same numbers in another tensor
        assert len(counted) == 3
        for change in (text.mul_, layer(text).mul_, layer(text).mul_, layer.delta.mul_):
            # the input, an answer that is kept or is not yet, and the shifts
            for _ in range(3):
                layer(text)
            change(2.0)
            assert torch.allclose(layer(text), multiply(text), atol=1e-5)
    assert layer(text).requires_grad
    layer.batch.assign(INDEX.flip(0), 3)
    with torch.no_grad():
        assert torch.allclose(layer(text), multiply(text), atol=1e-5)


@pytest.mark.usefixtures("by_onednn")
@pytest.mark.parametrize("name", ["linear wide", "conv", "conv 1x1", "conv few tokens"])
def test_each_picture_has_its_own_shifts_by_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_each_picture_has_its_own_shifts(name, None, "factored", monkeypatch)
    test_each_picture_has_its_own_shifts(name, None, "materialised", monkeypatch)


@pytest.mark.parametrize("rank", [None, 3])
def test_each_text_has_its_own_embeddings(rank: int | None) -> None:
    original = nn.Embedding(30, 8)
    layer, shifts = several(original, rank)
    texts = torch.randint(0, 30, (4, 7))
    positions = torch.arange(7)[None]  # one for all texts
    together = layer(texts), layer(positions)
    for place, concept in enumerate(INDEX):
        alone = spectral(original, rank)
        alone.delta.data = shifts[concept]
        for y, index in zip(together, (texts[place], positions[0]), strict=True):
            assert torch.allclose(y[place], alone(index), atol=1e-6)


@pytest.mark.parametrize("name", ["linear wide", "conv", "conv 1x1", "conv grouped", "layer norm", "group norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    original, shape = (CASES | NORMS)[name]
    layer, _ = several(original)
    x = torch.randn(4, *shape[1:])
    wanted = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer(x).float() - wanted).abs().max() < 0.2
    y = layer.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert layer.delta.dtype == torch.float32
    assert (y.float() - wanted).abs().max() < 0.2


def test_a_layer_refuses_a_batch_that_it_was_not_told_of() -> None:
    layer, _ = several(nn.Linear(6, 5))
    with pytest.raises(SvdiffError, match="batch of 3 in a batch of 4"):
        layer(torch.randn(3, 6))
    layer.batch.assign(None, 3)
    with pytest.raises(SvdiffError, match="nothing says which picture takes which"):
        layer(torch.randn(4, 6))
    with pytest.raises(SvdiffError, match="numbers from 0 to 2"):
        layer.batch.assign([0, 3], 3)
    with pytest.raises(SvdiffError, match="3 concepts at once"):
        layer.state_dict()
    assert (layer.weight.shape, layer.weight.dtype) == ((5, 6), torch.float32)
    assert layer.weight.isnan().all(), "models read its shape; nobody can take it for a weight"


# -- drawing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def personal(tiny_pipe, bases: Path) -> SpectralPipeline:
    """Three concepts of different reach: one with the text encoder, one of two subsets."""
    tiny_pipe.set_progress_bar_config(disable=True)
    deltas = {
        "teapot": make_delta(tiny_pipe, bases, 1),
        "cat": make_delta(tiny_pipe, bases, 2, text=True),
        "dog": make_delta(tiny_pipe, bases, 3, subset="UNet-CA"),
    }
    personal = SpectralPipeline(tiny_pipe, cache=bases, progress=False)
    for name, delta in deltas.items():
        personal.load_delta(delta, name)
    return personal


PROMPTS = ["a dog", "a cat", "a red dog", "a photo of a cat", "a panda"]
MIXES = ["teapot", "cat", {"teapot": 0.7, "cat": 0.3}, None, "dog"]


def draw(pipe, prompts, seeds, **options) -> torch.Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0} | options
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(prompts, generator=generators, output_type="pt", **options).images


@pytest.mark.parametrize("guidance", [pytest.param(1.0, marks=pytest.mark.slow), 3.0])
@pytest.mark.parametrize("order", [pytest.param([0, 1, 2, 3, 4], marks=pytest.mark.slow), [3, 1, 4, 0, 2]])
def test_pictures_are_those_of_one_concept_each_in_any_order(
    personal: SpectralPipeline, guidance: float, order: list[int]
) -> None:
    alone = {}
    for place in order:
        mix = MIXES[place]
        personal.set_deltas([] if mix is None else mix)
        alone[place] = draw(personal.pipe, PROMPTS[place], [place], guidance_scale=guidance)[0]
    personal.set_deltas("dog")
    with personal.concepts([MIXES[i] for i in order]) as pipe:
        together = draw(pipe, [PROMPTS[i] for i in order], order, guidance_scale=guidance)
    for picture, place in zip(together, order, strict=True):
        assert torch.allclose(picture, alone[place], atol=2e-4)
    assert (alone[0] - alone[3]).abs().max() > 1e-2
    assert personal.active == {"dog": 1.0}
    with personal.concepts(["cat"] * 2) as pipe:
        assert torch.allclose(draw(pipe, PROMPTS[1:2] * 2, [1, 1], guidance_scale=guidance)[1], alone[1], atol=2e-4)
    assert torch.allclose(draw(personal.pipe, PROMPTS[4], [4], guidance_scale=guidance)[0], alone[4], atol=1e-5)


def test_several_pictures_a_prompt(personal: SpectralPipeline) -> None:
    seeds = [0, 1, 2, 3]
    with personal.concepts(["teapot", "teapot", "cat", "cat"]) as pipe:
        together = draw(pipe, ["a dog", "a cat"], seeds, num_images_per_prompt=2)
    for place, name in ((0, "teapot"), (2, "cat")):
        personal.set_deltas(name)
        prompt = ["a dog", "a cat"][place // 2]
        alone = draw(personal.pipe, prompt, seeds[place : place + 2], num_images_per_prompt=2)
        assert torch.allclose(together[place : place + 2], alone, atol=2e-4)


def test_a_concept_for_each_prompt_alone_is_refused_where_prompts_have_several_pictures(
    personal: SpectralPipeline,
) -> None:
    for guidance in (1.0, 3.0):
        with (
            pytest.raises(SvdiffError, match="different pictures is drawn with 2 concepts"),
            personal.concepts(["teapot", "cat"]) as pipe,
        ):
            draw(pipe, ["a dog", "a cat"], [0, 1, 2, 3], num_images_per_prompt=2, guidance_scale=guidance)
    assert personal.active == {"teapot": 1.0}
    with pytest.raises(SvdiffError, match="a batch of 3"), personal.concepts(["teapot", "cat"]) as pipe:
        draw(pipe, ["a dog"] * 3, [0, 1, 2])
    with pytest.raises(SvdiffError, match="no delta named 'mouse'"), personal.concepts(["mouse"]):
        pass
    with pytest.raises(SvdiffError, match="give one concept a picture"), personal.concepts([]):
        pass


def test_several_concepts_at_once_have_no_weights_to_save_or_fuse(personal: SpectralPipeline, tmp_path: Path) -> None:
    with personal.concepts(["teapot", "cat"]) as pipe:
        with pytest.raises(SvdiffError, match="2 concepts at once"):
            pipe.unet.save_pretrained(tmp_path)
        for action in (personal.fuse, lambda: personal.set_deltas("cat"), lambda: personal.delete_delta("dog")):
            with pytest.raises(SvdiffError, match="leave `with"):
                action()
        assert draw(pipe, ["a dog", "a cat"], [0, 1]).shape[0] == 2, "a refusal changes nothing"


def test_a_copy_within_a_batch_draws_its_own_batches(personal: SpectralPipeline) -> None:
    with personal.concepts(["teapot", "cat"]) as pipe:
        wanted = draw(pipe, ["a dog", "a cat"], [0, 1])
        other = copy.deepcopy(personal.pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(other, ["a dog", "a cat"], [0, 1]), wanted, atol=1e-5)
    draw(personal.pipe, ["a dog"] * 3, [0, 1, 2])


def test_a_thousand_concepts_are_resident_and_switched_in_milliseconds(personal: SpectralPipeline) -> None:
    rows = personal._rows["cat"]
    for number in range(1000):
        personal._rows[f"resident {number}"] = {prefix: row + 0.01 * number for prefix, row in rows.items()}
    times = []
    for number in range(0, 1000, 5):
        start = time.process_time()
        personal.set_deltas(f"resident {number}")
        times.append(time.process_time() - start)
    # CPU time, since others may use the machine; benchmarks.catalogue measures the real size on an idle one.
    assert statistics.median(times) < 5e-3
    shift = personal._shifts["unet"].layers["conv_in.weight"].delta
    assert torch.equal(shift, rows["unet"][: len(shift)] + 0.01 * 995)


@pytest.mark.parametrize("text", [pytest.param(False, marks=pytest.mark.slow), True])
def test_embeddings_of_special_tokens_go_with_their_concepts_and_into_what_is_saved(
    tiny_pipe, bases: Path, text: bool
) -> None:
    tiny_pipe.set_progress_bar_config(disable=True)
    encoder, token = tiny_pipe.text_encoder, tiny_pipe.tokenizer("sks").input_ids[1]
    personal = SpectralPipeline(tiny_pipe, cache=bases, progress=False)
    deltas = [make_delta(tiny_pipe, bases, seed, text=text) for seed in range(2)]
    for name, delta in zip(("teapot", "cat"), deltas, strict=True):
        change = {token_name("text_encoder", token): torch.randn(16)}
        personal.load_delta(SpectralDelta(delta.tensors, delta.metadata, change), name)
    alone = {}
    for name in ("teapot", "cat", None):
        personal.set_deltas([] if name is None else name)
        alone[name] = draw(tiny_pipe, "a sks dog", [0, 1], num_images_per_prompt=2)
        saved, ids = copy.deepcopy(encoder), torch.tensor([[5, token, 6]])
        plain = type(encoder)(encoder.config)
        plain.load_state_dict(encoder.state_dict())
        assert torch.allclose(plain.eval()(ids)[0], saved(ids)[0], atol=1e-5), name
    assert (alone["teapot"] - alone["cat"]).abs().max() > 1e-2
    with personal.concepts(["cat", "cat", None, None, "teapot", "teapot"]) as pipe:
        together = draw(pipe, ["a sks dog"] * 3, [0, 1] * 3, num_images_per_prompt=2)
        with pytest.raises(SvdiffError, match="concepts at once"):
            encoder.state_dict()
    for place, name in ((0, "cat"), (2, None), (4, "teapot")):
        assert torch.allclose(together[place : place + 2], alone[name], atol=2e-4)
    personal.unload()
    assert torch.allclose(draw(tiny_pipe, "a sks dog", [0, 1], num_images_per_prompt=2), alone[None], atol=2e-4)


# -- training --------------------------------------------------------------------------------------------------


def train(shifts, unet, index, samples, texts, targets, steps: int = 3):
    """Gradients of the first step, and shifts after some: a loss that is each concept's mean over its pictures."""
    optimiser = torch.optim.AdamW(shifts.parameters(), lr=1e-2)
    first = None
    for _ in range(steps):
        if index is not None:
            shifts.assign(index)
        y = unet(samples, torch.tensor([3] * len(samples)), texts).sample
        errors = (y - targets).square().mean((1, 2, 3))
        loss = sum(errors[rows].mean() for rows in _rows_of(index, len(samples)))
        optimiser.zero_grad()
        loss.backward()
        first = first or {name: p.grad.clone() for name, p in shifts.named_parameters()}
        optimiser.step()
    return first


def _rows_of(index, count):
    return [slice(0, count)] if index is None else [index == c for c in index.unique()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [None, pytest.param(3, marks=pytest.mark.slow)])
def test_concepts_trained_together_are_those_trained_alone(
    unet: nn.Module, bases: Path, rank: int | None, checkpointing: bool
) -> None:
    basis = load_basis(unet, bases, progress=False)
    if checkpointing:
        unet.train()
        unet.enable_gradient_checkpointing()
    index = torch.tensor([0, 1, 2, 0, 1, 1])
    samples, texts, targets = torch.randn(6, 4, 8, 8), torch.randn(6, 16, 16), torch.randn(6, 4, 8, 8)
    together = attach(unet, basis, rank=rank, concepts=3)
    gradients = train(together, unet, index, samples, texts, targets)
    deltas = [together.delta(row, concept=f"number {row}") for row in range(3)]
    state = together.state_dict()
    together.load_state_dict(state)
    together.detach()
    for row in range(3):
        alone, mine = attach(unet, basis, rank=rank), index == row
        theirs = train(alone, unet, None, samples[mine], texts[mine], targets[mine])
        for name, gradient in theirs.items():
            assert torch.allclose(gradients[name][row], gradient, atol=1e-5, rtol=1e-3), name
        delta = alone.delta()
        assert deltas[row].metadata["concept"] == f"number {row}"
        for name, shift in delta.tensors.items():
            # Adam divides by the gradient's size, so that a gradient near zero may step either way.
            assert (shift - deltas[row].tensors[name]).abs().mean() < 1e-3, name
        alone.detach()


def test_a_concept_is_loaded_into_its_row_and_leaves_the_others_alone(unet: nn.Module, bases: Path) -> None:
    basis = load_basis(unet, bases, progress=False)
    alone = attach(unet, basis)
    perturb(alone)
    delta = alone.delta()
    alone.detach()
    shifts = attach(unet, basis, concepts=3)
    perturb(shifts, seed=1)
    before = shifts.state_dict()
    shifts.load(delta, row=1)
    for name, parameter in shifts.named_parameters():
        assert torch.equal(parameter[[0, 2]], before[name][[0, 2]])
        assert torch.equal(parameter[1], delta.tensors[f"unet.{name}"])
    assert torch.equal(shifts.delta(1).tensors["unet.conv_in.weight"], delta.tensors["unet.conv_in.weight"])
    with pytest.raises(SvdiffError, match="give the row of one"):
        shifts.delta()
    shifts.assign([0, 1, 1, 2])
    assert unet(torch.randn(4, 4, 8, 8), 3, torch.randn(4, 16, 16)).sample.shape == (4, 4, 8, 8)
    with pytest.raises(SvdiffError, match="concepts is 0"):
        attach(unet, basis, concepts=0)

"""Settings in combination, two steps each through the real trainer: every cell trains, or is refused by name."""

from __future__ import annotations

import copy
from itertools import combinations, product
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from svdiff.config import BaseModelConfig, TrainConfig
from svdiff.data.cutmix import Region
from svdiff.errors import SvdiffError
from svdiff.models import family_of, load_pipeline
from svdiff.models.compatibility import check_compile, check_family
from svdiff.training.batches import Dataset, Examples, LatentImages, Shown
from svdiff.training.loop import Trainer
from svdiff.training.methods import apply_method
from tests.models.tiny import base_settings, make_tiny

pytestmark = pytest.mark.usefixtures("few_levels")

SETTINGS: dict[str, tuple[Any, ...]] = {
    "method": ("svdiff", "full", "lora", "custom-diffusion"),
    "precision": ("no", "bf16"),
    "gradient_checkpointing": (False, True),
    "unmix_weight": (0.0, 1.0),
    "text_encoder": (False, True),
    "accumulation": (1, 2),
}
CELLS = [dict(zip(SETTINGS, values, strict=True)) for values in product(*SETTINGS.values())]
# Of each method and precision one cell is fast, each with other settings beside them.
FAST = [cell for i, cell in enumerate(CELLS) if i % 16 == (i // 16 * 5 + 3) % 16]
REFUSED = {("custom-diffusion", "text_encoder"): "text_encoder: false"}


@pytest.fixture(autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path_factory.getbasetemp() / "scratch"))


def dataset(shape: tuple[int, ...] = (4, 8, 8)) -> Dataset:
    """A mix of two subjects and a picture of one, in turn; each with a prior picture."""
    left, right = Region(0.0, 0.0, 0.5, 1.0), Region(0.5, 0.0, 1.0, 1.0)
    random = torch.Generator().manual_seed(0)
    latents = LatentImages(torch.randn(2, *shape, generator=random), torch.full((2, *shape), 0.1))
    shown = [(Shown("sks", "dog", left), Shown("zwx", "cat", right)), (Shown("sks", "dog"),)]
    return Dataset(
        Examples(latents, ["a sks dog and a zwx cat", "a sks dog"], shown),
        Examples(latents, ["a dog and a cat", "a dog"], [(), ()]),
        lambda sample: (sample % 2, sample % 2),
        [0, 1],
    )


def trainer(pipe: Any, shown: Dataset | None = None, **settings: Any) -> Trainer:
    AcceleratorState._reset_state()
    config = TrainConfig.model_validate({"steps": 2, "batch_size": 2, "lr": 1e-3, "lr_1d": 1e-3} | settings)
    accelerator = Accelerator(mixed_precision=config.precision, cpu=True)
    return Trainer(pipe, apply_method(pipe, config, ["sks", "zwx"]), config, shown or dataset(), accelerator)


def describe(cell: dict[str, Any]) -> str:
    return "-".join([cell["method"], *(f"{k}={v}" for k, v in cell.items() if k != "method" and v not in (0, "no", 1))])


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=() if cell in FAST else pytest.mark.slow) for cell in CELLS], ids=describe
)
def test_every_cell_trains_or_is_refused_by_name(tiny_pipe: Any, cell: dict[str, Any]) -> None:
    settings = cell | {"single_subject_weight": cell["unmix_weight"]}
    for (method, key), message in REFUSED.items():
        if cell["method"] == method and cell[key]:
            with pytest.raises(SvdiffError, match=message):
                trainer(tiny_pipe, **settings)
            return
    base = copy.deepcopy(tiny_pipe.unet.state_dict())
    made = trainer(tiny_pipe, **settings)
    start = made.method.state()
    rows = list(made.run())
    end = made.method.state()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    assert (rows[0].get("loss_unmix", 0.0) > 0) == (cell["unmix_weight"] > 0)
    moved = {name for name in end if not torch.equal(start[name], end[name])}
    assert moved == end.keys()
    made.method.detach()
    assert all(torch.equal(value, tiny_pipe.unet.state_dict()[name]) for name, value in base.items())


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "svdiff" else pytest.mark.slow) for m in SETTINGS["method"]]
)
def test_checkpointing_with_attention_losses_learns_the_same(tiny_pipe: Any, method: str) -> None:
    settings = {"method": method, "unmix_weight": 1.0, "single_subject_weight": 1.0}
    plain = trainer(copy.deepcopy(tiny_pipe), **settings)
    thrifty = trainer(tiny_pipe, **settings, gradient_checkpointing=True)
    for a, b in zip(plain.run(), thrifty.run(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    for name, value in plain.method.state().items():
        torch.testing.assert_close(thrifty.method.state()[name], value, rtol=1e-4, atol=1e-6)


EXTRAS: list[dict[str, Any]] = [
    {"train_token": True, "token_init": "distribution", "lr_token": 1e-3},
    {"ema_decay": 0.9, "min_snr_gamma": 5.0, "noise_offset": 0.1},
    {"optimizer": "prodigy", "lr": 1.0, "lr_1d": 1.0},
]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: next(iter(extra)))
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "svdiff" else pytest.mark.slow) for m in SETTINGS["method"]]
)
def test_every_setting_trains_with_all_others_on(tiny_pipe: Any, method: str, extra: dict[str, Any]) -> None:
    """With bf16, gradient checkpointing, both attention losses, the text encoder and accumulation at once."""
    full = {"precision": "bf16", "gradient_checkpointing": True, "accumulation": 2, "text_encoder": True}
    losses = {"unmix_weight": 1.0, "single_subject_weight": 1.0}
    if method == "custom-diffusion":
        full["text_encoder"] = False
    made = trainer(tiny_pipe, method=method, **full | losses | extra)
    start = made.method.state()
    assert [row["step"] for row in made.run()] == [1, 2]
    with made.averaged():
        end = made.method.state()
    assert all(value.isfinite().all() for value in end.values())
    assert all(not torch.equal(start[name], value) for name, value in end.items())


def test_compiling_is_for_training_passes_alone(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []

    def compile(call: Any) -> Any:
        return lambda latents, *args, **kwargs: passes.append(len(latents)) or call(latents, *args, **kwargs)

    monkeypatch.setattr(torch, "compile", compile)
    plain = [row["loss"] for row in trainer(copy.deepcopy(tiny_pipe)).run()]
    assert not passes
    made = trainer(tiny_pipe, compile=True)
    made.fixed_noise_loss()
    assert not passes
    assert [row["loss"] for row in made.run()] == plain
    assert passes == [4, 4]  # two pictures and two prior images, two steps
    made.fixed_noise_loss()
    assert len(passes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_compiled_training_learns_the_same(tiny_pipe: Any, checkpointing: bool) -> None:
    plain = trainer(copy.deepcopy(tiny_pipe), gradient_checkpointing=checkpointing)
    compiled = trainer(tiny_pipe, gradient_checkpointing=checkpointing, compile=True)
    for a, b in zip(plain.run(), compiled.run(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for name, value in plain.method.state().items():
        torch.testing.assert_close(compiled.method.state()[name], value, rtol=1e-2, atol=1e-5)


def test_compiling_is_refused_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(device: str, match: str, **settings: Any) -> None:
        with pytest.raises(SvdiffError, match=match):
            check_compile(TrainConfig(compile=True, **settings), torch.device(device))

    refused("cpu", "attention maps are recorded", unmix_weight=1.0)
    refused("mps", "not tried on mps")
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused("cpu", "needs a C.. compiler on a CPU; none of no-such-compiler is on PATH")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused("cuda", "needs the package triton")


FAMILIES = ("sdxl", "sd3.5", "flux", "flux2-klein")
FAMILY_SETTINGS = {"family": FAMILIES} | SETTINGS


def pairwise(settings: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few cells in which every two values of two settings meet: greedily the cell with most pairs that are still missing."""
    cells = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
    pairs = {i: set(combinations(cell.items(), 2)) for i, cell in enumerate(cells)}
    missing, chosen = set().union(*pairs.values()), []
    while missing:
        best = max(pairs, key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(cells[best])
    return chosen


FAMILY_CELLS = [dict(zip(FAMILY_SETTINGS, values, strict=True)) for values in product(*FAMILY_SETTINGS.values())]
FAMILY_PAIRWISE = pairwise(FAMILY_SETTINGS)
FAST_FAMILIES = ("sdxl", "sd3.5")  # one with cross-attention and one with joint attention
FAMILY_FAST = [cell for cell in FAMILY_PAIRWISE if cell["family"] in FAST_FAMILIES]


@pytest.fixture(scope="session")
def family_pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loads a copy of a family's tiny base, which is made once."""
    loaded: dict[str, Any] = {}

    def load(family: str) -> Any:
        if family not in loaded:
            folder = make_tiny(family, tmp_path_factory.mktemp(family))
            loaded[family] = load_pipeline(BaseModelConfig(**base_settings(family, folder)))
        return copy.deepcopy(loaded[family])

    return load


def refusal(cell: dict[str, Any]) -> str | None:
    """Words of the sentence that refuses a cell, None where it trains."""
    joint = cell["family"] != "sdxl"
    if joint and cell["method"] == "custom-diffusion":
        return "trains W\\^K and W\\^V of cross-attention, and .* has joint attention"
    if joint and cell["unmix_weight"]:
        return "is a loss on cross-attention maps, and .* has joint attention"
    if cell["family"] == "flux2-klein" and cell["text_encoder"]:
        return "is a language model"
    if cell["method"] == "custom-diffusion" and cell["text_encoder"]:
        return "text_encoder: false"
    return None


@pytest.mark.parametrize(
    "family_name", [pytest.param(f, marks=() if f in FAST_FAMILIES else pytest.mark.slow) for f in FAMILIES]
)
def test_every_family_trains_pictures_of_several_shapes(family_pipe: Any, family_name: str) -> None:
    pipe = family_pipe(family_name)
    channels, side, _ = family_of(pipe).latent_shape
    random = torch.Generator().manual_seed(0)
    means = [
        torch.randn(channels, side // 2, side, generator=random),
        torch.randn(channels, side, side, generator=random),
    ]
    latents = LatentImages(means, [torch.full_like(mean, 0.1) for mean in means])
    square = LatentImages(means[1][None], torch.full_like(means[1], 0.1)[None])
    shown = Dataset(
        Examples(latents, ["a sks dog"] * 2, [(Shown("sks", "dog"),)] * 2),
        Examples(square, ["a dog"], [()]),
        lambda sample: (sample % 2, 0),
        [0, 1],
        lambda number, size: [number % 2] * size,
    )
    made = trainer(pipe, shown)
    before = made.fixed_noise_loss()
    assert [row["step"] for row in made.run()] == [1, 2]
    assert 0 < made.fixed_noise_loss() != before


def test_pairwise_cells_hold_every_pair_of_values() -> None:
    assert len(FAMILY_PAIRWISE) < len(FAMILY_CELLS) / 8
    for a, b in combinations(FAMILY_SETTINGS, 2):
        met = {(cell[a], cell[b]) for cell in FAMILY_PAIRWISE}
        assert met == set(product(FAMILY_SETTINGS[a], FAMILY_SETTINGS[b]))


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=() if cell in FAMILY_FAST else pytest.mark.slow) for cell in FAMILY_CELLS],
    ids=lambda cell: f"{cell['family']}-{describe({k: v for k, v in cell.items() if k != 'family'})}",
)
def test_every_cell_of_every_family_trains_or_is_refused_by_name(family_pipe: Any, cell: dict[str, Any]) -> None:
    pipe = family_pipe(cell["family"])
    family = family_of(pipe)
    settings = {key: value for key, value in cell.items() if key != "family"}

    def make() -> Trainer:
        check_family(family, TrainConfig.model_validate(settings))
        return trainer(pipe, dataset(family.latent_shape), **settings)

    if message := refusal(cell):
        with pytest.raises(SvdiffError, match=message):
            make()
        return
    base = copy.deepcopy(family.network.state_dict())
    made = make()
    start = made.method.state()
    rows = list(made.run())
    assert [row["step"] for row in rows] == [1, 2]
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    end = made.method.state()
    assert {value.dtype for value in end.values()} == {torch.float32}
    # A last block's text, and what a text encoder's penultimate layer does not need, reach no picture.
    assert sum(not torch.equal(start[name], end[name]) for name in end) > 0.75 * len(end)
    made.method.detach()
    assert all(torch.equal(value, family.network.state_dict()[name]) for name, value in base.items())

"""The loop: batches as functions of (seed, step), and resumed runs equal to uninterrupted ones bit for bit."""

from __future__ import annotations

import io
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from svdiff.config import BaseModelConfig, TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import load_pipeline
from svdiff.models.compatibility import check_family
from svdiff.training.batches import Dataset, Examples, LatentImages, Shown, draw_indices, generator
from svdiff.training.loop import Trainer, draw_noise
from svdiff.training.losses import min_snr_weights
from svdiff.training.methods import apply_method
from svdiff.training.optimizers import check_optimizer
from svdiff.training.resume import load_state, save_state
from svdiff.training.selection import best_step, is_over, kept_steps

METHODS = ("svdiff", "full", "lora", "custom-diffusion")
METHODS_SLOWLY = [pytest.param(m, marks=() if m == "svdiff" else pytest.mark.slow) for m in METHODS]
STEPS = 4


@pytest.fixture(autouse=True)
def _own_scratch(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path_factory.getbasetemp() / "scratch"))


def examples(prompt: str, count: int, seed: int, *shown: Shown) -> Examples:
    random = torch.Generator().manual_seed(seed)
    mean, deviation = (draw(count, 4, 8, 8, generator=random) for draw in (torch.randn, torch.rand))
    return Examples.alike(LatentImages(mean, 0.1 * deviation), prompt, *shown)


def dataset(config: TrainConfig) -> Dataset:
    """Three pictures of a dog, and five prior images of its class where the training wants any."""

    def order(sample: int) -> tuple[int, int]:
        return tuple(
            draw_indices(count, sample, 1, config.seed, name)[0] for name, count in (("instance", 3), ("prior", 5))
        )

    prior = examples("a dog", 5, 2) if config.prior_weight > 0 else None
    return Dataset(examples("a sks dog", 3, 1, Shown("sks", "dog")), prior, order, [0, 1, 2])


def trainer_on(base: Path, scaler: torch.amp.GradScaler | None = None, **settings: object) -> Trainer:
    """A fresh pipeline and trainer, as a new process would make them."""
    AcceleratorState._reset_state()
    config = TrainConfig.model_validate(
        {"steps": STEPS, "lr": 5e-3, "lr_1d": 5e-3, "accumulation": 2, "schedule": "cosine", "batch_size": 2} | settings
    )
    torch.manual_seed(int(torch.seed() % 1000))  # the global generator must not matter
    pipe = load_pipeline(BaseModelConfig(model=str(base)))
    accelerator = Accelerator(mixed_precision=config.precision, cpu=True)
    if scaler is not None:  # as `Accelerator` prepares itself for fp16 on a GPU
        accelerator.scaler, accelerator.native_amp, accelerator.state._mixed_precision = scaler, True, "fp16"
    return Trainer(pipe, apply_method(pipe, config, ["sks"]), config, dataset(config), accelerator)


def run(trainer: Trainer, until: int = STEPS) -> list[dict[str, float]]:
    rows = []
    for row in trainer.run():
        rows.append({key: value for key, value in row.items() if key != "seconds"})
        if trainer.step == until:
            break
    return rows


def through_a_file(state: dict, folder: Path) -> dict:
    """The state as the next process reads it."""
    save_state(folder / "state.pt", state)
    loaded = load_state(folder / "state.pt")
    assert loaded is not None
    return loaded


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", METHODS_SLOWLY)
def test_resuming_twice_equals_training_straight(tiny_base: Path, tmp_path: Path, method: str) -> None:
    straight = trainer_on(tiny_base, method=method)
    start = straight.method.state()
    rows = run(straight)
    assert not any(torch.equal(start[name], value) for name, value in straight.method.state().items())

    resumed_rows: list[dict[str, float]] = []
    state = None
    for until in (1, 2, STEPS):
        part = trainer_on(tiny_base, method=method)
        if state is not None:
            part.load_state(state)
        resumed_rows += run(part, until)
        state = through_a_file(part.state(), tmp_path)
    assert resumed_rows == rows
    assert same_bits(part.method.state(), straight.method.state())
    assert part.fixed_noise_loss() == straight.fixed_noise_loss()


@pytest.mark.slow
def test_resuming_with_text_encoder_and_warmup(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"text_encoder": True, "schedule": "linear", "warmup": 2, "accumulation": 1}
    straight = trainer_on(tiny_base, **settings)
    rows = run(straight)
    part = trainer_on(tiny_base, **settings)
    head = run(part, 2)
    again = trainer_on(tiny_base, **settings)
    again.load_state(through_a_file(part.state(), tmp_path))
    assert head + run(again) == rows
    assert same_bits(again.method.state(), straight.method.state())


@pytest.mark.parametrize("method", METHODS_SLOWLY[:3])
def test_the_text_encoder_is_trained_when_asked(tiny_base: Path, method: str) -> None:
    trainer = trainer_on(tiny_base, method=method, text_encoder=True, accumulation=1)
    start = trainer.method.state()
    run(trainer, 2)  # LoRA's A moves from the second step on
    end = trainer.method.state()
    text = [name for name in end if name.startswith("text_encoder.")]
    moved = [name for name in text if not torch.equal(start[name], end[name])]
    # Rows of words and positions that do not occur have no gradient, but every layer has.
    assert len(moved) == len(text) > 0


def test_two_learning_rates(tiny_base: Path) -> None:
    trainer = trainer_on(tiny_base, lr=1e-2, lr_1d=0.0, schedule="constant", accumulation=1)
    run(trainer, 2)
    assert all(p.abs().max() > 0 for p in trainer.method.parameters()["lr"])
    assert all(p.abs().max() == 0 for p in trainer.method.parameters()["lr_1d"])


def test_accumulation_is_the_mean_gradient_of_its_batches(tiny_base: Path) -> None:
    """One step on two batches equals AdamW on the mean of their two gradients, taken separately."""
    trainer = trainer_on(tiny_base, accumulation=2, schedule="constant")
    parameters = [p for group in trainer.method.parameters().values() for p in group]
    means = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    for batch in (0, 1):
        for mean, gradient in zip(means, torch.autograd.grad(trainer._loss(batch).total, parameters), strict=True):
            mean += gradient.double() / 2
    norm = torch.sqrt(sum(mean.square().sum() for mean in means))
    clip = min(1.0, trainer.config.max_grad_norm / float(norm))
    run(trainer, 1)
    for parameter, mean in zip(parameters, means, strict=True):
        gradient = mean * clip
        expected = -5e-3 * gradient / (gradient.abs() + 1e-8)  # AdamW's first step
        reliable = gradient.abs() > 1e-6
        torch.testing.assert_close(parameter.double()[reliable], expected[reliable], rtol=1e-3, atol=1e-7)


def test_batches_are_functions_of_seed_and_step(tiny_base: Path) -> None:
    trainer = trainer_on(tiny_base)
    losses = [trainer._loss(batch).total.item() for batch in (0, 1, 2, 7)]
    assert [trainer._loss(batch).total.item() for batch in (7, 2, 1, 0)] == losses[::-1]
    assert len(set(losses)) == 4
    assert trainer_on(tiny_base, seed=1)._loss(0).total.item() != losses[0]


def test_every_epoch_shows_every_picture_once() -> None:
    sequence = [i for position in range(0, 30, 2) for i in draw_indices(5, position, 2, 3, "instance")]
    epochs = [tuple(sequence[start : start + 5]) for start in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(epochs)) > 1
    assert sequence == draw_indices(5, 0, 30, 3, "instance")
    assert sequence != draw_indices(5, 0, 30, 4, "instance")
    assert not torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "b")))


def test_latents_are_draws_from_the_posterior() -> None:
    latents = LatentImages(torch.full((2, 1, 50, 50), 3.0), torch.full((2, 1, 50, 50), 0.5))
    drawn = latents.draw([0, 1, 1], generator("z"))
    assert drawn.shape == (3, 1, 50, 50)
    assert float(drawn.mean()) == pytest.approx(3.0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(0.5, abs=0.02)
    assert not torch.equal(drawn[1], drawn[2])


@pytest.mark.parametrize("method", METHODS_SLOWLY)
def test_mixed_precision_keeps_trainables_in_float32_also_after_resuming(
    tiny_base: Path, tmp_path: Path, method: str
) -> None:
    trainer = trainer_on(tiny_base, method=method, precision="bf16", text_encoder=method == "svdiff")
    seen: list[torch.dtype] = []
    trainer.pipe.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    run(trainer, 2)
    assert set(seen) == {torch.bfloat16}
    state = through_a_file(trainer.state(), tmp_path)
    resumed = trainer_on(tiny_base, method=method, precision="bf16", text_encoder=method == "svdiff")
    resumed.load_state(state)
    run(resumed)
    run(trainer)
    assert same_bits(resumed.method.state(), trainer.method.state())
    for parameters in resumed.method.parameters().values():
        assert all(p.dtype == torch.float32 for p in parameters)
        for p in parameters:
            assert all(value.dtype == torch.float32 for value in resumed.optimizer.state[p].values())


def test_gradient_checkpointing_changes_nothing(tiny_base: Path) -> None:
    plain, thrifty = (trainer_on(tiny_base, gradient_checkpointing=on) for on in (False, True))
    assert run(plain, 2) == run(thrifty, 2)
    assert same_bits(plain.method.state(), thrifty.method.state())


@pytest.mark.slow
def test_half_precision_gradients_are_unscaled_once(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler of fp16 refuses to be asked twice a step; the CPU's stands in for the GPU's, on float32 arithmetic."""
    monkeypatch.setattr(Accelerator, "autocast", lambda self, **_: nullcontext())
    plain = trainer_on(tiny_base, accumulation=1)
    run(plain, 3)
    scaled = trainer_on(tiny_base, torch.amp.GradScaler("cpu", init_scale=64.0), accumulation=1)
    run(scaled, 2)
    resumed = trainer_on(tiny_base, torch.amp.GradScaler("cpu", init_scale=1.0), accumulation=1)
    resumed.load_state(scaled.state())
    assert resumed.accelerator.scaler.get_scale() == 64.0
    run(resumed, 3)
    for name, value in plain.method.state().items():
        torch.testing.assert_close(resumed.method.state()[name], value, rtol=1e-3, atol=1e-5)


def test_prompts_reach_the_network_as_tokens_of_the_right_pictures(tiny_base: Path) -> None:
    """Each half of a batch is denoised under its own prompt: instance first, prior behind."""
    trainer = trainer_on(tiny_base)
    seen: list[Tensor] = []
    trainer.pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    trainer._loss(0)
    expected = torch.cat(
        [trainer.family.encode([p])["encoder_hidden_states"] for p in ("a sks dog", "a sks dog", "a dog", "a dog")]
    )
    assert torch.equal(seen[0], expected)


def test_states_hold_tensors_and_numbers_only(tiny_base: Path) -> None:
    buffer = io.BytesIO()
    torch.save(trainer_on(tiny_base).state(), buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


# ---- what every trainer has ----


def test_min_snr_weights_by_hand() -> None:
    signal = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    noise = (1 - signal.square()).sqrt()
    for prediction, below in (
        ("epsilon", lambda snr: snr),
        ("v_prediction", lambda snr: snr + 1),
        ("sample", lambda _: 1),
    ):
        expected = [
            min(a**2 / b**2, 0.2) / below(a**2 / b**2) for a, b in zip(signal.tolist(), noise.tolist(), strict=True)
        ]
        assert min_snr_weights(signal, noise, 0.2, prediction).tolist() == pytest.approx(expected)
    with pytest.raises(SvdiffError, match="min_snr_gamma"):
        min_snr_weights(signal, noise, 5.0, "flow")


def test_min_snr_weights_every_sample_of_both_terms(tiny_base: Path) -> None:
    plain, weighted = trainer_on(tiny_base), trainer_on(tiny_base, min_snr_gamma=1e9)
    assert weighted._loss(0).total.item() == pytest.approx(plain._loss(0).total.item(), rel=1e-5)  # γ above all SNR: 1
    assert trainer_on(tiny_base, min_snr_gamma=1e-4)._loss(0).total < 0.9 * plain._loss(0).total


def test_noise_offset_shifts_whole_channels() -> None:
    latents = torch.zeros(2, 4, 16, 16)
    plain, shifted = (draw_noise(latents, offset, generator("n")) for offset in (0.0, 0.5))
    difference = shifted - plain
    assert difference.flatten(2).std(2).max() < 1e-6
    assert difference[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.6)


def test_the_moving_average_is_validated_and_resumed(tiny_base: Path, tmp_path: Path) -> None:
    straight = trainer_on(tiny_base, ema_decay=0.9, schedule="constant")
    means = [torch.zeros_like(p) for p in straight.parameters]
    for step, _ in enumerate(straight.run()):
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (10 + step))
        means = [decay * m + (1 - decay) * p.detach() for m, p in zip(means, straight.parameters, strict=True)]
    trained = [p.detach().clone() for p in straight.parameters]
    with straight.averaged():
        for mean, parameter in zip(means, straight.parameters, strict=True):
            torch.testing.assert_close(parameter.detach(), mean, rtol=1e-4, atol=1e-7)
        averaged = straight.fixed_noise_loss()
    assert all(torch.equal(a, b.detach()) for a, b in zip(trained, straight.parameters, strict=True))
    assert averaged != straight.fixed_noise_loss()
    part = trainer_on(tiny_base, ema_decay=0.9, schedule="constant")
    run(part, 2)
    again = trainer_on(tiny_base, ema_decay=0.9, schedule="constant")
    again.load_state(through_a_file(part.state(), tmp_path))
    run(again)
    with straight.averaged(), again.averaged():
        assert same_bits(again.method.state(), straight.method.state())


def test_text_encoder_and_token_have_rates_of_their_own(tiny_base: Path) -> None:
    settings = {"text_encoder": True, "train_token": True, "lr_text_encoder": 1e-4, "lr_token": 2e-4, "accumulation": 1}
    trainer = trainer_on(tiny_base, schedule="constant", **settings)
    before = trainer.method.state()
    run(trainer, 1)
    moved = {name: (value - before[name]).abs().max().item() for name, value in trainer.method.state().items()}
    encoder = [d for n, d in moved.items() if n.startswith("text_encoder.") and "norm" not in n and "special" not in n]
    assert max(encoder) == pytest.approx(1e-4, rel=0.01)  # AdamW's first step is the rate
    [token] = [d for n, d in moved.items() if "special" in n]
    assert token == pytest.approx(2e-4, rel=0.01)
    assert max(d for n, d in moved.items() if n.startswith("unet.")) == pytest.approx(5e-3, rel=0.01)


@pytest.mark.slow
def test_prodigy_trains_and_resumes(tiny_base: Path, tmp_path: Path) -> None:
    pytest.importorskip("prodigyopt")
    straight = trainer_on(tiny_base, optimizer="prodigy", lr=1.0, lr_1d=1.0, schedule="constant")
    rows = run(straight)
    part = trainer_on(tiny_base, optimizer="prodigy", lr=1.0, lr_1d=1.0, schedule="constant")
    head = run(part, 2)
    again = trainer_on(tiny_base, optimizer="prodigy", lr=1.0, lr_1d=1.0, schedule="constant")
    again.load_state(through_a_file(part.state(), tmp_path))
    assert head + run(again) == rows
    assert same_bits(again.method.state(), straight.method.state())


def test_an_optimizer_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdiff.training.optimizers.find_spec", lambda _: None)
    for name, package in (("adamw-8bit", "bitsandbytes"), ("prodigy", "prodigyopt")):
        with pytest.raises(SvdiffError, match=f"train.optimizer is {name}.*pip install {package}"):
            check_optimizer(name)
    check_optimizer("adamw")


def test_the_best_delta_and_the_end_follow_the_written_rule() -> None:
    losses = {0: 0.1, 2: 0.5, 4: 0.3, 6: 0.3, 8: 0.4}  # step 0 is the base, whatever its loss
    assert best_step(losses) == 4
    assert kept_steps(losses, 2) == {4, 6, 8}
    assert [is_over(losses, patience) for patience in (1, 2, 3, None)] == [True, True, False, False]
    assert not is_over({0: 0.1, 2: 0.5}, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_snr_gamma": 5.0}, r"train\.min_snr_gamma is 5\.0, and Flow predicts a flow"),
        ({"token_init": "distribution"}, r"train\.token_init is distribution, and the text encoder of Flow"),
    ],
)
def test_what_a_flow_without_a_trainable_text_encoder_has_no_place_for(settings: dict, message: str) -> None:
    family = SimpleNamespace(title="Flow", attention="joint", encoder_names=(), flow=True)
    with pytest.raises(SvdiffError, match=message):
        check_family(family, TrainConfig(**settings))  # type: ignore[arg-type]


def test_a_validation_holds_no_more_pictures_at_a_time_than_some_batches(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of however many it has; the loss is that of all of them at once."""
    made = trainer_on(tiny_base, batch_size=1)
    made.dataset = replace(made.dataset, instance=examples("a sks dog", 10, 1), validation=list(range(10)))
    assert {len(one.noise) for one in made.fixed_noise_passes()} == {4, 2}
    loss = made.fixed_noise_loss()
    monkeypatch.setattr("svdiff.training.loop.VALIDATION_BATCHES", 10)
    assert {len(one.noise) for one in made.fixed_noise_passes()} == {10}
    assert made.fixed_noise_loss() == pytest.approx(loss, rel=1e-5)

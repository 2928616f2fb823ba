"""The training loop: draws a batch, takes the loss of Eq. 3 and makes an optimiser step, for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Conditions, family_of
from svdiff.sampling import Job
from svdiff.training.attention_losses import AttentionLosses
from svdiff.training.batches import Batch, Dataset, draw_batch, generator, stacked
from svdiff.training.losses import Loss, denoising_loss, min_snr_weights, prior_preservation_loss
from svdiff.training.methods import Method
from svdiff.training.optimizers import make_optimizer

if TYPE_CHECKING:
    from PIL.Image import Image

VALIDATION_LEVELS = 8  # timesteps, evenly spread, at which the fixed-noise loss is taken
VALIDATION_BATCHES = 4  # batches of training in a pass of it

T = TypeVar("T")
Row: TypeAlias = "dict[str, float]"
"""A row of the curve."""
Asking: TypeAlias = "Generator[int | list[Job], Any, T]"
"""Training that asks for what the network does, so that several can share its passes. It yields the number of a batch, and goes
on when the loss is sent to it and the gradients of that are in place; or it yields jobs, and is sent a `Validation`."""
Validation: TypeAlias = "tuple[float, list[Image]]"
"""The loss at fixed noise, and pictures."""


class Diverged(SvdiffError):
    """A training whose numbers are no longer finite; raised before the step that would spoil the parameters."""


class Pass(NamedTuple):
    """What one pass of the network is asked."""

    batch: Batch
    whole: Batch  # of all processes, of which `batch` is this one's share
    noise: Tensor
    timesteps: Tensor


class Trainer:
    """Optimiser steps on Eq. 3, with attention losses where asked.

    Step n is a pure function of (seed, n) and of the state after step n − 1.
    """

    def __init__(
        self,
        pipe: Any,
        method: Method,
        config: TrainConfig,
        dataset: Dataset,
        accelerator: Accelerator,
    ) -> None:
        self.pipe, self.method, self.config, self.accelerator = pipe, method, config, accelerator
        self.dataset, self.family = dataset, family_of(pipe)
        self.attention_losses = AttentionLosses(pipe, config)
        self._groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": rate_of(config, name), "name": name}
            for name, parameters in method.parameters().items()
            if parameters
        ]
        self.parameters = [parameter for group in self._groups for parameter in group["params"]]
        self.optimizer = accelerator.prepare(make_optimizer(config.optimizer, self._groups))
        # Not prepared: accelerate steps a prepared schedule once for every process.
        self.schedule = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            self.optimizer.optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        self.average = None if config.ema_decay is None else EMAModel(self.parameters, decay=config.ema_decay)
        self.step = 0
        self._conditions: dict[str, Conditions | None] = {}
        network: Any = self.family.network
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
            network.train()  # diffusers checkpoints in training mode only
        self._compiled = torch.compile(network._call_impl) if config.compile else None

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "method": {name: tensor.detach().cpu() for name, tensor in self.method.state().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def load_state(self, state: dict) -> None:
        """Continue after the step at which `state` was taken."""
        self.method.load_state(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)  # states are read on the CPU
        self.step = state["step"]

    def run(self) -> Iterator[Row]:
        """Train to the end, yielding the row of the curve after every step."""
        while self.step < self.config.steps:
            yield self._answered(self.take_step())

    def _answered(self, asking: Asking[Row]) -> Row:
        """Answer what a step asks until its end; returns its row."""
        loss = None
        with closing(asking):
            try:
                while True:
                    number = asking.send(loss)
                    loss = self.answer(cast("int", number))  # a step asks for no pictures
            except StopIteration as end:
                row: Row = end.value
                return row

    def take_step(self) -> Asking[Row]:
        """Make one optimiser step; returns the row of the curve."""
        started = time.perf_counter()
        parts: Row = {}
        for micro in range(self.config.accumulation):
            loss = yield self.step * self.config.accumulation + micro
            for name, part in _named_parts(loss).items():
                parts[name] = parts.get(name, 0.0) + part / self.config.accumulation
        parts = mean_over_processes(self.accelerator, self.parameters, parts)
        self._check_finite("loss", parts["loss"])
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if self.accelerator.scaler is None:  # the scaler of fp16 leaves such steps out by itself
            self._check_finite("gradient", float(norm))
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.step(self.parameters)
        self.step += 1
        return {"step": self.step, **parts, "lr": rate, "seconds": time.perf_counter() - started}

    def answer(self, number: int) -> Loss:
        """The loss of batch `number`, its share of the step's gradients made."""
        # Recording goes on in the backward pass, where gradient checkpointing runs the layers again.
        with self.attention_losses.recording():
            loss = self._loss(number)
            self.accelerator.backward(loss.total / self.config.accumulation)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the moving averages in the place of what is trained, where the configuration asks for them."""
        if self.average is None or self.step == 0:
            yield
            return
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)

    def _check_finite(self, what: str, value: float) -> None:
        """Raise Diverged unless `value` is a number."""
        if not math.isfinite(value):
            config = self.config
            rates = ", ".join(f"train.{group['name']} {rate_of(config, group['name']):g}" for group in self._groups)
            raise Diverged(
                f"the {what} of step {self.step + 1} is {value}: training by method {config.method} diverged at rates "
                f"{rates}. Lower the rates (a tenth is a good first try), or raise train.warmup"
            )

    def _loss(self, number: int) -> Loss:
        """Eq. 3 on batch `number`, with attention losses where asked."""
        passes = self.draw(number)
        with self._compiling():
            answers = [self._predict(one.batch.latents, one.noise, one.timesteps, one.batch.prompts) for one in passes]
        return self.loss_of(passes, answers)

    def draw(self, number: int) -> list[Pass]:
        """What the network is asked in batch `number`: one pass, or two where prior samples have another shape."""
        config, processes = self.config, self.accelerator.num_processes
        random = generator(config.seed, "batch", number)
        passes = []
        for whole in draw_batch(self.dataset, number, config.batch_size * processes, random):
            noise = draw_noise(whole.latents, config.noise_offset, random)
            timesteps = self.family.objective.drawn(len(noise), random).to(noise.device)
            rows = own_rows(whole, self.accelerator.process_index, processes)
            passes.append(Pass(whole.take(rows), whole, noise[rows], timesteps[rows]))
        return passes

    def loss_of(self, passes: Sequence[Pass], answers: Sequence[tuple[Tensor, Tensor]]) -> Loss:
        """Eq. 3 on what the network predicted in each pass and what would be true, with attention losses where asked."""
        loss, *of_prior = (self._loss_of_pass(one, *answer) for one, answer in zip(passes, answers, strict=True))
        if not of_prior:
            return loss
        [prior] = of_prior
        return Loss(loss.total + self.config.prior_weight * prior.total, loss.instance, prior.total)

    def _loss_of_pass(self, one: Pass, predicted: Tensor, target: Tensor) -> Loss:
        config, batch, weights = self.config, one.batch, None
        if config.min_snr_gamma is not None:
            objective = self.family.objective
            signal_and_noise = objective.signal_and_noise(one.timesteps)
            weights = min_snr_weights(*signal_and_noise, config.min_snr_gamma, objective.prediction)
        loss = prior_preservation_loss(predicted, target, batch.instances, config.prior_weight, weights, batch.masks)
        return self.attention_losses.add_to(loss, batch, one.whole)

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Passes of the network are compiled, where the configuration asks for it; those of validations are not, which have
        other shapes."""
        network: Any = self.family.network
        try:
            network._compiled_call_impl = self._compiled
            yield
        finally:
            network._compiled_call_impl = None

    def _predict(self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        objective = self.family.objective
        noisy = objective.noised(latents, noise, timesteps)
        with self.accelerator.autocast():
            predicted = self.family.predict(noisy, timesteps, self.encoded(prompts))
        return predicted, objective.target(latents, noise, timesteps)

    def encoded(self, prompts: list[str]) -> Conditions:
        """What prompts mean to the network; each is encoded once, those whose meaning is trained once a batch."""
        trained = [prompt for prompt in dict.fromkeys(prompts) if self.fixed(prompt) is None]
        return conditions_of(prompts, self.fixed, trained, self.family.encode(trained) if trained else None)

    def fixed(self, prompt: str) -> Conditions | None:
        """What a prompt means to the network all through the training; None for one whose meaning is trained."""
        if prompt not in self._conditions:
            with (
                torch.enable_grad()
            ):  # asked of the result: what is trained need not be among a text encoder's own parameters
                found = self.family.encode([prompt])
            trained = any(condition.requires_grad for condition in found.values())
            self._conditions[prompt] = None if trained else found
        return self._conditions[prompt]

    def knows(self, prompts: Sequence[str]) -> bool:
        """Whether `fixed` has an answer for all prompts without asking the text encoders."""
        return self._conditions.keys() >= set(prompts)

    def fixed_noise_passes(self) -> list[Pass]:
        """What the network is asked for `fixed_noise_loss`: validation pictures of one shape, at each level.

        A pass holds at most `VALIDATION_BATCHES` batches of training: without gradients they take no more memory than one with.
        """
        instance, passes = self.dataset.instance, []
        size = VALIDATION_BATCHES * self.config.batch_size
        for group in instance.latents.by_shape(self.dataset.validation):
            for level in range(VALIDATION_LEVELS):
                shape = (len(group), *instance.latents.mean[group[0]].shape)
                noise = torch.randn(shape, generator=generator("fixed noise", level))
                timestep = self.family.objective.level((level + 0.5) / VALIDATION_LEVELS)
                for start in range(0, len(group), size):
                    batch = self._validation_batch(group[start : start + size])
                    device = batch.latents.device
                    timesteps = torch.full((batch.instances,), timestep, device=device)
                    passes.append(Pass(batch, batch, noise[start : start + size].to(device), timesteps))
        return passes

    def _validation_batch(self, indices: Sequence[int]) -> Batch:
        instance = self.dataset.instance
        mean, prompts = stacked(instance.latents.mean, indices), [instance.prompts[i] for i in indices]
        masks = None if instance.masks is None else stacked(instance.masks, indices).to(mean.device)
        return Batch(mean, prompts, [() for _ in indices], len(indices), masks)

    @torch.no_grad()
    def fixed_noise_loss(self) -> float:
        """Eq. 1 on the validation pictures at fixed noise and evenly spread timesteps.

        The training loss jumps with its random timesteps; this one can be compared from step to step.
        """
        passes = self.fixed_noise_passes()
        answers = [self._predict(one.batch.latents, one.noise, one.timesteps, one.batch.prompts)[0] for one in passes]
        return self.fixed_noise_loss_of(passes, answers)

    def fixed_noise_loss_of(self, passes: Sequence[Pass], predicted: Sequence[Tensor]) -> float:
        """That loss, from what the network predicted in `fixed_noise_passes`. Raises Diverged if it is not finite."""
        losses, count = [], len(self.dataset.validation)
        for (batch, _, noise, timesteps), found in zip(passes, predicted, strict=True):
            target = self.family.objective.target(batch.latents, noise, timesteps)
            losses.append(denoising_loss(found, target, masks=batch.masks) * batch.instances / count)
        loss = float(torch.stack(losses).sum()) / VALIDATION_LEVELS
        self._check_finite("loss at fixed noise before", loss)
        return loss


def _named_parts(loss: Loss) -> dict[str, float]:
    """Columns of the curve."""
    parts = {"loss": loss.total, "loss_instance": loss.instance, "loss_prior": loss.prior}
    parts |= {f"loss_{name}": part for name, part in loss.extra.items()}
    return {name: float(part) for name, part in parts.items()}


def conditions_of(
    asked: Sequence[T], fixed: Callable[[T], Conditions | None], trained: Sequence[T], found: Conditions | None
) -> Conditions:
    """Conditions with a row for each prompt `asked`: the one that is `fixed`, else its row of `found`, those of `trained`."""
    rows = [known for one in dict.fromkeys(asked) if (known := fixed(one)) is not None]
    order = [*trained, *(one for one in dict.fromkeys(asked) if fixed(one) is not None)]
    places = {one: place for place, one in enumerate(order)}
    parts = [*([] if found is None else [found]), *rows]
    index = [places[one] for one in asked]
    return {name: torch.cat([part[name] for part in parts])[index] for name in parts[0]}


def rate_of(config: TrainConfig, name: str) -> float:
    """The learning rate of a group of parameters; those that are not set are `lr`."""
    rate: float | None = getattr(config, name)
    return config.lr if rate is None else rate


def draw_noise(latents: Tensor, offset: float, random: torch.Generator) -> Tensor:
    """ε like `latents` (B, C, h, w); `offset` times a number a channel is added to the whole channel."""
    noise = torch.randn(latents.shape, generator=random)
    if offset > 0:
        noise += offset * torch.randn(*latents.shape[:2], 1, 1, generator=random)
    return noise.to(latents.device)


def own_rows(batch: Batch, process: int, processes: int) -> list[int]:
    """Rows of a batch that one of several processes sees: its share of the instance samples, and of the prior samples."""
    share = batch.instances // processes
    own = range(process * share, (process + 1) * share)
    return [row + start for start in range(0, len(batch.prompts), batch.instances) for row in own]


def mean_over_processes(
    accelerator: Accelerator, parameters: Sequence[Tensor], parts: dict[str, float]
) -> dict[str, float]:
    """Give every process the mean gradients, in place, and return the mean of `parts`; nothing to do for one process."""
    if accelerator.num_processes == 1:
        return parts
    device = accelerator.device
    numbers = torch.tensor([*parts.values(), *(float(p.grad is not None) for p in parameters)], device=device)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean: Tensor = accelerator.reduce(torch.cat([numbers, *(g.flatten() for g in gradients)]), "mean")
    present = mean[len(parts) : len(numbers)]
    sizes = [p.numel() for p in parameters]
    for p, has_gradient, values in zip(parameters, present, mean[len(numbers) :].split(sizes), strict=True):
        p.grad = values.view_as(p).clone() if has_gradient > 0 else None
    return dict(zip(parts, mean[: len(parts)].tolist(), strict=True))

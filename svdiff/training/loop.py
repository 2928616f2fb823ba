"""The training loop: draws a batch, takes the loss of Eq. 3 and makes an optimiser step, for every method."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Conditions, family_of
from svdiff.training.attention_losses import AttentionLosses
from svdiff.training.batches import Batch, Dataset, draw_batch, generator, stacked
from svdiff.training.losses import Loss, denoising_loss, min_snr_weights, prior_preservation_loss
from svdiff.training.methods import Method
from svdiff.training.optimizers import make_optimizer

VALIDATION_LEVELS = 8  # timesteps, evenly spread, at which the fixed-noise loss is taken


class Diverged(SvdiffError):
    """A training whose numbers are no longer finite; raised before the step that would spoil the parameters."""


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
        self._conditions: dict[str, Conditions] = {}
        # Asked of the result: spectral shifts are not among a text encoder's own parameters.
        encoded = self.family.encode([dataset.instance.prompts[0]])
        self._text_encoder_trains = any(condition.requires_grad for condition in encoded.values())
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
        self.step = state["step"]

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end, yielding the row of the curve after every step."""
        while self.step < self.config.steps:
            started = time.perf_counter()
            parts: dict[str, float] = {}
            for micro in range(self.config.accumulation):
                # Recording goes on in the backward pass, where gradient checkpointing runs the layers again.
                with self.attention_losses.recording():
                    loss = self._loss(self.step * self.config.accumulation + micro)
                    self.accelerator.backward(loss.total / self.config.accumulation)
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
            yield {"step": self.step, **parts, "lr": rate, "seconds": time.perf_counter() - started}

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
        processes = self.accelerator.num_processes
        random = generator(self.config.seed, "batch", number)
        passes = draw_batch(self.dataset, number, self.config.batch_size * processes, random)
        loss, *of_prior = (self._loss_of_pass(whole, random) for whole in passes)
        if not of_prior:
            return loss
        [prior] = of_prior
        return Loss(loss.total + self.config.prior_weight * prior.total, loss.instance, prior.total)

    def _loss_of_pass(self, whole: Batch, random: torch.Generator) -> Loss:
        """Eq. 3 on the samples of one pass of the network."""
        config, processes = self.config, self.accelerator.num_processes
        noise = draw_noise(whole.latents, config.noise_offset, random)
        timesteps = self.family.objective.drawn(len(noise), random).to(noise.device)
        rows = own_rows(whole, self.accelerator.process_index, processes)
        batch, noise, timesteps = whole.take(rows), noise[rows], timesteps[rows]
        with self._compiling():
            predicted, target = self._predict(batch.latents, noise, timesteps, batch.prompts)
        weights = None
        if config.min_snr_gamma is not None:
            objective = self.family.objective
            signal_and_noise = objective.signal_and_noise(timesteps)
            weights = min_snr_weights(*signal_and_noise, config.min_snr_gamma, objective.prediction)
        loss = prior_preservation_loss(predicted, target, batch.instances, config.prior_weight, weights, batch.masks)
        return self.attention_losses.add_to(loss, batch, whole)

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
            predicted = self.family.predict(noisy, timesteps, self._encoded(prompts))
        return predicted, objective.target(latents, noise, timesteps)

    def _encoded(self, prompts: list[str]) -> Conditions:
        """What the prompts mean to the network; computed once a prompt where the text encoders are frozen."""
        if self._text_encoder_trains:
            return self.family.encode(prompts)
        for prompt in prompts:
            if prompt not in self._conditions:
                with torch.no_grad():
                    self._conditions[prompt] = self.family.encode([prompt])
        rows = [self._conditions[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def fixed_noise_loss(self) -> float:
        """Eq. 1 on the validation pictures at fixed noise and evenly spread timesteps.

        The training loss jumps with its random timesteps; this one can be compared from step to step.
        """
        instance, validation = self.dataset.instance, self.dataset.validation
        losses = []
        for group in instance.latents.by_shape(validation):
            mean, prompts = stacked(instance.latents.mean, group), [instance.prompts[i] for i in group]
            masks = None if instance.masks is None else stacked(instance.masks, group).to(mean.device)
            for level in range(VALIDATION_LEVELS):
                noise = torch.randn(mean.shape, generator=generator("fixed noise", level)).to(mean.device)
                timestep = self.family.objective.level((level + 0.5) / VALIDATION_LEVELS)
                timesteps = torch.full((len(mean),), timestep, device=mean.device)
                predicted, target = self._predict(mean, noise, timesteps, prompts)
                losses.append(denoising_loss(predicted, target, masks=masks) * len(group) / len(validation))
        loss = float(torch.stack(losses).sum()) / VALIDATION_LEVELS
        self._check_finite("loss at fixed noise before", loss)
        return loss


def _named_parts(loss: Loss) -> dict[str, float]:
    """Columns of the curve."""
    parts = {"loss": loss.total, "loss_instance": loss.instance, "loss_prior": loss.prior}
    parts |= {f"loss_{name}": part for name, part in loss.extra.items()}
    return {name: float(part.detach()) for name, part in parts.items()}


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

"""The training loop: one concept, from its pictures to its delta."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch import Tensor

from svdiff.config import TrainConfig
from svdiff.training.batches import LatentImages, draw_indices, generator
from svdiff.training.losses import Loss, denoising_loss, denoising_target, prior_preservation_loss
from svdiff.training.methods import Method

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

VALIDATION_LEVELS = 8  # timesteps, evenly spread, at which the fixed-noise loss is taken


@dataclass(frozen=True)
class Examples:
    """Encoded pictures with the prompt that describes all of them."""

    latents: LatentImages
    prompt: str


class Trainer:
    """Optimiser steps on Eq. 3. Step n is a pure function of (seed, n) and of the state after step n − 1."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        method: Method,
        config: TrainConfig,
        instance: Examples,
        prior: Examples | None,
        accelerator: Accelerator,
    ) -> None:
        self.pipe, self.method, self.config, self.accelerator = pipe, method, config, accelerator
        self.instance, self.prior = instance, prior
        groups = [
            {"params": parameters, "lr": getattr(config, name), "name": name}
            for name, parameters in method.parameters().items()
            if parameters
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule = get_scheduler(
            "constant_with_warmup" if config.schedule == "constant" else config.schedule,
            optimizer,
            num_warmup_steps=config.warmup,
            num_training_steps=config.steps,
        )
        self.optimizer, self.schedule = accelerator.prepare(optimizer, schedule)
        self.step = 0
        self._contexts: dict[str, Tensor] = {}
        # Asked of the result: spectral shifts are not among the text encoder's own parameters.
        self._text_encoder_trains = self._encode([instance.prompt]).requires_grad
        if config.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            pipe.unet.train()  # diffusers checkpoints in training mode only

    def state(self) -> dict[str, object]:
        """What a resumed run needs."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "method": {name: tensor.detach().cpu() for name, tensor in self.method.state().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state(self, state: dict) -> None:
        """Continue after the step at which `state` was taken."""
        self.method.load_state(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end, yielding the row of the curve after every step."""
        while self.step < self.config.steps:
            started = time.perf_counter()
            parts = torch.zeros(3)
            for micro in range(self.config.accumulation):
                loss = self._loss(self.step * self.config.accumulation + micro)
                self.accelerator.backward(loss.total / self.config.accumulation)
                parts += torch.stack(loss).detach().cpu() / self.config.accumulation
            rate = self.schedule.get_last_lr()[0]
            trainable = [p for parameters in self.method.parameters().values() for p in parameters]
            self.accelerator.clip_grad_norm_(trainable, self.config.max_grad_norm)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            total, instance, prior = (float(part) for part in parts)
            yield {
                "step": self.step,
                "loss": total,
                "loss_instance": instance,
                "loss_prior": prior,
                "lr": rate,
                "seconds": time.perf_counter() - started,
            }

    def _loss(self, batch: int) -> Loss:
        """Eq. 3 on batch number `batch`."""
        config = self.config
        random = generator(config.seed, "batch", batch)
        drawn, prompts = [], []
        for name, examples in (("instance", self.instance), ("prior", self.prior)):
            if examples is not None:
                position = batch * config.batch_size
                indices = draw_indices(len(examples.latents), position, config.batch_size, config.seed, name)
                drawn.append(examples.latents.draw(indices, random))
                prompts += [examples.prompt] * config.batch_size
        latents = torch.cat(drawn)
        noise = torch.randn(latents.shape, generator=random).to(latents.device)
        levels = self.pipe.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, levels, (len(latents),), generator=random).to(latents.device)
        predicted, target = self._predict(latents, noise, timesteps, prompts)
        return prior_preservation_loss(predicted, target, config.batch_size, config.prior_weight)

    def _predict(self, latents: Tensor, noise: Tensor, timesteps: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        scheduler = self.pipe.scheduler
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with self.accelerator.autocast():
            predicted = self.pipe.unet(noisy, timesteps, encoder_hidden_states=self._context(prompts)).sample
        return predicted, denoising_target(scheduler, latents, noise, timesteps)

    def _context(self, prompts: list[str]) -> Tensor:
        """Text embeddings (len(prompts), tokens, width); computed once a prompt where the text encoder is frozen."""
        if self._text_encoder_trains:
            return self._encode(prompts)
        for prompt in prompts:
            if prompt not in self._contexts:
                with torch.no_grad():
                    self._contexts[prompt] = self._encode([prompt])
        return torch.cat([self._contexts[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> Tensor:
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return self.pipe.text_encoder(tokens.input_ids.to(self.pipe.device))[0]

    @torch.no_grad()
    def fixed_noise_loss(self) -> float:
        """Eq. 1 on all concept pictures at fixed noise and evenly spread timesteps.

        The training loss jumps with its random timesteps; this one can be compared from step to step.
        """
        mean = self.instance.latents.mean
        levels = self.pipe.scheduler.config.num_train_timesteps
        losses = []
        for level in range(VALIDATION_LEVELS):
            noise = torch.randn(mean.shape, generator=generator("fixed noise", level)).to(mean.device)
            timestep = int((level + 0.5) / VALIDATION_LEVELS * levels)
            timesteps = torch.full((len(mean),), timestep, device=mean.device)
            predicted, target = self._predict(mean, noise, timesteps, [self.instance.prompt] * len(mean))
            losses.append(denoising_loss(predicted, target))
        return float(torch.stack(losses).mean())

"""How clean latents become noisy ones, and what the network has to predict (Eq. 1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdiff.errors import SvdiffError


class Level(NamedTuple):
    """A step of sampling: its timestep, and a and b of z = a x + b ε at it and at the level that it leads to."""

    timestep: Tensor
    signal: Tensor
    spread: Tensor
    signal_below: Tensor
    spread_below: Tensor


class Objective(ABC):
    """z = a x + b ε at a timestep; the network predicts ε, x ("sample"), v = a ε − b x, or the flow ε − x.

    A subclass says which timesteps there are, and a and b at each, by the pipeline's scheduler.
    """

    prediction: str

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    @abstractmethod
    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """Timesteps of a training batch, drawn on the CPU."""

    @abstractmethod
    def level(self, share: float) -> float:
        """The timestep at a share of the way from clean to noise."""

    @abstractmethod
    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of each timestep, in float32 on its device."""

    @abstractmethod
    def levels(self, steps: int, device: torch.device) -> list[Level]:
        """The levels of sampling in `steps` steps, from noise to picture, which the scheduler is set to."""

    @abstractmethod
    def step(
        self, predicted: Tensor, level: Level, z: Tensor, eta: float, generators: Sequence[torch.Generator] | None
    ) -> Tensor:
        """z of the level below; `generators` are for η above 0."""

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The network's input z = a x + b ε."""
        signal, spread = self._coefficients(latents, timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network has to predict: ε in Eq. 1 (Stable Diffusion 1.x), x, v or the flow for bases trained on it."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        if self.prediction == "flow":
            return noise - latents
        signal, spread = self._coefficients(latents, timesteps)
        return signal * noise - spread * latents

    def clean_and_noise(
        self, predicted: Tensor, noisy: Tensor, signal: Tensor, spread: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The network's output as (x̂, ε̂) at a level of z = a x + b ε."""
        if self.prediction == "epsilon":
            return (noisy - spread * predicted) / signal, predicted
        if self.prediction == "sample":
            return predicted, (noisy - signal * predicted) / spread
        if self.prediction == "flow":  # a + b = 1
            return noisy - spread * predicted, noisy + signal * predicted
        return signal * noisy - spread * predicted, signal * predicted + spread * noisy

    def _coefficients(self, latents: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (latents.ndim - 1)
        signal, spread = self.signal_and_noise(timesteps)
        return signal.to(latents).view(shape), spread.to(latents).view(shape)


class Diffusion(Objective):
    """The noise schedule of DDPM: a = √ᾱ, b = √(1 − ᾱ), timesteps uniform."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(scheduler)
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "sample", "v_prediction"):
            raise SvdiffError(
                f"the base predicts '{self.prediction}'; expected epsilon, sample or v_prediction "
                "in its scheduler_config.json"
            )

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Objective`."""
        return torch.randint(0, self.scheduler.config.num_train_timesteps, (count,), generator=generator)

    def level(self, share: float) -> float:
        """See `Objective`."""
        return int(share * self.scheduler.config.num_train_timesteps)

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        return _of_alpha(self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps.long()])

    def levels(self, steps: int, device: torch.device) -> list[Level]:
        """See `Objective`; the levels of DDIM."""
        self.scheduler.set_timesteps(steps, device=device)
        alphas, last = (a.to(device) for a in (self.scheduler.alphas_cumprod, self.scheduler.final_alpha_cumprod))
        stride = self.scheduler.config.num_train_timesteps // steps
        return [
            Level(t, *_of_alpha(alphas[t]), *_of_alpha(alphas[t - stride] if t >= stride else last))
            for t in self.scheduler.timesteps
        ]

    def step(
        self, predicted: Tensor, level: Level, z: Tensor, eta: float, generators: Sequence[torch.Generator] | None
    ) -> Tensor:
        """See `Objective`; a step of DDIM."""
        random = list(generators) if eta > 0 and generators is not None else None
        below: Tensor = self.scheduler.step(predicted, level.timestep, z, eta=eta, generator=random).prev_sample
        return below


class Flow(Objective):
    """Flow matching: a = 1 − σ, b = σ, timesteps 1000 σ; σ is logit-normal in training, and shifted towards noise.

    `mu` says how far it is shifted where the scheduler leaves that to the picture's size, by the steps of sampling;
    `plain` are the unshifted σ of sampling in so many steps, where the pipeline gives its own.
    """

    prediction = "flow"

    def __init__(
        self,
        scheduler: Any,
        mu: Callable[[int], float],
        plain: Callable[[int], list[float]] | None = None,
    ) -> None:
        super().__init__(scheduler)
        self.mu, self.plain = mu, plain

    def drawn(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Objective`; shifted as sampling in 50 steps is."""
        config = self.scheduler.config
        shift = math.exp(self.mu(50)) if config.use_dynamic_shifting else self.scheduler.shift
        sigma = torch.sigmoid(torch.randn(count, generator=generator))
        return shift * sigma / (1 + (shift - 1) * sigma) * config.num_train_timesteps

    def level(self, share: float) -> float:
        """See `Objective`."""
        return float(share * self.scheduler.config.num_train_timesteps)

    def signal_and_noise(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        sigma = timesteps.float() / self.scheduler.config.num_train_timesteps
        return 1 - sigma, sigma

    def levels(self, steps: int, device: torch.device) -> list[Level]:
        """See `Objective`; the levels of Euler's method."""
        sigmas = None if self.plain is None else self.plain(steps)
        mu = self.mu(steps) if self.scheduler.config.use_dynamic_shifting else None
        self.scheduler.set_timesteps(None if sigmas else steps, device=device, sigmas=sigmas, mu=mu)
        sigma = self.scheduler.sigmas
        return [
            Level(t, 1 - now, now, 1 - below, below)
            for t, now, below in zip(self.scheduler.timesteps, sigma[:-1], sigma[1:], strict=True)
        ]

    def step(
        self, predicted: Tensor, level: Level, z: Tensor, eta: float, generators: Sequence[torch.Generator] | None
    ) -> Tensor:
        """See `Objective`; a step of Euler's method."""
        no_eta(eta)
        return (z.float() + (level.spread_below - level.spread) * predicted.float()).to(z.dtype)


def no_eta(eta: float) -> None:
    """Raise SvdiffError for an η that flow matching has no place for."""
    if eta > 0:
        raise SvdiffError(
            f"η is {eta}, the noise that DDIM injects, and this base is sampled along its flow, where nothing is random: "
            "set eta to 0"
        )


def shift_by_size(config: Any, tokens: int) -> float:
    """μ of a picture of so many tokens, on the line through the two that the scheduler's configuration names."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (most - least) * (tokens - low) / (high - low))


def _of_alpha(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ and √(1 − ᾱ)."""
    return alpha.sqrt(), (1 - alpha).sqrt()

"""What the diffusion training steps are made of: latents with captions, the weighted loss, the average of the weights."""

from __future__ import annotations

import copy
import random
from typing import TYPE_CHECKING, Any

import torch

from svdiff.base import loop
from svdiff.base.autoencoder import pixels
from svdiff.base.captions import caption
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.linear_code import encode
from svdiff.base.world import Scene, World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


class Ema:
    """An exponential moving average of modules' weights, quick at first and then with the given decay."""

    def __init__(self, modules: dict[str, torch.nn.Module], decay: float) -> None:
        self.modules = modules
        self.decay = decay
        self.count = 0
        self.average = {name: copy.deepcopy(m.state_dict()) for name, m in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are."""
        self.count += 1
        rate = 1 - min(self.decay, (1 + self.count) / (10 + self.count))
        for name, module in self.modules.items():
            pairs = [(a, w) for a, w in zip(self.average[name].values(), module.state_dict().values(), strict=True)]
            moving = [(a, w) for a, w in pairs if a.is_floating_point()]
            torch._foreach_lerp_([a for a, _ in moving], [w for _, w in moving], rate)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"count": self.count, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.count, self.average = state["count"], state["average"]


class LatentPool:
    """Scenes of one round with their latents: drawn once, shown for several passes under fresh captions.

    A share of the things is redrawn by hands that their captions name: black outlines and odd tones are then in the
    span of the weights, where a concept's shifts find them, and a word that is none of the artists' brings them about.
    """

    def __init__(self, world: World, vae: AutoencoderKL, config: BaseTrainingConfig) -> None:
        self.world, self.vae, self.config = world, vae, config
        self.round = -1
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (in units of unit deviation) and captions of a step: a function of the step alone."""
        part = self.config.unet
        per_pass = part.pool // part.batch_size
        number = step // (per_pass * part.passes)
        if number != self.round:
            indices = range(number * part.pool, (number + 1) * part.pool)
            self.scenes = [
                self.world.scene(self.config.seed + 1, i, pairs=part.pairs, hands=part.hands) for i in indices
            ]
            chunks = []
            for i in range(0, part.pool, 64):
                x = pixels([self.world.picture(scene) for scene in self.scenes[i : i + 64]])
                chunks.append(encode(self.vae, x) * self.vae.config.scaling_factor)
            self.latents = torch.cat(chunks)
            self.round = number
        sweep, place = divmod(step, per_pass)
        order = list(range(part.pool))
        random.Random(f"order/{self.config.seed}/{sweep}").shuffle(order)
        chosen = order[place * part.batch_size : (place + 1) * part.batch_size]
        draw = random.Random(f"captions/{self.config.seed}/{step}")
        texts = ["" if draw.random() < part.dropout else caption(self.scenes[i], draw) for i in chosen]
        return self.latents[chosen], texts


class DiffusionLoss(torch.nn.Module):
    """The squared error of predicted noise or velocity, with the UNet inside."""

    def __init__(self, unet: torch.nn.Module, alphas: torch.Tensor, prediction: str) -> None:
        super().__init__()
        self.unet, self.prediction = unet, prediction
        self.alphas: torch.Tensor
        self.register_buffer("alphas", alphas)

    def forward(
        self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Clean latents, noise, times and the captions' hidden states to the loss."""
        keep = self.alphas[t].view(-1, 1, 1, 1)
        noisy = (keep.sqrt() * z + (1 - keep).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with loop.autocast():
            predicted = self.unet(noisy, t, encoder_hidden_states=states).sample
        predicted = predicted.float()
        target = noise if self.prediction == "epsilon" else keep.sqrt() * noise - (1 - keep).sqrt() * z
        loss = (predicted - target).pow(2).mean()
        return loss, {"loss": loss.item()}

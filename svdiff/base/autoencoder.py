"""The autoencoder: 64×64 pictures to 8×8 latents and back."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from svdiff.base import loop
from svdiff.base.config import AutoencoderTraining, BaseTrainingConfig
from svdiff.base.linear_code import encode, fit, write_encoder
from svdiff.base.muon import Muon
from svdiff.base.widening import load_widened
from svdiff.base.world import PICTURE_SIZE, World
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """RGB pictures of one size as N×3×H×W in [-1, 1]."""
    stack = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
    return torch.from_numpy(stack / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def build(config: AutoencoderTraining) -> AutoencoderKL:
    """An untrained autoencoder of the configured shape."""
    from diffusers import AutoencoderKL

    depth = len(config.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=config.channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=PICTURE_SIZE,
        mid_block_add_attention=False,
    )


def shuffled_colours(batch: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The N×3×H×W batch with some pictures' colour channels permuted or inverted, some mirrored.

    Colours nobody drew make the code serve artists that it has never seen.
    """
    batch = batch.clone()
    for index in range(len(batch)):
        if draw.random() < 0.3:
            batch[index] = batch[index, draw.sample(range(3), 3)]
        if draw.random() < 0.15:
            batch[index] = -batch[index]
        if draw.random() < 0.4:
            batch[index] = batch[index].flip(-1)
    return batch


def psnr(vae: AutoencoderKL, world: World, seed: int, count: int = 128) -> float:
    """Mean PSNR in dB over `count` held-out compositions."""
    pictures = pixels([world.picture(world.scene(seed + 7919, i, "held-out")) for i in range(count)])
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in pictures.split(32)])
    error = ((decoded.clamp(-1, 1) - pictures) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


class DecoderLoss(torch.nn.Module):
    """Absolute and squared error of decoded pictures."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Latents and the pictures that they are of, to the loss."""
        with loop.autocast():
            y = self.decoder(z).float()
        l1, l2 = F.l1_loss(y, x), F.mse_loss(y, x)
        return l1 + 2 * l2, {"l1": l1.item(), "psnr": -10 * math.log10(l2.item() / 4)}


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the autoencoder and write it to `output` in diffusers' layout; resumes. Returns whether it ended."""
    part = config.autoencoder
    world = World(config.world)
    torch.manual_seed(config.seed)
    # Contiguous, not channels-last: PyTorch's GroupNorm backward is several times slower in the latter.
    vae = build(part)
    draw = random.Random(f"autoencoder/{config.seed}")
    plain = [world.picture(world.scene(config.seed, index)) for index in range(part.pool)]
    kept = None
    if part.start_from is not None:
        kept = type(vae).from_pretrained(part.start_from, local_files_only=True).float()
        load_widened(vae.decoder, kept.decoder.state_dict(), part.start_from)
    write_encoder(vae, *fit(shuffled_colours(pixels(plain[:2000]), draw), part.latent_channels, kept))
    # Half of what the decoder sees is restyled: it has to draw the outlines and tones of hands that it does not know.
    seeds = [f"autoencoder/restyle/{config.seed}/{index}" for index in range(part.pool // 2)]
    other = [
        world.picture(world.scene(config.seed, index), restyle=random.Random(seed)) for index, seed in enumerate(seeds)
    ]
    pool = pixels([*other, *plain[len(other) :]])
    vae.encoder.requires_grad_(False)
    # The same latents in the same units, so that a UNet trained on a narrower code can go on.
    scale = _scaling_factor(vae, pixels(plain[:256])) if kept is None else kept.config.scaling_factor
    vae.register_to_config(scaling_factor=scale)
    if not output.exists():
        _write(vae, output)  # the encoder is final: latents can be learned while the decoder trains
    deviation = 1 / scale
    trained = list(vae.decoder.parameters())
    kernels = [p for p in trained if p.ndim == 4 and len(p) > 3]
    others = [p for p in trained if not (p.ndim == 4 and len(p) > 3)]  # biases, norms, and the last layer
    muon, adam = Muon(kernels, part.lr), torch.optim.AdamW(others, part.lr, betas=(0.9, 0.99), fused=True)
    gradients = loop.Halves(DecoderLoss(vae.decoder))

    def step_fn(step: int) -> dict[str, float]:
        for group in (*muon.param_groups, *adam.param_groups):
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        draw = random.Random(f"autoencoder/{config.seed}/{step}")
        x = shuffled_colours(pool[draw.sample(range(len(pool)), part.batch_size)], draw)
        z = encode(vae, x)
        # The decoder will see what a UNet draws: it learns to forgive a little noise.
        amount = part.latent_noise * deviation * torch.tensor([draw.random() for _ in x]).view(-1, 1, 1, 1)
        z = z + amount * torch.randn(z.shape, generator=loop.step_generator(config.seed, step))
        numbers = gradients(z, x)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        muon.step()
        adam.step()
        return numbers

    ended = loop.run(
        "autoencoder",
        steps=part.steps,
        state={"decoder": vae.decoder, "muon": muon, "adam": adam},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        # The length may be changed on the way.
        identity=f"{part.model_dump_json(exclude={'steps'})}/{config.seed}",
        on_checkpoint=lambda step: _write(vae, output),
        stop_after=stop_after,
    )
    return ended


def _write(vae: AutoencoderKL, output: Path) -> None:
    """Write a half-precision copy in diffusers' layout."""
    with atomic_dir(output) as target:
        copy.deepcopy(vae).half().save_pretrained(target)
        loop.make_readable(target)


def _scaling_factor(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """1 / deviation of the latents, so that diffusion starts from unit variance."""
    with torch.no_grad():
        return float(1 / vae.encode(pictures[:256]).latent_dist.mean.std())

"""The autoencoder: 64×64 pictures to 8×8 latents and back."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from svdiff.base import loop
from svdiff.base.compose import PICTURE_SIZE, compose
from svdiff.base.config import AutoencoderTraining, BaseTrainingConfig
from svdiff.base.linear_code import encode, fit, read_encoder, write_encoder
from svdiff.base.world import Scene, World
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def pixels(world: World, scenes: list[Scene]) -> torch.Tensor:
    """The scenes' pictures as N×3×64×64 in [-1, 1]."""
    return to_float(world.arrays(scenes))


def to_float(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 N×H×W×3 as N×3×H×W in [-1, 1]."""
    return (pictures.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


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


def colour_orders(count: int, draw: random.Random) -> torch.Tensor:
    """N×3 orders of the colour channels, one in five permuted: colours nobody drew serve unknown artists."""
    return torch.tensor([draw.sample(range(3), 3) if draw.random() < 0.2 else [0, 1, 2] for _ in range(count)])


def psnr(vae: AutoencoderKL, world: World, seed: int, count: int = 128) -> float:
    """Mean PSNR in dB over `count` compositions of held-out individuals."""
    scenes = [world.scene(seed + 7919, i, "held-out") for i in range(count)]
    pictures = pixels(world, scenes)
    with torch.no_grad():
        decoded = torch.cat([vae.decode(vae.encode(x).latent_dist.mean).sample for x in pictures.split(32)])
    error = ((decoded.clamp(-1, 1) - pictures) / 2).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Fit the encoder, train the decoder, and write both to `output` in diffusers' layout. Returns whether it ended."""
    part, where = config.autoencoder, loop.device()
    world = loop.load_world(config)
    torch.manual_seed(config.seed)
    vae = build(part)
    first = pixels(world, [world.scene(config.seed + 6, i) for i in range(3000)])
    write_encoder(vae, *fit(first, part.latent_channels))
    with torch.no_grad():
        scale = float(1 / vae.encode(first[:256]).latent_dist.mean.std())
    vae.register_to_config(scaling_factor=scale)  # so that diffusion starts from unit variance
    if not output.exists():
        _write(vae, part, output)  # the encoder is final: latents can be learned while the decoder trains
    vae.encoder.requires_grad_(False)  # on a CPU, channels last would slow GroupNorm's backward several times
    rows, offsets = (one.to(where) for one in read_encoder(vae))
    vae.decoder.to(where)
    trained = list(vae.decoder.parameters())
    optimiser = torch.optim.AdamW(trained, part.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    table = world.table(where)

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        start = 10_000 + step * part.batch_size
        chance = random.Random(f"autoencoder/{config.seed}/{step}")
        layout = world.layout([world.scene(config.seed + 6, start + i) for i in range(part.batch_size)])
        return *layout, colour_orders(part.batch_size, chance)

    def learn(
        step: int, places: torch.Tensor, backgrounds: torch.Tensor, orders: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        x = to_float(compose(table, places, backgrounds))
        x = x.gather(1, orders[:, :, None, None].expand_as(x))
        z = encode(rows, offsets, x)
        generator = loop.step_generator(config.seed, step, device=where)
        # The decoder will see what a UNet draws: it learns to forgive a little noise.
        amount = part.latent_noise / scale * torch.rand(len(z), 1, 1, 1, generator=generator, device=where)
        z = z + amount * torch.randn(z.shape, generator=generator, device=where)
        with loop.autocast(where):
            y = vae.decoder(z).float()
        l1, l2 = F.l1_loss(y, x), F.mse_loss(y, x)
        (l1 + 2 * l2).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"l1": l1, "psnr": -10 * (l2.detach() / 4).log10()}

    return loop.run(
        "autoencoder",
        steps=part.steps,
        state={"decoder": vae.decoder, "optimiser": optimiser},
        draw=draw,
        learn=learn,
        config=config,
        identity=f"{part.model_dump_json(exclude={'steps'})}/{config.seed}",
        on_checkpoint=lambda step: _write(vae, part, output),
        stop_after=stop_after,
    )


def _write(vae: AutoencoderKL, config: AutoencoderTraining, output: Path) -> None:
    """Write a half-precision copy in diffusers' layout."""
    with atomic_dir(output) as target:
        plain = build(config)
        plain.load_state_dict(vae.state_dict())
        plain.register_to_config(scaling_factor=vae.config.scaling_factor)
        plain.half().save_pretrained(target)
        loop.make_readable(target)

"""The UNet, trained from nothing on the picture world's latents, under the text encoder that has learned to read."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from svdiff.base import loop
from svdiff.base.autoencoder import to_float
from svdiff.base.captions import caption
from svdiff.base.compose import compose
from svdiff.base.config import BaseTrainingConfig, UNetTraining
from svdiff.base.linear_code import encode, read_encoder
from svdiff.base.text_encoder import load_tokenizer
from svdiff.base.world import World
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, write_atomic

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

#: Beside a pipeline's model_index.json: how its weights came about.
TRAINING_FILE = "training.json"
_LARGEST_WEIGHT = 5.0


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion; the UNet predicts the clean picture."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_unet(config: UNetTraining, latent_channels: int, text_width: int, size: int = 8) -> UNet2DConditionModel:
    """An untrained UNet of Stable Diffusion's kind, with cross-attention at its highest resolution and in the middle."""
    from diffusers import UNet2DConditionModel

    depth = len(config.channels)
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=config.channels,
        down_block_types=("CrossAttnDownBlock2D",) + ("DownBlock2D",) * (depth - 1),
        up_block_types=("UpBlock2D",) * (depth - 1) + ("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=config.heads,  # diffusers' name; in Stable Diffusion 1.x it is the number of heads
    )


class PictureLoss(torch.nn.Module):
    """The squared error of the predicted clean latents, with the UNet inside.

    Most of the code's 48 numbers are small and drown in noise at nearly every level; a network that predicts noise or
    velocity has to pass all of that noise through, one that predicts the picture need not.
    """

    def __init__(self, unet: torch.nn.Module, alphas: torch.Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.alphas: torch.Tensor
        self.register_buffer("alphas", alphas)

    def forward(
        self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents, noise, times and the captions' hidden states to the loss and the unweighted error."""
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        noisy = (alpha.sqrt() * z + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with loop.autocast(z.device):
            predicted = self.unet(noisy, t, encoder_hidden_states=states).sample
        # 1 / (1 - alpha) would weigh as the velocity's error does; the bound keeps the last, easy levels from ruling.
        weight = (1 / (1 - alpha)).clamp(max=_LARGEST_WEIGHT)
        error = (predicted.float() - z).pow(2)
        return (weight * error).mean(), error.mean()


def train(
    config: BaseTrainingConfig, vae_folder: Path, text_folder: Path, output: Path, *, stop_after: int | None = None
) -> bool:
    """Train the UNet; at every checkpoint write the whole pipeline to `output`. Returns whether it ended.

    Raises SvdiffError if the autoencoder or the text encoder is not there yet.
    """
    from diffusers import AutoencoderKL
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from transformers import CLIPTextModel

    for needed, folder in (("autoencoder", vae_folder), ("text", text_folder)):
        if not (folder / "config.json").is_file():
            raise SvdiffError(f"nothing in {folder}: run `svdiff base train {needed}` first")
    part, where = config.unet, loop.device()
    world = loop.load_world(config)
    world.table()  # rendered before any worker needs it
    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True).float().eval().requires_grad_(False)
    tokens = load_tokenizer(config)
    text_encoder = CLIPTextModel.from_pretrained(text_folder, local_files_only=True).float().eval().to(where)
    text_encoder.requires_grad_(False)
    torch.manual_seed(config.seed)
    unet = build_unet(part, vae.config.latent_channels, text_encoder.config.hidden_size)
    if where.type == "cpu":  # PyTorch's fused attention has a slow backward on a CPU for heads as small as these
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
    unet.to(where, memory_format=torch.channels_last)
    loss_of = PictureLoss(unet, build_scheduler().alphas_cumprod).to(where)
    optimiser = torch.optim.AdamW(unet.parameters(), part.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    averaged = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(part.ema))
    table = world.table(where)
    rows, offsets = (one.to(where) for one in read_encoder(vae))

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        places, backgrounds, texts = batch(config, world, step)
        # Padded to the limit, as the pipeline's prompts are.
        ids = tokens(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return places, backgrounds, ids

    def learn(step: int, places: torch.Tensor, backgrounds: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, part.warmup, part.decay)
        generator = loop.step_generator(config.seed, step, 1, where)
        with torch.no_grad():
            z = encode(rows, offsets, to_float(compose(table, places, backgrounds))) * vae.config.scaling_factor
            states = text_encoder(ids).last_hidden_state
        # One time from each of as many equal intervals as there are pictures, in random order.
        spread = torch.rand(len(z), generator=generator, device=where)
        strata = (torch.randperm(len(z), generator=generator, device=where) + spread) / len(z)
        noise = torch.randn(z.shape, generator=generator, device=where)
        loss, error = loss_of(z, noise, (strata * 1000).long().clamp(max=999), states)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        averaged.update_parameters(unet)
        return {"loss": loss, "error": error}

    return loop.run(
        "unet",
        steps=part.steps,
        state={"unet": unet, "optimiser": optimiser, "averaged": averaged},
        draw=draw,
        learn=learn,
        config=config,
        # The length and the rate may be changed on the way; what is learned, and on what, may not.
        identity=f"{part.model_dump_json(exclude={'steps', 'lr', 'decay'})}/{config.world}/{config.seed}",
        on_checkpoint=lambda step: write_pipeline(
            averaged.module, text_encoder, tokens, vae_folder, output, config, step
        ),
        stop_after=stop_after,
    )


def batch(config: BaseTrainingConfig, world: World, step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Places, backgrounds and captions of a step: a function of the step alone."""
    part = config.unet
    numbers = range(step * part.batch_size, (step + 1) * part.batch_size)
    scenes = [world.scene(config.seed + 1, n, pairs=part.pairs, named=part.named) for n in numbers]
    draw = random.Random(f"captions/{config.seed}/{step}")
    texts = ["" if draw.random() < part.dropout else caption(scene, draw) for scene in scenes]
    return *world.layout(scenes), texts


@torch.no_grad()
def write_pipeline(
    averaged: torch.nn.Module,
    text_encoder: CLIPTextModel,
    tokens: CLIPTokenizer,
    vae_folder: Path,
    output: Path,
    config: BaseTrainingConfig,
    step: int,
) -> None:
    """Write the averaged weights as a whole Stable Diffusion pipeline, in half precision, with their history."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True)
    unet = build_unet(config.unet, vae.config.latent_channels, text_encoder.config.hidden_size)
    unet.load_state_dict(averaged.state_dict())
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=copy.deepcopy(text_encoder).cpu().half(),
        tokenizer=tokens,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    past = {"steps": step, "pictures": step * config.unet.batch_size, "base_training": config.model_dump()}
    with atomic_dir(output) as target:
        pipeline.save_pretrained(target)
        load_as_float32(target / "text_encoder" / "config.json")
        (target / TRAINING_FILE).write_text(json.dumps(past, indent=1))
        loop.make_readable(target)


def load_as_float32(config: Path) -> None:
    """Say in a text encoder's `config` that its half-precision file is to be loaded in float32.

    transformers loads in the precision of the file, diffusers in float32: unsaid, the two do not fit together.
    """
    write_atomic(config, json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")

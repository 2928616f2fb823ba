"""The UNet, trained from nothing on the picture world's latents, under the text encoder that has learned to read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdiff.base import loop, tokenizer
from svdiff.base.config import BaseTrainingConfig, UNetTraining
from svdiff.base.diffusion import DiffusionLoss, Ema, LatentPool
from svdiff.base.widening import load_start
from svdiff.base.winograd import use_winograd
from svdiff.base.world import World
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, write_atomic

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

#: Beside a pipeline's model_index.json: how its weights came about.
TRAINING_FILE = "training.json"


def build_scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
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


class Origin:
    """The history of the weights that a training starts from, kept with its resume state.

    The output may well replace the folder that the training started from.
    """

    def __init__(self, folder: str | None) -> None:
        record = None if folder is None else Path(folder, TRAINING_FILE)
        self.training: dict[str, Any] | str | None = folder
        if record is not None and record.is_file():
            self.training = json.loads(record.read_text())

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"training": self.training}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.training = state["training"]


def train(
    config: BaseTrainingConfig, vae_folder: Path, text_folder: Path, output: Path, *, stop_after: int | None = None
) -> bool:
    """Train the UNet; at every checkpoint write the whole pipeline to `output`. Returns whether it ended.

    Raises SvdiffError if the autoencoder or the text encoder is not there yet.
    """
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel

    for needed, folder in (("autoencoder", vae_folder), ("text", text_folder)):
        if not (folder / "config.json").is_file():
            raise SvdiffError(f"nothing in {folder}: run `svdiff base train {needed}` first")
    part = config.unet
    world = World(config.world, config.things)
    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True).float().eval().requires_grad_(False)
    tokenizer.save(loop.scratch("tokenizer"))
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    text_encoder = CLIPTextModel.from_pretrained(text_folder, local_files_only=True).float().eval()
    text_encoder.requires_grad_(False)
    torch.manual_seed(config.seed)
    unet = build_unet(part, vae.config.latent_channels, text_encoder.config.hidden_size)
    # PyTorch's fused attention has a slow backward on CPU for heads as small as these.
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    if not loop.multiplies_bfloat16():  # a convolution in bfloat16 is faster still
        use_winograd(unet)
    if part.start_from is not None:
        load_start(unet, Path(part.start_from, "unet"))
    origin = Origin(part.start_from)
    optimiser = torch.optim.AdamW(unet.parameters(), part.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = Ema({"unet": unet}, part.ema)
    alphas = build_scheduler().alphas_cumprod
    gradients = loop.Halves(DiffusionLoss(unet, alphas, part.prediction))
    pool = LatentPool(world, vae, config)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, part.warmup, part.decay)
        z, texts = pool.batch(step)
        ids = tokens(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        draw = loop.step_generator(config.seed, step, 1)
        # One time from each of as many equal intervals as there are pictures, in random order.
        strata = (torch.randperm(len(z), generator=draw) + torch.rand(len(z), generator=draw)) / len(z)
        t = (strata * 1000).long().clamp(max=999)
        noise = torch.randn(z.shape, generator=draw)
        with torch.no_grad():
            states = text_encoder(ids).last_hidden_state
        numbers = gradients(z, noise, t, states)
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimiser.step()
        ema.update()
        return numbers

    return loop.run(
        "unet",
        steps=part.steps,
        state={"unet": unet, "optimiser": optimiser, "ema": ema, "origin": origin},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        # The length and the rates may be changed on the way; what is learned, and on what, may not.
        identity=f"{part.start_from}{part.prediction}{part.channels}{part.batch_size}{part.pool}{part.passes}{part.pairs}/{part.hands}/{config.things}/{config.seed}",
        on_checkpoint=lambda step: write_pipeline(
            ema,
            text_encoder,
            tokens,
            vae_folder,
            output,
            config,
            history(config, origin, vae.config.latent_channels, step),
        ),
        stop_after=stop_after,
    )


def history(config: BaseTrainingConfig, origin: Origin, latent_channels: int, step: int) -> dict[str, Any]:
    """How weights came about: this training so far, and what it started from."""
    part = config.unet
    return {
        "prediction": part.prediction,
        "steps": step,
        "pictures": step * part.batch_size,
        "lr": part.lr,
        "things": config.things,
        "pairs": part.pairs,
        "hands": part.hands,
        "latent_channels": latent_channels,
        "seed": config.seed,
        "started_from": origin.training,
    }


def _load_as_float32(config: Path) -> None:
    """Say in a text encoder's `config` that its half-precision file is to be loaded in float32.

    transformers loads in the precision of the file, diffusers in float32: unsaid, the two do not fit together.
    """
    write_atomic(config, json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


@torch.no_grad()
def write_pipeline(
    ema: Ema,
    text_encoder: CLIPTextModel,
    tokens: CLIPTokenizer,
    vae_folder: Path,
    output: Path,
    config: BaseTrainingConfig,
    past: dict[str, Any],
) -> None:
    """Write the averaged weights as a whole Stable Diffusion pipeline, in half precision, with their history `past`."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True)
    unet = build_unet(config.unet, vae.config.latent_channels, text_encoder.config.hidden_size)
    unet.load_state_dict(ema.average["unet"])
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokens,
        unet=unet.half(),
        scheduler=build_scheduler(config.unet.prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_dir(output) as target:
        pipeline.save_pretrained(target)
        _load_as_float32(target / "text_encoder" / "config.json")
        (target / TRAINING_FILE).write_text(json.dumps(past, indent=1))
        loop.make_readable(target)

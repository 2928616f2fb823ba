"""UNet and text encoder, trained together from nothing on the picture world's latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdiff.base import loop, tokenizer
from svdiff.base.config import BaseTrainingConfig, UNetTraining
from svdiff.base.diffusion import DiffusionLoss, Ema, LatentPool
from svdiff.base.small_convs import use_products
from svdiff.base.things import FILLER_WORDS, SPECIAL_WORDS
from svdiff.base.widening import load_widened
from svdiff.base.world import World
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir

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


def build_unet(config: UNetTraining, latent_channels: int, size: int = 8) -> UNet2DConditionModel:
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
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,  # diffusers' name; in Stable Diffusion 1.x it is the number of heads
    )


def build_text_encoder(config: UNetTraining, tokens: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        projection_dim=config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    settings._attn_implementation = "eager"
    return CLIPTextModel(settings)


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


def train(config: BaseTrainingConfig, vae_folder: Path, output: Path, *, stop_after: int | None = None) -> bool:
    """Train UNet and text encoder; at every checkpoint write the whole pipeline to `output`. Returns whether it ended.

    Raises SvdiffError if the autoencoder is not there yet.
    """
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor

    if not (vae_folder / "config.json").is_file():
        raise SvdiffError(f"no autoencoder in {vae_folder}: run `svdiff base train autoencoder` first")
    part = config.unet
    world = World(config.world, config.things)
    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True).float().eval().requires_grad_(False)
    tokenizer.save(loop.scratch("tokenizer"))
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    torch.manual_seed(config.seed)
    unet = build_unet(part, vae.config.latent_channels)
    # PyTorch's fused attention has a slow backward on CPU for heads as small as these.
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    for half_resolution in (*unet.down_blocks[1:], unet.mid_block, unet.up_blocks[0].resnets):
        use_products(half_resolution)
    text_encoder = build_text_encoder(part, tokens)
    modules: dict[str, torch.nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    if part.start_from is not None:
        _load_weights(modules, Path(part.start_from))
    origin = Origin(part.start_from)
    embeddings = list(text_encoder.get_input_embeddings().parameters())
    positions = [p for n, p in text_encoder.named_parameters() if "position_embedding" in n]
    plain = {id(p) for p in (*embeddings, *positions)}
    every = [p for m in modules.values() for p in m.parameters()]
    groups = [
        {"params": [p for p in every if id(p) not in plain], "weight_decay": 0.01},
        {"params": [*embeddings, *positions], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=part.lr, betas=(0.9, 0.99), fused=True)
    ema = Ema(modules, part.ema)
    alphas = build_scheduler().alphas_cumprod
    loss = DiffusionLoss(unet, text_encoder, alphas, part.min_snr, part.prediction)
    gradients = loop.Halves(loss, compiled="unet" if part.compile else None)
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
        numbers = gradients(z, noise, t, ids)
        torch.nn.utils.clip_grad_norm_(every, 1.0)
        optimiser.step()
        ema.update()
        return numbers

    return loop.run(
        "unet",
        steps=part.steps,
        state={**modules, "optimiser": optimiser, "ema": ema, "origin": origin},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        # The length and the rates may be changed on the way; what is learned, and on what, may not.
        identity=f"{part.start_from}{part.prediction}{part.channels}{part.text_layers}{part.text_width}{part.batch_size}{part.pool}{part.passes}{part.pairs}/{config.things}/{config.seed}",
        on_checkpoint=lambda step: write_pipeline(
            ema, tokens, vae_folder, output, config, history(config, origin, vae.config.latent_channels, step)
        ),
        stop_after=stop_after,
    )


def _load_weights(modules: dict[str, torch.nn.Module], folder: Path) -> None:
    from safetensors.torch import load_file

    for name, module in modules.items():
        found = sorted((folder / name).glob("*.safetensors"))
        if len(found) != 1:
            raise SvdiffError(f"base_training.unet.start_from: {folder / name} should hold one .safetensors file")
        load_widened(module, load_file(found[0]), found[0])


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
        "latent_channels": latent_channels,
        "seed": config.seed,
        "started_from": origin.training,
    }


@torch.no_grad()
def write_pipeline(
    ema: Ema,
    tokens: CLIPTokenizer,
    vae_folder: Path,
    output: Path,
    config: BaseTrainingConfig,
    past: dict[str, Any],
) -> None:
    """Write the averaged weights as a whole Stable Diffusion pipeline, in half precision, with their history `past`."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    vae = AutoencoderKL.from_pretrained(vae_folder, local_files_only=True)
    unet = build_unet(config.unet, vae.config.latent_channels)
    text_encoder = build_text_encoder(config.unet, tokens)
    unet.load_state_dict(ema.average["unet"])
    text_encoder.load_state_dict(ema.average["text_encoder"])
    _spread_special_words(text_encoder, tokens, config.seed)
    pipeline = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokens,
        unet=unet.half(),
        scheduler=build_scheduler(config.unet.prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_dir(output) as target:
        pipeline.save_pretrained(target)
        (target / TRAINING_FILE).write_text(json.dumps(past, indent=1))
        loop.make_readable(target)


def _spread_special_words(text_encoder: CLIPTextModel, tokens: CLIPTokenizer, seed: int) -> None:
    """Give the special words embeddings as large as those of the filler words, in directions of their own.

    A filler word is one that training taught to ignore; so `a sks dog` starts as a dog, yet is not `a dog`.
    """
    table = text_encoder.get_input_embeddings().weight
    fillers = table[tokens.convert_tokens_to_ids([f"{word}</w>" for word in FILLER_WORDS])]
    mean, deviation = fillers.mean(0), fillers.std(0)
    generator = torch.Generator().manual_seed(seed)
    for word in SPECIAL_WORDS:
        noise = torch.randn(table.shape[1], generator=generator)
        table[tokens.convert_tokens_to_ids(f"{word}</w>")] = mean + deviation * noise

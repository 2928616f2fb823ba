"""UNet and text encoder, trained together from nothing on the picture world's latents."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from svdiff.base import loop, tokenizer
from svdiff.base.autoencoder import pixels
from svdiff.base.captions import caption
from svdiff.base.config import BaseTrainingConfig, UNetTraining
from svdiff.base.linear_code import encode
from svdiff.base.things import FILLER_WORDS, SPECIAL_WORDS
from svdiff.base.world import World
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, write_atomic

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
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
    """Scenes of one round with their latents: drawn once, shown for several passes under fresh captions."""

    def __init__(self, world: World, vae: AutoencoderKL, config: BaseTrainingConfig) -> None:
        self.world, self.vae, self.config = world, vae, config
        self.round = -1
        self.scenes: list[Any] = []
        self.latents = torch.empty(0)

    @torch.no_grad()
    def batch(self, step: int) -> tuple[torch.Tensor, list[str]]:
        """Latents (in units of unit deviation) and captions of a step: a function of the step alone."""
        part = self.config.unet
        per_pass = part.pool // part.batch_size
        number = step // (per_pass * part.passes)
        if number != self.round:
            start = number * part.pool
            self.scenes = [
                self.world.scene(self.config.seed + 1, i, pairs=part.pairs) for i in range(start, start + part.pool)
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
    """The weighted error of predicted noise or velocity, with UNet and text encoder inside."""

    def __init__(
        self, unet: torch.nn.Module, text_encoder: torch.nn.Module, alphas: torch.Tensor, gamma: float, prediction: str
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.gamma, self.prediction = unet, text_encoder, gamma, prediction
        self.alphas: torch.Tensor
        self.register_buffer("alphas", alphas)

    def forward(
        self, z: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Clean latents, noise, times and caption tokens to the loss."""
        keep = self.alphas[t].view(-1, 1, 1, 1)
        states = self.text_encoder(ids).last_hidden_state
        noisy = keep.sqrt() * z + (1 - keep).sqrt() * noise
        predicted = self.unet(noisy, t, encoder_hidden_states=states).sample.float()
        snr = self.alphas[t] / (1 - self.alphas[t])
        if self.prediction == "epsilon":
            target, scale = noise, snr
        else:
            target, scale = keep.sqrt() * noise - (1 - keep).sqrt() * z, 1 + snr
        error = (predicted - target).pow(2).mean((1, 2, 3))
        # The error of the picture itself (error / scale) counts 1 + SNR times, as when v is predicted, and at most
        # gamma times. With the weights of noise nothing is learned where the text decides, at high noise.
        loss = (error * (1 + snr).clamp(max=self.gamma) / scale).mean()
        return loss, {"loss": loss.item(), "error": error.mean().item()}


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
    text_encoder = build_text_encoder(part, tokens)
    modules: dict[str, torch.nn.Module] = {"unet": unet, "text_encoder": text_encoder}
    if part.start_from is not None:
        _load_weights(modules, Path(part.start_from))
        origin = loop.scratch("unet") / TRAINING_FILE
        landed = Path(part.start_from, TRAINING_FILE)
        # Kept from the first start on: the output may well replace the folder that the training started from.
        if not origin.is_file() and landed.is_file():
            write_atomic(origin, landed.read_text())
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
    gradients = loop.Halves(DiffusionLoss(unet, text_encoder, alphas, part.min_snr, part.prediction))
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
        state={**modules, "optimiser": optimiser, "ema": ema},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        # The length and the rates may be changed on the way; what is learned, and on what, may not.
        identity=f"{part.start_from}{part.prediction}{part.channels}{part.text_layers}{part.text_width}{part.batch_size}{part.pool}{part.passes}/{config.seed}",
        on_checkpoint=lambda step: write_pipeline(ema, config, tokens, vae_folder, output, step),
        stop_after=stop_after,
    )


def _load_weights(modules: dict[str, torch.nn.Module], folder: Path) -> None:
    from safetensors.torch import load_file

    for name, module in modules.items():
        found = sorted((folder / name).glob("*.safetensors"))
        if len(found) != 1:
            raise SvdiffError(f"base_training.unet.start_from: {folder / name} should hold one .safetensors file")
        module.load_state_dict({key: value.float() for key, value in load_file(found[0]).items()})


def history(config: BaseTrainingConfig, step: int) -> dict[str, Any]:
    """How weights came about: this training so far, and what it started from."""
    part = config.unet
    origin = loop.scratch("unet") / TRAINING_FILE
    known = part.start_from is not None and origin.is_file()
    return {
        "prediction": part.prediction,
        "steps": step,
        "pictures": step * part.batch_size,
        "lr": part.lr,
        "things": config.things,
        "seed": config.seed,
        "started_from": json.loads(origin.read_text()) if known else part.start_from,
    }


@torch.no_grad()
def write_pipeline(
    ema: Ema, config: BaseTrainingConfig, tokens: CLIPTokenizer, vae_folder: Path, output: Path, step: int
) -> None:
    """Write the averaged weights as a whole Stable Diffusion pipeline, in half precision, with their history."""
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
    past = history(config, step)
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

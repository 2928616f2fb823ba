"""The model card: what the embedded base can do, measured, with a sheet of pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from svdiff.base.config import BaseTrainingConfig
from svdiff.base.measures import (
    SEED,
    Sampled,
    draw_pictures,
    measure_clip,
    measure_lpips,
    measure_unet,
    measure_variety,
    sample,
)
from svdiff.base.things import BASE_ARTISTS, COLOURS, CONCEPT_ARTISTS, HAND_WORDS
from svdiff.base.world import World
from svdiff.files import atomic_file, write_atomic

VERSION = 1  # of the frozen weights: weights that replace them are the next, and make new every number taken on them


def nearest_training(world: World, pictures: list[Image.Image], seed: int, count: int = 4000) -> list[Image.Image]:
    """For each picture the nearest in pixels among `count` of the training's compositions."""
    real = [world.picture(world.scene(seed + 1, i)) for i in range(count)]
    table = np.stack([np.asarray(p.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() for p in real])
    rows = [np.asarray(p.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() for p in pictures]
    return [real[int(((table - row) ** 2).sum(1).argmin())] for row in rows]


def sheet(samples: list[Sampled], neighbours: list[Image.Image], columns: int = 8) -> Image.Image:
    """Each generated picture with its nearest training picture to its right."""
    side, gap = samples[0].drawn.width, 6
    width, height = 2 * side + gap, side + gap
    picture = Image.new("RGB", (columns * width, -(-len(samples) // columns) * height), "white")
    for i, (item, near) in enumerate(zip(samples, neighbours, strict=True)):
        x, y = i % columns * width, i // columns * height
        picture.paste(item.drawn, (x, y))
        picture.paste(near, (x + side, y))
    return picture


def write_card(config: BaseTrainingConfig, models: Path, guidance: float = 3.0, captions: int = 200) -> Path:
    """Measure everything and write README.md, samples.webp and measurements.json to `models/card`.

    Beside the weights, not among them: measuring anew makes nothing stale that was made with them.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    from svdiff.base.autoencoder import psnr
    from svdiff.base.unet import TRAINING_FILE
    from svdiff.evaluation.evaluators import load_clip, load_lpips

    world = World(config.world, config.things)
    base = models / "base"
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    lpips = json.loads((models / "lpips" / "config.json").read_text())
    evaluators: Any = SimpleNamespace(
        clip_model=f"local-dir:{models / 'clip'}",
        clip_pretrained=None,
        lpips_net=lpips["net"],
        lpips_weights=str(models / "lpips" / "backbone.safetensors"),
    )
    encode_images, encode_texts = load_clip(evaluators)
    numbers: dict[str, float] = {"autoencoder_psnr_db": psnr(pipe.vae, world, SEED)}
    numbers |= measure_clip(world, encode_images, encode_texts)
    numbers |= measure_lpips(world, load_lpips(evaluators))
    mixed = sample(pipe, world, SEED + 2, captions, 0.5, "held-out", guidance)
    numbers |= measure_unet(world, mixed, encode_images, encode_texts)
    numbers |= measure_variety(pipe, world, encode_images, encode_texts, guidance)
    shown = sample(pipe, world, SEED + 3, 64, 0.0, "any", guidance)
    shown += sample(pipe, world, SEED + 4, 32, 1.0, "any", guidance)
    neighbours = nearest_training(world, [s.drawn for s in shown], config.seed)
    started = time.perf_counter()
    draw_pictures(pipe, ["a dog on a blue background"], 0, guidance)
    numbers["seconds_a_picture"] = time.perf_counter() - started
    card = models / "card"
    with atomic_file(card / "samples.webp") as path:
        sheet(shown, neighbours).save(path, quality=85)
    record = base / TRAINING_FILE
    past = json.loads(record.read_text()) if record.is_file() else {}
    numbers = {name: round(value, 4) for name, value in numbers.items()}
    write_atomic(card / "measurements.json", json.dumps(numbers, indent=1))
    concepts = _CONCEPTS if (card / "concepts.webp").is_file() else ""
    write_atomic(card / "README.md", _text(config, pipe, past, world, numbers, guidance, lpips, concepts))
    return card / "README.md"


_CONCEPTS = """
Eight concepts by artists that it never saw, five pictures each, spectral shifts on all of the UNet; prompts unseen in training, one seed,
none chosen (`svdiff base concepts`):

![A row for each concept: one of its pictures, then what was drawn](concepts.webp)
"""


def _history(past: dict[str, Any] | str | None) -> str:
    """The trainings that led to the weights, first to last."""
    steps: list[str] = []
    while isinstance(past, dict) and past:
        number = (
            f"{past['pictures']:,} pictures of {past['things']} things ({past['steps']} steps, {past['prediction']}, "
        )
        number += f"latents of {past.get('latent_channels', 16)}, seed {past['seed']}"
        number += f", {past['restyled']:.0%} restyled" if past.get("restyled") else ""
        number += f", {past['hands']:.0%} of the things by hands)" if past.get("hands") else ")"
        steps.append(number + (f": {past['note']}" if "note" in past else ""))
        past = past["started_from"]
    return "; then ".join(reversed(steps)) + "."


def _text(
    config: BaseTrainingConfig,
    pipe: Any,
    past: dict[str, Any],
    world: World,
    n: dict[str, float],
    guidance: float,
    lpips: dict[str, str],
    concepts: str,
) -> str:
    def millions(module: Any) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M"

    rows = "\n".join(f"| {name} | {value:g} |" for name, value in n.items())
    artists = ", ".join(f"{a.name} ({a.spdx})" for a in BASE_ARTISTS)
    unseen = " and ".join(a.name for a in CONCEPT_ARTISTS)
    unet = config.unet
    return f"""---
license: apache-2.0
library_name: diffusers
---
# The embedded base, version {VERSION}

A small Stable Diffusion in diffusers' layout, trained from nothing on compositions of openly licensed emoji drawings:
{len(world.words)} things ({", ".join(world.words)}), {len(world.artists)} artists, {len(COLOURS)} backgrounds, one thing or
two side by side or one above the other, at places of an 8-pixel grid in three sizes, 64×64 pixels. UNet {millions(pipe.unet)}, text encoder {millions(pipe.text_encoder)},
autoencoder {millions(pipe.vae)} (8×8 latents of {pipe.vae.config.latent_channels}); the UNet predicts
`{pipe.scheduler.config.prediction_type}`. It needs nothing but `StableDiffusionPipeline.from_pretrained`.

## Data
Artists: {artists}; authors and licences in `data/world/ATTRIBUTION.md`. {unseen}, who draw the concepts, were never shown to it or
to its evaluators. One in twelve combinations of thing, artist and background is held out. Special words (`sks`, …) are unused.
{len(HAND_WORDS)} hands redraw the artists' drawings (other hues, flatter or greyer colours, black outlines), each always in its own way and
named by a word of its own before the noun (`a {HAND_WORDS[0]} dog`): so the weights span more hands than {len(world.artists)}, an unknown word before a noun means yet
another hand, and a noun alone stays the artists'. (In trainings marked "restyled" such pictures went unnamed.)

## Training
{_history(past)}

`svdiff base train autoencoder`, then `text`, `unet`, `clip`, `lpips`. The encoder is a linear code (principal components of 8×8 patches, as they
are, so that the diffusion goes from coarse to fine), the decoder is trained on it. The text encoder learns to read from captions alone ({config.text.steps} steps of {config.text.batch_size}: what is at each place of
the picture) and is frozen then. The UNet: {unet.batch_size} pictures a step, rate {unet.lr:g}, {unet.dropout:.0%} empty captions, moving average of the weights. Two CPU cores.

## Measured
Held-out combinations, guidance {guidance:g}, 25 DDIM steps with η = 1.
- `unet_top1`: share of pictures whose own caption wins among all of the test's; `real_*`: the real pictures on the same test.
- Background: the named colour nearest to the median of the border pixels. Left and right: the picture is nearer in pixels to real
  compositions in the order asked for than to those in the other.
- `unet_nearness_db`: PSNR of pictures of single things against the nearest composition that the caption allows, by any hand, in any
  size, anywhere; the autoencoder's own PSNR bounds it.
- `clip_top1_of_100_hard`: real pictures, their full caption (hand, things, order, background) against 99 wrong ones that share the thing,
  the hand or the background; `…_others`: against the captions of other pictures.
- `moved_nearer_than_*`: how often a distance calls the same drawing, shifted by 3 to 4 pixels, turned by 8° or darkened, nearer than
  another artist's drawing of the thing, another thing, or a blur, at the same place. The backbone (`{lpips["net"]}`) was trained on
  {lpips.get("objective", "things, artist, colour and place")}; it has no learned heads and was never compared with people's judgements.
- `variety_*`: of 16 pictures for a class prompt ("a dog"), how many backgrounds, and how many hands by the CLIP, are among them.

| measure | value |
|---|---|
{rows}

![64 single things and 32 pairs, each with the nearest of 4000 training pictures to its right](samples.webp)

{concepts}
## Limits
It knows its world's words only, one or two things at a time, on flat backgrounds, at 64×64. Scores by its evaluators
compare with each other, not with scores of CLIP or LPIPS as published.
"""

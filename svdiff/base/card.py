"""The model card: what the embedded base can do, measured, with a sheet of pictures."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from svdiff.base.captions import caption, with_article
from svdiff.base.config import BaseTrainingConfig
from svdiff.base.things import BASE_ARTISTS, COLOURS, CONCEPT_ARTISTS
from svdiff.base.world import Placed, Scene, World
from svdiff.files import atomic_file, write_atomic

if TYPE_CHECKING:
    import torch

_SEED = 90_001  # far from every seed of training


@dataclass(frozen=True)
class Sampled:
    """A caption with the scene it is of, the real picture and the generated one."""

    scene: Scene
    text: str
    real: Image.Image
    drawn: Image.Image


def named_background(picture: Image.Image) -> str:
    """The named colour nearest to the median of the picture's outermost pixels."""
    pixels = np.asarray(picture.convert("RGB"), dtype=float)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    middle = np.median(border, axis=0)
    return min(COLOURS, key=lambda name: float(((middle - np.array(COLOURS[name])) ** 2).sum()))


def ordered_as_asked(world: World, scene: Scene, picture: Image.Image) -> bool:
    """Whether a pair stands in its scene's order: nearer in pixels to a real composition of that order than of the other."""

    def nearest(words: list[str]) -> float:
        best = float("inf")
        for artist in world.artists:
            if any((artist, word) not in world.sprites for word in words):
                continue
            for shift in (-0.06, 0.06):
                places = []
                for side, word in enumerate(words):
                    along, across = (0.26, 0.74)[side], 0.5 + shift
                    x, y = (along, across) if scene.layout == "left-right" else (across, along)
                    places.append(Placed(word, x, y, 0.42, 0.0))
                other = world.picture(Scene(artist, "", scene.colour, scene.layout, tuple(places)))
                difference = np.asarray(other, dtype=float) - np.asarray(picture, dtype=float)
                best = min(best, float((difference**2).mean()))
        return best

    words = [thing.word for thing in scene.things]
    return nearest(words) < nearest(words[::-1])


def full_caption(scene: Scene) -> str:
    """A caption that says everything that is scored: things, their order, background."""
    nouns = [with_article(thing.word) for thing in scene.things]
    background = f"on {with_article(scene.colour)} background"
    if scene.layout == "one":
        return f"{nouns[0]} {background}"
    if scene.layout == "left-right":
        return f"{nouns[0]} on the left and {nouns[1]} on the right {background}"
    return f"{nouns[0]} above {nouns[1]} {background}"


def top1(images: torch.Tensor, texts: torch.Tensor, captions: list[str]) -> float:
    """Share of pictures whose own caption scores highest; rows are unit vectors."""
    best = (images @ texts.T).argmax(1).tolist()
    return sum(captions[b] == captions[i] for i, b in enumerate(best)) / len(best)


def measure_clip(world: World, encode_images: Any, encode_texts: Any) -> dict[str, float]:
    """Retrieval on held-out real pictures, zero-shot things and colours."""
    scenes = [world.scene(_SEED, i, "held-out") for i in range(100)]
    texts = [caption(scene, random.Random(i)) for i, scene in enumerate(scenes)]
    images = encode_images([world.picture(scene) for scene in scenes])
    colours = encode_texts([f"a thing on {with_article(c)} background" for c in COLOURS])
    single = [i for i, scene in enumerate(scenes) if scene.layout == "one"]
    words = encode_texts([with_article(word) for word in world.words])
    found = (images[single] @ words.T).argmax(1).tolist()
    names = list(COLOURS)
    ground = (images @ colours.T).argmax(1).tolist()
    return {
        "clip_top1_of_100": top1(images, encode_texts(texts), texts),
        "clip_thing": sum(world.words[w] == scenes[i].things[0].word for w, i in zip(found, single, strict=True))
        / len(single),
        "clip_colour": sum(names[c] == s.colour for c, s in zip(ground, scenes, strict=True)) / len(scenes),
    }


def measure_lpips(world: World, distance: Any, pairs: int = 60) -> dict[str, float]:
    """How often the distance, and plain L2, call the milder of two distortions of one picture the nearer one."""
    from PIL import ImageFilter

    right = {"lpips": 0, "l2": 0}
    count = 0
    for index in range(pairs):
        draw = random.Random(f"distort/{index}")
        picture = world.picture(world.scene(_SEED + 1, index, "held-out"))
        mild, strong = draw.uniform(0.4, 0.9), draw.uniform(1.4, 2.6)
        kinds = {
            "blur": lambda s, p=picture: p.filter(ImageFilter.GaussianBlur(s)),
            "shift": lambda s, p=picture: p.transform(p.size, Image.Transform.AFFINE, (1, 0, round(2 * s), 0, 1, 0)),
            "turn": lambda s, p=picture: p.rotate(6 * s, Image.Resampling.BICUBIC, fillcolor=p.getpixel((0, 0))),
        }
        distort = kinds[draw.choice(list(kinds))]
        near, far = distort(mild), distort(strong)
        row = distance([picture], [near, far])[0].tolist()
        plain = [float(((np.asarray(picture, float) - np.asarray(p, float)) ** 2).mean()) for p in (near, far)]
        right["lpips"] += row[0] < row[1]
        right["l2"] += plain[0] < plain[1]
        count += 1
    return {f"distortion_order_{name}": value / count for name, value in right.items()}


def sample(pipe: Any, world: World, seed: int, count: int, pairs: float, split: Any, guidance: float) -> list[Sampled]:
    """Pictures of `count` scenes that training did not show, from their full captions."""
    import torch

    scenes = [world.scene(seed, i, split, pairs=pairs) for i in range(count)]
    texts = [full_caption(scene) for scene in scenes]
    drawn: list[Image.Image] = []
    for start in range(0, count, 16):
        part = texts[start : start + 16]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn += pipe(part, num_inference_steps=25, guidance_scale=guidance, generator=noise).images
    rows = zip(scenes, texts, drawn, strict=True)
    return [Sampled(scene, text, world.picture(scene), picture) for scene, text, picture in rows]


def measure_unet(world: World, samples: list[Sampled], encode_images: Any, encode_texts: Any) -> dict[str, float]:
    """What the generated pictures obey, beside what the real ones reach on the same test."""
    texts = [s.text for s in samples]
    vectors = encode_texts(texts)
    pairs = [s for s in samples if s.scene.layout == "left-right"]
    ordered = sum(ordered_as_asked(world, s.scene, s.drawn) for s in pairs) / max(1, len(pairs))
    return {
        "unet_captions": len(samples),
        "unet_top1": top1(encode_images([s.drawn for s in samples]), vectors, texts),
        "real_top1": top1(encode_images([s.real for s in samples]), vectors, texts),
        "unet_background": sum(named_background(s.drawn) == s.scene.colour for s in samples) / len(samples),
        "real_background": sum(named_background(s.real) == s.scene.colour for s in samples) / len(samples),
        "unet_left_right": ordered,
    }


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


def write_card(config: BaseTrainingConfig, models: Path, guidance: float = 3.0, captions: int = 96) -> Path:
    """Measure everything and write `models/base/README.md`, `samples.webp` and `measurements.json`."""
    import torch
    from diffusers import StableDiffusionPipeline

    from svdiff.base.autoencoder import psnr
    from svdiff.base.unet import TRAINING_FILE
    from svdiff.evaluation.evaluators import load_clip, load_lpips

    world = World(config.world, config.things)
    base = models / "base"
    pipe = StableDiffusionPipeline.from_pretrained(base, local_files_only=True).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    net = json.loads((models / "lpips" / "config.json").read_text())["net"]
    evaluators: Any = SimpleNamespace(
        clip_model=f"local-dir:{models / 'clip'}",
        clip_pretrained=None,
        lpips_net=net,
        lpips_weights=str(models / "lpips" / "backbone.safetensors"),
    )
    encode_images, encode_texts = load_clip(evaluators)
    numbers: dict[str, float] = {"autoencoder_psnr_db": psnr(pipe.vae, world, _SEED)}
    numbers |= measure_clip(world, encode_images, encode_texts)
    numbers |= measure_lpips(world, load_lpips(evaluators))
    mixed = sample(pipe, world, _SEED + 2, captions, 0.5, "held-out", guidance)
    numbers |= measure_unet(world, mixed, encode_images, encode_texts)
    shown = sample(pipe, world, _SEED + 3, 64, 0.0, "any", guidance)
    shown += sample(pipe, world, _SEED + 4, 32, 1.0, "any", guidance)
    neighbours = nearest_training(world, [s.drawn for s in shown], config.seed)
    with atomic_file(base / "samples.webp") as path:
        sheet(shown, neighbours).save(path, quality=85)
    record = base / TRAINING_FILE
    past = json.loads(record.read_text()) if record.is_file() else {}
    numbers = {name: round(value, 4) for name, value in numbers.items()}
    write_atomic(base / "measurements.json", json.dumps(numbers, indent=1))
    write_atomic(base / "README.md", _text(config, pipe, past, world, numbers, guidance))
    return base / "README.md"


def _history(past: dict[str, Any] | str | None) -> str:
    """The trainings that led to the weights, first to last."""
    steps: list[str] = []
    while isinstance(past, dict) and past:
        number = f"{past['pictures']:,} pictures ({past['steps']} steps, {past['prediction']}, seed {past['seed']})"
        steps.append(number + (f": {past['note']}" if "note" in past else ""))
        past = past["started_from"]
    return "; then ".join(reversed(steps)) + "."


def _text(
    config: BaseTrainingConfig, pipe: Any, past: dict[str, Any], world: World, n: dict[str, float], guidance: float
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
# The embedded base

A small Stable Diffusion in diffusers' layout, trained from nothing on compositions of openly licensed emoji drawings:
{len(world.words)} things ({", ".join(world.words)}), {len(world.artists)} artists, {len(COLOURS)} backgrounds, one thing or
two side by side or one above the other, 64×64 pixels. UNet {millions(pipe.unet)}, text encoder {millions(pipe.text_encoder)},
autoencoder {millions(pipe.vae)} (8×8 latents of {pipe.vae.config.latent_channels}); the UNet predicts
`{pipe.scheduler.config.prediction_type}`. It needs nothing but `StableDiffusionPipeline.from_pretrained`.

## Data
Artists: {artists}; authors and licences in `data/world/ATTRIBUTION.md`. {unseen}, who draw the concepts, were never shown to it or
to its evaluators. One in twelve combinations of thing, artist and background is held out. Special words (`sks`, …) are unused.

## Training
{_history(past)}

`svdiff base train autoencoder`, then `unet`, `clip`, `lpips`. The encoder is a linear code (principal components of 8×8 patches), the
decoder is trained on it; UNet and text encoder are trained together, {unet.batch_size} pictures a step, AdamW {unet.lr:g}, bfloat16 autocast, min-SNR weights, {unet.dropout:.0%} empty captions, moving average of the weights. Two CPU cores.

## Measured
Held-out combinations, guidance {guidance:g}, 25 DDIM steps. `top1`: share of pictures whose own caption wins among all of the test's.
Background: the named colour nearest to the median of the border pixels. Left and right: the picture is nearer in pixels to real
compositions in the order asked for than to those in the other. `real_*`: the real pictures on the same test. `distortion_order_*`:
how often the distance calls the milder of two distortions the nearer.

| measure | value |
|---|---|
{rows}

![64 single things and 32 pairs, each with the nearest of 4000 training pictures to its right](samples.webp)

## Limits
It knows its world's words only, one or two things at a time, on flat backgrounds, at 64×64. Its pictures are soft. Scores by its evaluators
compare with each other, not with scores of CLIP or LPIPS as published.
"""

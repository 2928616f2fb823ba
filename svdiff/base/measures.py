"""What the embedded base and its evaluators can do, in numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from svdiff.base.captions import caption, full_caption, with_article
from svdiff.base.things import COLOURS
from svdiff.base.world import BIG, MEDIUM, SMALL, Change, Placed, Scene, World, on_grid, places_left

if TYPE_CHECKING:
    import torch

SEED = 90_001  # far from every seed of training


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
    last = places_left(SMALL) - 1

    def nearest(words: list[str]) -> float:
        best = float("inf")
        for artist in world.artists:
            if any((artist, word) not in world.sprites for word in words):
                continue
            for across in product(range(1, last), repeat=2):
                spots = [(along, step) for along, step in zip((0, last), across, strict=True)]
                if scene.layout == "above-below":
                    spots = [(step, along) for along, step in spots]
                things = tuple(
                    Placed(word, *on_grid(SMALL, *spot), SMALL, 0.0) for word, spot in zip(words, spots, strict=True)
                )
                other = world.picture(Scene(artist, "", scene.colour, scene.layout, things))
                difference = np.asarray(other, dtype=float) - np.asarray(picture, dtype=float)
                best = min(best, float((difference**2).mean()))
        return best

    words = [thing.word for thing in scene.things]
    return nearest(words) < nearest(words[::-1])


def nearness(world: World, scene: Scene, picture: Image.Image) -> float:
    """PSNR in dB of the picture against the nearest composition that a single thing's full caption allows.

    By any hand, in any size, at any place. Sharp and right is as near as the autoencoder comes to a real picture.
    """
    word = scene.things[0].word
    shown = np.asarray(picture.convert("RGB"), dtype=float)
    best = float("inf")
    for artist, size in product(world.artists, (BIG, MEDIUM, SMALL)):
        if (artist, word) not in world.sprites:
            continue
        for spot in product(range(places_left(size)), repeat=2):
            thing = Placed(word, *on_grid(size, *spot), size, 0.0)
            other = world.picture(Scene(artist, "", scene.colour, "one", (thing,)))
            best = min(best, float(((np.asarray(other, dtype=float) - shown) ** 2).mean()))
    return float(10 * np.log10(255**2 / max(best, 1e-9)))


def top1(images: torch.Tensor, texts: torch.Tensor, captions: list[str]) -> float:
    """Share of pictures whose own caption scores highest; rows are unit vectors."""
    best = (images @ texts.T).argmax(1).tolist()
    return sum(captions[b] == captions[i] for i, b in enumerate(best)) / len(best)


def hard_captions(world: World, scene: Scene, draw: random.Random, count: int = 100) -> list[str]:
    """The scene's full caption, then `count` - 1 wrong ones that share the thing, the hand or the background with it."""
    texts = dict.fromkeys([full_caption(scene, styles=True)])
    while len(texts) < count:
        other = scene
        for _ in range(draw.choice((1, 1, 2))):
            other = world.altered(other, draw)
        texts[full_caption(other, styles=True)] = None
    return list(texts)


def measure_clip(world: World, encode_images: Any, encode_texts: Any, count: int = 200) -> dict[str, float]:
    """Retrieval on held-out real pictures, among others' captions and among hard ones; zero-shot things and colours."""
    scenes = [world.scene(SEED, i, "held-out") for i in range(count)]
    images = encode_images([world.picture(scene) for scene in scenes])
    texts = [caption(scene, random.Random(i)) for i, scene in enumerate(scenes[:100])]
    hard = 0
    for i, scene in enumerate(scenes):
        vectors = encode_texts(hard_captions(world, scene, random.Random(i)))
        hard += int((vectors @ images[i]).argmax()) == 0
    colours = encode_texts([f"a thing on {with_article(c)} background" for c in COLOURS])
    single = [i for i, scene in enumerate(scenes) if scene.layout == "one"]
    words = encode_texts([with_article(word) for word in world.words])
    found = (images[single] @ words.T).argmax(1).tolist()
    names = list(COLOURS)
    ground = (images @ colours.T).argmax(1).tolist()
    return {
        "clip_top1_of_100_others": top1(images[:100], encode_texts(texts), texts),
        "clip_top1_of_100_hard": hard / count,
        "clip_thing": sum(world.words[w] == scenes[i].things[0].word for w, i in zip(found, single, strict=True))
        / len(single),
        "clip_colour": sum(names[c] == s.colour for c, s in zip(ground, scenes, strict=True)) / len(scenes),
    }


def measure_lpips(world: World, distance: Any, count: int = 120) -> dict[str, float]:
    """How often the distance, and plain L2, call the same drawing moved nearer than a changed one at the same place.

    Moved: shifted, turned, lighter. Changed: another artist's drawing of the thing, another thing, or a blur.
    """
    from PIL import ImageEnhance, ImageFilter

    right: dict[str, list[bool]] = {}
    for index in range(count):
        draw = random.Random(f"distort/{index}")
        scene = world.scene(SEED + 1, index, "held-out")
        picture = world.picture(scene)
        ground = picture.getpixel((0, 0))
        shift = (1, 0, draw.choice((-3, -2, 2, 3)), 0, 1, draw.choice((-3, -2, 2, 3)))
        near = [
            picture.transform(picture.size, Image.Transform.AFFINE, shift, fillcolor=ground),
            picture.rotate(draw.choice((-8, 8)), Image.Resampling.BICUBIC, fillcolor=ground),
            ImageEnhance.Brightness(picture).enhance(0.85),
        ][index % 3]
        changes: tuple[Change | None, ...] = ("artist", "thing", None)
        change = changes[index // 3 % 3]
        if change is None:
            far = picture.filter(ImageFilter.GaussianBlur(2))
        else:
            far = world.picture(world.altered(scene, draw, change))
        row = distance([picture], [near, far])[0].tolist()
        plain = [float(((np.asarray(picture, float) - np.asarray(p, float)) ** 2).mean()) for p in (near, far)]
        for name, (a, b) in (("lpips", row), ("l2", plain)):
            right.setdefault(f"moved_nearer_than_{change or 'blur'}_{name}", []).append(a < b)
    return {name: sum(values) / len(values) for name, values in sorted(right.items())}


def draw_pictures(pipe: Any, texts: list[str], seed: int, guidance: float) -> list[Image.Image]:
    """A picture of each text, 25 steps of DDIM with η = 1: fresh noise at every step mends what earlier steps got wrong."""
    import torch

    drawn: list[Image.Image] = []
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        drawn += pipe(part, num_inference_steps=25, guidance_scale=guidance, eta=1.0, generator=noise).images
    return drawn


def sample(pipe: Any, world: World, seed: int, count: int, pairs: float, split: Any, guidance: float) -> list[Sampled]:
    """Pictures of `count` scenes of the split, drawn from their full captions."""
    scenes = [world.scene(seed, i, split, pairs=pairs) for i in range(count)]
    texts = [full_caption(scene) for scene in scenes]
    rows = zip(scenes, texts, draw_pictures(pipe, texts, seed, guidance), strict=True)
    return [Sampled(scene, text, world.picture(scene), picture) for scene, text, picture in rows]


def measure_unet(world: World, samples: list[Sampled], encode_images: Any, encode_texts: Any) -> dict[str, float]:
    """What the generated pictures obey, beside what the real ones reach on the same test."""
    texts = [s.text for s in samples]
    vectors = encode_texts(texts)
    pairs = [s for s in samples if s.scene.layout == "left-right"]
    single = [s for s in samples if s.scene.layout == "one"][:40]
    near = [nearness(world, s.scene, s.drawn) for s in single]
    ordered = sum(ordered_as_asked(world, s.scene, s.drawn) for s in pairs) / max(1, len(pairs))
    return {
        "unet_captions": len(samples),
        "unet_top1": top1(encode_images([s.drawn for s in samples]), vectors, texts),
        "real_top1": top1(encode_images([s.real for s in samples]), vectors, texts),
        "unet_background": sum(named_background(s.drawn) == s.scene.colour for s in samples) / len(samples),
        "real_background": sum(named_background(s.real) == s.scene.colour for s in samples) / len(samples),
        "unet_left_right": ordered,
        "unet_nearness_db": sum(near) / max(1, len(near)),
    }


def measure_variety(
    pipe: Any, world: World, encode_images: Any, encode_texts: Any, guidance: float
) -> dict[str, float]:
    """Of 16 pictures each for four class prompts: how many backgrounds and how many artists' hands are among them, mean."""
    grounds, hands = [], []
    styles = list(world.styles.values())
    for word in world.words[:4]:
        drawn = draw_pictures(pipe, [with_article(word)] * 16, SEED + 5, guidance)
        grounds.append(len({named_background(picture) for picture in drawn}))
        names = encode_texts([with_article(f"{style} {word}") for style in styles])
        hands.append(len(set((encode_images(drawn) @ names.T).argmax(1).tolist())))
    return {"variety_backgrounds_of_11": float(np.mean(grounds)), "variety_hands_of_5": float(np.mean(hands))}

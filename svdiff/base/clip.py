"""The evaluator's CLIP: open_clip's own architecture and format, trained on the picture world.

It shares nothing with the base's text encoder, and never sees the concepts' artists; restyled sprites make it serve
hands that it does not know.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F

from svdiff.base import loop, tokenizer
from svdiff.base.autoencoder import pixels
from svdiff.base.captions import caption, full_caption
from svdiff.base.config import BaseTrainingConfig, ClipTraining
from svdiff.base.things import COLOURS
from svdiff.base.widening import load_start
from svdiff.base.world import PICTURE_SIZE, Layout, Scene, World
from svdiff.files import atomic_dir


def model_config(config: ClipTraining, tokens: Any) -> dict[str, Any]:
    """open_clip's `model_cfg`: a small ModifiedResNet and a small causal text transformer."""
    return {
        "embed_dim": config.dimensions,
        "vision_cfg": {"image_size": PICTURE_SIZE, "layers": [1, 1, 1, 1], "width": config.width, "head_width": 32},
        "text_cfg": {
            "context_length": tokenizer.MAX_TOKENS,
            "vocab_size": len(tokens),
            "hf_tokenizer_name": "tokenizer",  # any name: open_clip then reads the tokenizer in the model's folder
            "tokenizer_kwargs": {"clean": "whitespace"},
            "width": 128,
            "heads": 4,
            "layers": 2,
            "pool_type": "eos",
            "eos_id": tokens.eos_token_id,
            "pad_id": tokens.pad_token_id,
        },
    }


def build(settings: dict[str, Any]) -> Any:
    """An untrained open_clip CLIP of the given `model_cfg`."""
    import open_clip

    text = {k: v for k, v in settings["text_cfg"].items() if k not in ("hf_tokenizer_name", "tokenizer_kwargs")}
    return open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text)


@dataclass(frozen=True)
class Pool:
    """Scenes, whether each was restyled (every second one), and uint8 pictures N×3×64×64."""

    scenes: list[Scene]
    restyled: list[bool]
    pictures: torch.Tensor


def evaluation_pool(world: World, seed: int, scenes: list[Scene]) -> Pool:
    """The pictures of `scenes` on which an evaluator is trained: every second one drawn as another hand might."""
    odd = [index % 2 == 1 for index in range(len(scenes))]
    chunks = []
    for start in range(0, len(scenes), 256):
        batch = [
            world.picture(scenes[i], restyle=random.Random(f"restyle/{seed}/{i}") if odd[i] else None)
            for i in range(start, min(len(scenes), start + 256))
        ]
        chunks.append(((pixels(batch) + 1) * 127.5).round().to(torch.uint8))
    return Pool(scenes, odd, torch.cat(chunks))


_ORDER_WORDS = {"left", "right", "above", "below", "top", "under"}


def rival_captions(world: World, scene: Scene, styles: bool, draw: random.Random, rivals: int) -> list[str]:
    """A caption of the scene, then `rivals` that differ from it in one thing, hand, colour or in the order, and are not true.

    Where a change does not show in the caption (it may leave the colour out, say), the caption itself stands there.
    """
    seed = draw.random()

    def text(of: Scene) -> str:
        say = random.Random(seed)  # the same words for every scene
        return full_caption(of, styles=styles) if say.random() < 0.3 else caption(of, say, styles=styles)

    own = text(scene)
    texts = [own]
    for _ in range(rivals):
        other = world.altered(scene, draw)
        ordered = bool(_ORDER_WORDS & set(own.split()))
        swapped = {t.word for t in other.things} == {t.word for t in scene.things} and other.things != scene.things
        texts.append(own if swapped and not ordered else text(other))
    return texts


class SceneHeads(torch.nn.Module):
    """What is in the scene, told linearly from a vector of the common space, whether of a picture or of a caption.

    Contrast alone finds out slowly what captions differ in; these labels say it from the first step. They are not kept.
    """

    def __init__(self, dimensions: int, world: World) -> None:
        super().__init__()
        self.world, self.colours, self.layouts = world, list(COLOURS), list(get_args(Layout))
        things = len(world.words)
        self.sizes = (things, things + 1, len(world.artists), len(COLOURS), len(self.layouts))
        self.linear = torch.nn.Linear(dimensions, sum(self.sizes))

    def labels(self, scenes: list[Scene], restyled: list[bool]) -> torch.Tensor:
        """N×5 numbers: first thing, second (or none), hand (-100, not asked, where another's is shown), colour, layout."""
        nothing = len(self.world.words)
        rows = []
        for scene, other_hand in zip(scenes, restyled, strict=True):
            first, *second = (self.world.words.index(thing.word) for thing in scene.things)
            hand = -100 if other_hand else self.world.artists.index(scene.artist)
            colour, layout = self.colours.index(scene.colour), self.layouts.index(scene.layout)
            rows.append([first, second[0] if second else nothing, hand, colour, layout])
        return torch.tensor(rows)

    def forward(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """N×D vectors and their labels to the mean cross-entropy."""
        answers = self.linear(vectors).split(self.sizes, dim=1)
        parts = zip(answers, labels.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(answer, label, ignore_index=-100) for answer, label in parts]).mean()


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as CLIP's preprocessing leaves them."""
    import open_clip

    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return (pictures.float() / 255 - mean) / deviation


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the evaluator's CLIP and write it to `output` in open_clip's format. Returns whether it ended."""
    part = config.clip
    torch.set_num_threads(1)
    world = World(config.world, config.things)
    tokenizer.save(loop.scratch("tokenizer"))
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    settings = model_config(part, tokens)
    torch.manual_seed(config.seed + 2)
    model = build(settings).train().to(memory_format=torch.channels_last)
    if part.start_from is not None:
        load_start(model, Path(part.start_from))
    heads = SceneHeads(part.dimensions, world)
    scenes = [world.scene(config.seed + 2, index) for index in range(part.pool)]
    pool = evaluation_pool(world, config.seed + 2, scenes)
    labels = heads.labels(scenes, pool.restyled)
    learned = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=part.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        draw = random.Random(f"clip/{config.seed}/{step}")
        chosen = draw.sample(range(part.pool), part.batch_size)
        lists = [rival_captions(world, scenes[i], not pool.restyled[i], draw, part.rivals) for i in chosen]
        texts = [one[0] for one in lists]
        every = [*texts, *(text for one in lists for text in one[1:])]
        ids = tokens(every, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = normalised(pool.pictures[chosen]).contiguous(memory_format=torch.channels_last)
        shift = (draw.randint(-3, 3), draw.randint(-3, 3))
        x = x * draw.uniform(0.9, 1.1) + draw.uniform(-0.1, 0.1)
        x = F.pad(x, (3, 3, 3, 3), mode="replicate")[..., 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]]
        with loop.autocast():
            seen, told = model.encode_image(x).float(), model.encode_text(ids).float()
        image, text = F.normalize(seen, dim=1), F.normalize(told, dim=1)
        scale = model.logit_scale.exp().clamp(max=100)
        # Two captions may both be true of a picture; the same text twice in a batch is not a distractor.
        same = torch.tensor([[a == b for b in texts] for a in texts]) & ~torch.eye(len(texts), dtype=torch.bool)
        logits = (scale * image @ text[: len(texts)].T).masked_fill(same, -1e4)
        silent = torch.tensor([[rival == one[0] for rival in one[1:]] for one in lists]).view(len(texts), -1)
        rivals = scale * torch.einsum("nd,nkd->nk", image, text[len(texts) :].view(len(texts), part.rivals, -1))
        hard = torch.cat([logits, rivals.masked_fill(silent, -1e4)], dim=1)
        target = torch.arange(len(texts))
        loss = (F.cross_entropy(hard, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + heads(seen, labels[chosen]) + 0.5 * heads(told[: len(texts)], labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        right = (hard.argmax(1) == target).float().mean()
        return {"loss": loss.item(), "top1": right.item()}

    return loop.run(
        "clip",
        steps=part.steps,
        state={"model": model, "heads": heads, "optimiser": optimiser},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        # The length may be changed on the way.
        identity=f"{part.model_dump_json(exclude={'steps'})}/{config.things}/{config.seed}",
        on_checkpoint=lambda step: _write(model, settings, output),
        stop_after=stop_after,
    )


def _write(model: torch.nn.Module, settings: dict[str, Any], output: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    settings = {**settings, "text_cfg": {k: v for k, v in settings["text_cfg"].items() if k != "tokenizer_kwargs"}}
    with atomic_dir(output) as target:
        content = {"model_cfg": settings, "preprocess_cfg": preprocess}
        (target / "open_clip_config.json").write_text(json.dumps(content, indent=1))
        weights = {
            k: (v.half() if v.is_floating_point() else v).contiguous().clone() for k, v in model.state_dict().items()
        }
        save_file(weights, target / "open_clip_model.safetensors")
        for path in loop.scratch("tokenizer").iterdir():
            shutil.copy(path, target / path.name)
        loop.make_readable(target)

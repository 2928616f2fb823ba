"""The evaluator's CLIP: open_clip's own architecture and format, trained on the picture world.

It shares nothing with the base's text encoder and never sees a held-out individual. Captions that are wrong in one
respect (who, a trait, the expression, the background, the order) are its hardest rivals.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from svdiff.base import loop, tokenizer
from svdiff.base.captions import caption, full_caption, vocabulary
from svdiff.base.compose import PICTURE_SIZE, compose
from svdiff.base.config import BaseTrainingConfig, ClipTraining
from svdiff.base.text_encoder import load_tokenizer, named_count
from svdiff.base.world import Scene, World
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


_ORDER_WORDS = {"left", "right", "above", "below", "top", "under"}


def rival_captions(world: World, scene: Scene, draw: random.Random, rivals: int) -> list[str]:
    """A caption of the scene, then `rivals` that differ from it in one respect and are not true.

    Where a change does not show in the caption (it may leave the colour out, say), the caption itself stands there.
    """
    seed = draw.random()

    def text(of: Scene) -> str:
        say = random.Random(seed)  # the same words for every scene
        return full_caption(of) if say.random() < 0.4 else caption(of, say)

    own = text(scene)
    texts = [own]
    for _ in range(rivals):
        other, change = world.altered(scene, draw)
        ordered = bool(_ORDER_WORDS & set(own.split()))
        # Of two individuals, one may be said without what was changed, and then the other caption is true as well.
        texts.append(own if change == "order" and not ordered else text(other))
    return texts


class WordHeads(torch.nn.Module):
    """Which words the full caption holds, told linearly from a vector: contrast alone finds out slowly."""

    def __init__(self, dimensions: int, words: list[str]) -> None:
        super().__init__()
        self.index = {word: number for number, word in enumerate(words)}
        self.linear = torch.nn.Linear(dimensions, len(words))

    def labels(self, scenes: list[Scene]) -> torch.Tensor:
        """N×words zeros and ones."""
        rows = torch.zeros(len(scenes), len(self.index))
        for row, scene in zip(rows, scenes, strict=True):
            row[[self.index[word] for word in full_caption(scene).split()]] = 1
        return rows

    def forward(self, vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """N×D vectors and their labels to the mean cross-entropy, summed over the words."""
        return F.binary_cross_entropy_with_logits(self.linear(vectors), labels, reduction="sum") / len(vectors)


def caption_words() -> list[str]:
    """Words that full captions can hold."""
    return vocabulary(0)


def normalised(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 N×H×W×3 as CLIP's preprocessing leaves them, N×3×H×W."""
    import open_clip

    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=pictures.device).view(1, 3, 1, 1)
    deviation = torch.tensor(open_clip.OPENAI_DATASET_STD, device=pictures.device).view(1, 3, 1, 1)
    return (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the evaluator's CLIP and write it to `output` in open_clip's format. Returns whether it ended."""
    part, where = config.clip, loop.device()
    world = loop.load_world(config)
    tokens = load_tokenizer(config)
    settings = model_config(part, tokens)
    torch.manual_seed(config.seed + 2)
    model = build(settings).train().to(where, memory_format=torch.channels_last)
    heads = WordHeads(part.dimensions, caption_words()).to(where)
    learned = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=part.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    table = world.table(where)

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        chance = random.Random(f"clip/{config.seed}/{step}")
        numbers = range(step * part.batch_size, (step + 1) * part.batch_size)
        scenes = [world.scene(config.seed + 2, n, named=0.0, strangers=0.15) for n in numbers]
        lists = [rival_captions(world, scene, chance, part.rivals) for scene in scenes]
        texts = [one[0] for one in lists]
        every = [*texts, *(text for one in lists for text in one[1:])]
        ids = tokens(every, padding="max_length", truncation=True, return_tensors="pt").input_ids
        # The same text twice in a batch is no distractor.
        codes = torch.tensor([texts.index(text) for text in texts])
        same = (codes[:, None] == codes) & ~torch.eye(len(texts), dtype=torch.bool)
        silent = torch.tensor([[rival == one[0] for rival in one[1:]] for one in lists]).view(len(texts), -1)
        return *world.layout(scenes), ids, same, silent, heads.labels(scenes)

    def learn(
        step: int,
        places: torch.Tensor,
        backgrounds: torch.Tensor,
        ids: torch.Tensor,
        same: torch.Tensor,
        silent: torch.Tensor,
        labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        chance = random.Random(f"clip/{config.seed}/{step}/light")
        x = _in_another_light(normalised(compose(table, places, backgrounds)), chance)
        with loop.autocast(where):
            seen = model.encode_image(x.contiguous(memory_format=torch.channels_last)).float()
            told = model.encode_text(ids).float()
        image, text = F.normalize(seen, dim=1), F.normalize(told, dim=1)
        scale = model.logit_scale.exp().clamp(max=100)
        logits = (scale * image @ text[: len(image)].T).masked_fill(same, -1e4)
        rivals = scale * torch.einsum("nd,nkd->nk", image, text[len(image) :].view(len(image), part.rivals, -1))
        hard = torch.cat([logits, rivals.masked_fill(silent, -1e4)], dim=1)
        target = torch.arange(len(image), device=where)
        loss = (F.cross_entropy(hard, target) + F.cross_entropy(logits.T, target)) / 2
        loss = loss + 0.2 * heads(seen, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return {"loss": loss, "top1": (hard.argmax(1) == target).float().mean()}

    return loop.run(
        "clip",
        steps=part.steps,
        state={"model": model, "heads": heads, "optimiser": optimiser},
        draw=draw,
        learn=learn,
        config=config,
        # The length may be changed on the way.
        identity=f"{part.model_dump_json(exclude={'steps'})}/{config.world}/{config.seed}/{named_count(config)}",
        on_checkpoint=lambda step: _write(model, settings, output),
        stop_after=stop_after,
    )


def _in_another_light(x: torch.Tensor, chance: random.Random) -> torch.Tensor:
    """The N×3×H×W pictures moved by up to three pixels, brighter or darker, some of them softer, as a generator's are."""
    left, top = 3 + chance.randint(-3, 3), 3 + chance.randint(-3, 3)
    x = x * chance.uniform(0.9, 1.1) + chance.uniform(-0.1, 0.1)
    x = F.pad(x, (3, 3, 3, 3), mode="replicate")[..., left : left + PICTURE_SIZE, top : top + PICTURE_SIZE]
    if chance.random() < 0.3:
        from torchvision.transforms.functional import gaussian_blur

        x = gaussian_blur(x, 5, chance.uniform(0.4, 1.2))
    return x


def _write(model: torch.nn.Module, settings: dict[str, Any], output: Path) -> None:
    import open_clip
    from safetensors.torch import save_file

    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    settings = {**settings, "text_cfg": {k: v for k, v in settings["text_cfg"].items() if k != "tokenizer_kwargs"}}
    with atomic_dir(output) as target:
        content = {"model_cfg": settings, "preprocess_cfg": preprocess}
        (target / "open_clip_config.json").write_text(json.dumps(content, indent=1))
        weights = {
            k: (v.half() if v.is_floating_point() else v).cpu().contiguous().clone()
            for k, v in model.state_dict().items()
        }
        save_file(weights, target / "open_clip_model.safetensors")
        for path in loop.scratch("tokenizer").iterdir():
            shutil.copy(path, target / path.name)
        loop.make_readable(target)

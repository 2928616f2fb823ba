"""The evaluator's CLIP: open_clip's own architecture and format, trained on the picture world.

It shares nothing with the base's text encoder, and never sees the concepts' artists; restyled sprites make it serve
hands that it does not know.
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
from svdiff.base.autoencoder import pixels
from svdiff.base.captions import caption
from svdiff.base.config import BaseTrainingConfig, ClipTraining
from svdiff.base.world import PICTURE_SIZE, Scene, World
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


def evaluation_pool(world: World, seed: int, count: int) -> tuple[list[Scene], list[bool], torch.Tensor]:
    """Scenes, whether each was restyled (every second one), and uint8 pictures N×3×64×64."""
    scenes = [world.scene(seed, index) for index in range(count)]
    odd = [index % 2 == 1 for index in range(count)]
    chunks = []
    for start in range(0, count, 256):
        batch = [
            world.picture(scenes[i], restyle=random.Random(f"restyle/{seed}/{i}") if odd[i] else None)
            for i in range(start, min(count, start + 256))
        ]
        chunks.append(((pixels(batch) + 1) * 127.5).round().to(torch.uint8))
    return scenes, odd, torch.cat(chunks)


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
    model = build(settings).train()
    scenes, restyled, pictures = evaluation_pool(world, config.seed + 2, part.pool)
    optimiser = torch.optim.AdamW(model.parameters(), lr=part.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 50, 0.9)
        draw = random.Random(f"clip/{config.seed}/{step}")
        chosen = draw.sample(range(part.pool), part.batch_size)
        texts = [caption(scenes[i], draw, styles=not restyled[i]) for i in chosen]
        ids = tokens(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        x = normalised(pictures[chosen])
        shift = (draw.randint(-3, 3), draw.randint(-3, 3))
        x = x * draw.uniform(0.9, 1.1) + draw.uniform(-0.1, 0.1)
        x = F.pad(x, (3, 3, 3, 3), mode="replicate")[..., 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]]
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(x, normalize=True).float()
            text = model.encode_text(ids, normalize=True).float()
        # Two captions may both be true of a picture; the same text twice in a batch is not a distractor.
        same = torch.tensor([[a == b for b in texts] for a in texts]) & ~torch.eye(len(texts), dtype=torch.bool)
        logits = (model.logit_scale.exp().clamp(max=100) * image @ text.T).masked_fill(same, -1e4)
        target = torch.arange(len(texts))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        right = (logits.argmax(1) == target).float().mean()
        return {"loss": loss.item(), "top1": right.item()}

    ended = loop.run(
        "clip",
        steps=part.steps,
        state={"model": model, "optimiser": optimiser},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        identity=f"{part.model_dump_json()}/{config.things}/{config.seed}",
        stop_after=stop_after,
    )
    if ended:
        _write(model, settings, output)
    return ended


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

"""The text encoder learns to read before the UNet learns to draw: from a caption, what is at each place of the picture.

No picture is needed for that, and it takes minutes. Learned from the UNet's loss alone, words' order (which of two
things is on the left) came out at chance. Like Stable Diffusion's, the encoder is frozen afterwards.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from svdiff.base import loop, tokenizer
from svdiff.base.captions import caption
from svdiff.base.config import BaseTrainingConfig, TextTraining
from svdiff.base.things import COLOURS, HAND_WORDS, SPECIAL_WORDS
from svdiff.base.widening import load_start
from svdiff.base.world import GRID, PICTURE_SIZE, Scene, World
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SIDE = PICTURE_SIZE // GRID  # cells of the grid, which are the latent's positions
NOT_ASKED = -100  # the label that cross-entropy leaves out


def build_text_encoder(config: TextTraining, tokens: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer's vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    settings = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        projection_dim=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_TOKENS,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    settings._attn_implementation = "eager"
    return CLIPTextModel(settings)


def cells(scene: Scene, words: list[str]) -> torch.Tensor:
    """What is at each cell (SIDE × SIDE, row by row): the thing's number in `words`, or len(words) for the background."""
    return _at_cells(scene, [words.index(thing.word) for thing in scene.things], len(words))


def hand_cells(scene: Scene) -> torch.Tensor:
    """Who redrew what is at each cell: the hand's number in HAND_WORDS, len(HAND_WORDS) if nobody, NOT_ASKED elsewhere."""
    hands = [len(HAND_WORDS) if t.hand is None else HAND_WORDS.index(t.hand) for t in scene.things]
    return _at_cells(scene, hands, NOT_ASKED)


def _at_cells(scene: Scene, values: list[int], background: int) -> torch.Tensor:
    found = torch.full((SIDE, SIDE), background)
    for thing, value in zip(scene.things, values, strict=True):
        left, top = (round((middle - thing.size / 2) * SIDE) for middle in (thing.x, thing.y))
        span = round(thing.size * SIDE)
        found[top : top + span, left : left + span] = value
    return found.flatten()


class Reader(nn.Module):
    """The encoder under one layer of cross-attention, in which every cell of the picture asks what it is to show."""

    def __init__(self, text_encoder: CLIPTextModel, width: int, things: int, artists: int) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.cells = nn.Parameter(torch.randn(SIDE * SIDE, width))
        self.ask = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.thing = nn.Linear(2 * width, things + 1)
        self.hand = nn.Linear(2 * width, len(HAND_WORDS) + 1)
        self.artist = nn.Linear(2 * width, artists)
        self.colour = nn.Linear(2 * width, len(COLOURS))

    def forward(
        self, ids: torch.Tensor, thing: torch.Tensor, hand: torch.Tensor, artist: torch.Tensor, colour: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Caption tokens, and what they tell of (cells of things N×64, of hands N×64, artists N, colours N), to the loss.

        `read` is the share of the things' cells that are told right; captions leave much open, so it stays below 1.
        """
        states = self.text_encoder(ids).last_hidden_state
        answers, _ = self.ask(self.cells.expand(len(ids), -1, -1), states, states, need_weights=False)
        thoughts = self.think(answers)
        logits = self.thing(thoughts).flatten(0, 1)
        whole = thoughts.mean(1)
        loss = F.cross_entropy(logits, thing.flatten())
        loss = loss + 0.3 * F.cross_entropy(self.hand(thoughts).flatten(0, 1), hand.flatten(), ignore_index=NOT_ASKED)
        loss = loss + 0.1 * (F.cross_entropy(self.artist(whole), artist) + F.cross_entropy(self.colour(whole), colour))
        drawn = thing.flatten() < logits.shape[1] - 1
        read = (logits[:, :-1].argmax(1) == thing.flatten())[drawn].float().mean()
        return loss, {"loss": loss.item(), "read": read.item()}


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the text encoder and write it to `output` in transformers' layout; resumes. Returns whether it ended."""
    part = config.text
    world = World(config.world, config.things)
    tokenizer.save(loop.scratch("tokenizer"))
    tokens = tokenizer.load(loop.scratch("tokenizer"))
    torch.manual_seed(config.seed + 4)
    reader = Reader(build_text_encoder(part, tokens), part.width, len(world.words), len(world.artists))
    if part.start_from is not None:
        load_start(reader.text_encoder, Path(part.start_from))
    optimiser = torch.optim.AdamW(reader.parameters(), part.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    gradients = loop.Halves(reader)
    colours = list(COLOURS)

    def step_fn(step: int) -> dict[str, float]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 100, 0.9)
        first = step * part.batch_size
        scenes = [world.scene(config.seed + 4, first + i, pairs=0.6, hands=0.35) for i in range(part.batch_size)]
        draw = random.Random(f"text/{config.seed}/{step}")
        texts = ["" if draw.random() < 0.05 else caption(scene, draw) for scene in scenes]
        ids = tokens(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        numbers = gradients(
            ids,
            torch.stack([cells(scene, world.words) for scene in scenes]),
            torch.stack([hand_cells(scene) for scene in scenes]),
            torch.tensor([world.artists.index(scene.artist) for scene in scenes]),
            torch.tensor([colours.index(scene.colour) for scene in scenes]),
        )
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        return numbers

    ended = loop.run(
        "text",
        steps=part.steps,
        state={"reader": reader, "optimiser": optimiser},
        step_fn=step_fn,
        checkpoint_seconds=config.checkpoint_seconds,
        identity=f"{part.model_dump_json()}/{config.things}/{config.seed}",
        stop_after=stop_after,
    )
    gradients.close()
    if ended:
        _spread_special_words(reader.text_encoder, tokens, config.seed)
        with atomic_dir(output) as target:
            reader.text_encoder.save_pretrained(target)
            loop.make_readable(target)
    return ended


@torch.no_grad()
def _spread_special_words(text_encoder: Any, tokens: CLIPTokenizer, seed: int) -> None:
    """Give the special words embeddings as large as those of the words for hands, in directions of their own.

    So `a sks dog` starts as a dog by nobody in particular.
    """
    table = text_encoder.get_input_embeddings().weight
    hands = table[tokens.convert_tokens_to_ids([f"{word}</w>" for word in HAND_WORDS])]
    mean, deviation = hands.mean(0), hands.std(0)
    generator = torch.Generator().manual_seed(seed)
    for word in SPECIAL_WORDS:
        noise = torch.randn(table.shape[1], generator=generator)
        table[tokens.convert_tokens_to_ids(f"{word}</w>")] = mean + deviation * noise

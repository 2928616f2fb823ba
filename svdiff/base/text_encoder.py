"""The text encoder learns to read before the UNet learns to draw: from a caption, what is at each place of the picture.

No picture is needed for that, and it takes minutes. Learned from the UNet's loss alone, words' order (which of two is
on the left) comes out at chance. Names of individuals come to mean all of their traits. Like Stable Diffusion's, the
encoder is frozen afterwards.
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
from svdiff.base.compose import PICTURE_SIZE
from svdiff.base.config import BaseTrainingConfig, TextTraining
from svdiff.base.individuals import Individual, variants
from svdiff.base.styles import BY_NAME, EXPRESSIONS, STYLES
from svdiff.base.words import COLOURS, SPECIAL_WORDS, THINGS, made_up_words
from svdiff.base.world import GRID, SIDES, Placed, Scene
from svdiff.files import atomic_dir

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CELLS = PICTURE_SIZE // GRID  # cells of a row of the grid, which are the latent's positions
NOT_ASKED = -100  # the label that cross-entropy leaves out


def build(config: TextTraining, tokens: CLIPTokenizer) -> CLIPTextModel:
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


class Labels:
    """What a caption can tell of a scene, as numbers: per cell who or what is there, per object its style and traits."""

    def __init__(self, kinds: list[str]) -> None:
        self.whats = [*kinds, *THINGS]
        self.styles = [style.name for style in STYLES if not style.held_out]
        self.traits = {
            (name, trait): list(variants(BY_NAME[name], trait))
            for name in self.styles
            for trait in BY_NAME[name].traits
        }
        # One block of answers each: style, side, expression, then every trait of every style with "absent" last.
        self.sizes = [len(self.styles), len(SIDES), len(EXPRESSIONS), *(len(v) + 1 for v in self.traits.values())]

    def cells(self, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """For each cell, row by row: what is there (len(whats) for background), and the number of the object (-1)."""
        what, number = torch.full((CELLS, CELLS), len(self.whats)), torch.full((CELLS, CELLS), -1)
        for n, one in enumerate(scene.placed):
            left, top, span = one.left // GRID, one.top // GRID, one.side // GRID
            what[top : top + span, left : left + span] = self.whats.index(one.what.kind)
            number[top : top + span, left : left + span] = n
        return what.flatten(), number.flatten()

    def traits_of(self, one: Placed | None) -> list[int]:
        """A number for each block of answers; NOT_ASKED where it is no question for this object."""
        answers = [NOT_ASKED] * len(self.sizes)
        if one is None:
            return answers
        answers[1] = SIDES.index(one.side)
        if isinstance(one.what, Individual):
            answers[0] = self.styles.index(one.what.style)
            answers[2] = EXPRESSIONS.index(one.expression)
            traits = dict(one.what.traits)
            for block, ((style, trait), values) in enumerate(self.traits.items(), 3):
                if style == one.what.style:
                    answers[block] = values.index(traits[trait]) if trait in traits else len(values)
        return answers


class Reader(nn.Module):
    """The encoder under one layer of cross-attention, in which every cell of the picture asks what it is to show."""

    def __init__(self, text_encoder: CLIPTextModel, width: int, labels: Labels) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.sizes = labels.sizes
        self.cells = nn.Parameter(torch.randn(CELLS * CELLS, width))
        self.ask = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU())
        self.what = nn.Linear(2 * width, len(labels.whats) + 1)
        self.traits = nn.Linear(2 * width, sum(labels.sizes))
        self.colour = nn.Linear(2 * width, len(COLOURS))

    def forward(
        self, ids: torch.Tensor, what: torch.Tensor, number: torch.Tensor, traits: torch.Tensor, colour: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Tokens N×L and what they tell (cells N×64, objects' numbers N×64, traits N×2×blocks, colours N), to `loss`.

        `read` is the share of the objects' cells that are told right; captions leave much open, so it stays below 1.
        """
        states = self.text_encoder(ids).last_hidden_state
        answers, _ = self.ask(self.cells.expand(len(ids), -1, -1), states, states, need_weights=False)
        thoughts = self.think(answers)
        logits = self.what(thoughts).flatten(0, 1)
        loss = F.cross_entropy(logits, what.flatten())
        loss = loss + 0.1 * F.cross_entropy(self.colour(thoughts.mean(1)), colour)
        masks = torch.stack([number == 0, number == 1]).float()[..., None]  # 2×N×64×1
        seen = (thoughts * masks).sum(2) / masks.sum(2).clamp(min=1)
        for block, answer in enumerate(self.traits(seen).flatten(0, 1).split(self.sizes, dim=1)):
            told = F.cross_entropy(answer, traits[..., block].T.flatten(), ignore_index=NOT_ASKED, reduction="sum")
            loss = loss + 0.15 * told / len(ids)
        drawn = what.flatten() < logits.shape[1] - 1
        right = (logits[:, :-1].argmax(1) == what.flatten()) & drawn
        return {"loss": loss, "read": right.sum() / drawn.sum()}


def named_count(config: BaseTrainingConfig) -> int:
    """How many made-up words are names."""
    return config.world.named * sum(not style.held_out for style in STYLES)


def load_tokenizer(config: BaseTrainingConfig) -> CLIPTokenizer:
    """The world's tokenizer, written to the scratch folder."""
    tokenizer.save(loop.scratch("tokenizer"), named_count(config))
    return tokenizer.load(loop.scratch("tokenizer"))


def train(config: BaseTrainingConfig, output: Path, *, stop_after: int | None = None) -> bool:
    """Train the text encoder and write it to `output` in transformers' layout; resumes. Returns whether it ended."""
    part, where = config.text, loop.device()
    world = loop.load_world(config)
    tokens = load_tokenizer(config)
    torch.manual_seed(config.seed + 4)
    labels = Labels(world.kinds)
    reader = Reader(build(part, tokens), part.width, labels).to(where)
    optimiser = torch.optim.AdamW(reader.parameters(), part.lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    colours = list(COLOURS)

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        first = step * part.batch_size
        scenes = [world.scene(config.seed + 4, first + i, pairs=0.5, named=0.45) for i in range(part.batch_size)]
        chance = random.Random(f"text/{config.seed}/{step}")
        texts = ["" if chance.random() < 0.05 else caption(scene, chance) for scene in scenes]
        ids = tokens(texts, padding="longest", return_tensors="pt").input_ids
        what, number = zip(*(labels.cells(scene) for scene in scenes), strict=True)
        traits = [[labels.traits_of(one) for one in (*scene.placed, None)[:2]] for scene in scenes]
        told = torch.tensor([colours.index(scene.colour) for scene in scenes])
        return ids, torch.stack(what), torch.stack(number), torch.tensor(traits), told

    def learn(step: int, *drawn: torch.Tensor) -> dict[str, torch.Tensor]:
        for group in optimiser.param_groups:
            group["lr"] = part.lr * loop.cosine_rate(step, part.steps, 100, 0.9)
        numbers: dict[str, torch.Tensor] = reader(*drawn)
        numbers["loss"].backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return numbers

    ended = loop.run(
        "text",
        steps=part.steps,
        state={"reader": reader, "optimiser": optimiser},
        draw=draw,
        learn=learn,
        config=config,
        identity=f"{part.model_dump_json()}/{config.world}/{config.seed}",
        stop_after=stop_after,
    )
    if ended:
        _draw_special_words(reader.text_encoder.cpu(), tokens, named_count(config), config.seed)
        with atomic_dir(output) as target:
            reader.text_encoder.save_pretrained(target)
            loop.make_readable(target)
    return ended


@torch.no_grad()
def _draw_special_words(text_encoder: Any, tokens: CLIPTokenizer, names: int, seed: int) -> None:
    """Draw the special words' embeddings from the distribution of the names' (their mean and covariance).

    So `a sks cat` starts as somebody's name: one individual, though nobody in particular.
    """
    table = text_encoder.get_input_embeddings().weight
    known = table[tokens.convert_tokens_to_ids([f"{word}</w>" for word in made_up_words()[:names]])]
    mean, deviation = known.mean(0), known.std(0)
    generator = torch.Generator().manual_seed(seed)
    for word in SPECIAL_WORDS:
        noise = torch.randn(table.shape[1], generator=generator)
        table[tokens.convert_tokens_to_ids(f"{word}</w>")] = mean + deviation * noise

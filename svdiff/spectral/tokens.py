"""Embeddings of special tokens that stand in for rows of a text encoder's table: trained, or loaded with a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file
from svdiff.spectral.layers import SpectralLayer

MARK = ".special_token."


def token_name(encoder: str, token_id: int) -> str:
    """Name of a token's change in delta files: 'text_encoder.special_token.412'."""
    return f"{encoder}{MARK}{token_id}"


def parse_token_name(name: str) -> tuple[str, int]:
    """Text encoder and token id of a `token_name`."""
    encoder, _, token_id = name.partition(MARK)
    return encoder, int(token_id)


class TokenEmbedding:
    """One token's embedding e in the place of its row e₀ of the table, which stays as it is.

    `value` is one row (width,), or one a picture (pictures, width) in mixed batches.
    """

    def __init__(self, encoder: Any, token_id: int) -> None:
        self.encoder, self.token_id = encoder, token_id
        layer = encoder.get_input_embeddings()
        table = layer.base_weight() if isinstance(layer, SpectralLayer) else layer.weight.data
        self.base = table[token_id].detach().float().cpu().clone()
        self.value = Parameter(self.base.clone().to(table.device), requires_grad=False)
        self._hook: Any = None
        self._row: Tensor | None = None  # of the table, while the value stands in it
        self.follow()

    def follow(self) -> None:
        """Act on the layer that looks embeddings up now: attaching, fusing and detaching shifts exchange it."""
        self.remove()
        self._hook = self.encoder.get_input_embeddings().register_forward_hook(self._insert)

    def _insert(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        value = self.value.to(output.device, output.dtype)
        if value.ndim == 2:  # one a picture; under guidance the text encoder sees the batch of pictures at once
            value = value.repeat(len(output) // len(value), 1)[:, None]
        return torch.where((inputs[0] == self.token_id).unsqueeze(-1), value, output)

    @property
    def change(self) -> Tensor:
        """e − e₀, float32 on the CPU."""
        return self.value.detach().float().cpu() - self.base

    @torch.no_grad()
    def set_change(self, change: Tensor | Sequence[Tensor]) -> None:
        """Use e₀ + `change`, or one for each picture of a batch. Raises SvdiffError for another width."""
        rows = torch.stack(list(change)) if not isinstance(change, Tensor) else change
        if rows.shape[-1] != len(self.base):
            raise SvdiffError(
                f"the delta's embedding of token {self.token_id} has {rows.shape[-1]} numbers, the text encoder's "
                f"{len(self.base)}: it was trained on another base"
            )
        self.value.data = (self.base + rows).to(self.value.device)

    @torch.no_grad()
    def fuse(self) -> None:
        """Put the value into the table itself, which must be a plain one: what saves the model saves it."""
        table = self.encoder.get_input_embeddings().weight
        if self._row is None:
            self._row = table.data[self.token_id].clone()
            table.data[self.token_id] = self.value.to(table)
            self.remove()

    @torch.no_grad()
    def unfuse(self) -> None:
        """Undo `fuse`."""
        if self._row is not None:
            self.encoder.get_input_embeddings().weight.data[self.token_id] = self._row
            self._row = None
            self.follow()

    def remove(self) -> None:
        """The table's own row again."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def mix_changes(parts: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Changes of embeddings by name under `Σ wᵢ δᵢ`.

    Where several deltas changed one token its embedding is their weighted mean: a sum of two names is no name.
    """
    total: dict[str, Tensor] = {}
    weights: dict[str, list[float]] = {}
    for changes, weight in parts:
        for name, change in changes.items():
            total[name] = total.get(name, torch.zeros_like(change)) + weight * change
            weights.setdefault(name, []).append(weight)
    return {
        name: change / max(1.0, sum(weights[name])) if len(weights[name]) > 1 else change
        for name, change in total.items()
    }


class LoadedTokens:
    """The embeddings of special tokens that come with the deltas of a pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.changes: dict[str, Mapping[str, Tensor]] = {}  # by delta
        self.embeddings: dict[str, TokenEmbedding] = {}  # by token

    def load(self, delta: str, changes: Mapping[str, Tensor]) -> None:
        """Keep the changes of a delta. Raises SvdiffError for a pipeline without such a text encoder."""
        for name in changes:
            encoder, token_id = parse_token_name(name)
            if name not in self.embeddings:
                if getattr(self.pipe, encoder, None) is None:
                    raise SvdiffError(f"the delta changes a token of {encoder}, which this pipeline does not have")
                self.embeddings[name] = TokenEmbedding(getattr(self.pipe, encoder), token_id)
        self.changes[delta] = changes

    def use(self, mixes: Sequence[Mapping[str, float]]) -> None:
        """Put the changes of deltas with weights in force: for all pictures, or one of `mixes` for each."""
        mixed = [mix_changes([(self.changes[delta], weight) for delta, weight in mix.items()]) for mix in mixes]
        for name, embedding in self.embeddings.items():
            rows = [changes.get(name, torch.zeros_like(embedding.base)) for changes in mixed]
            embedding.set_change(rows[0] if len(rows) == 1 else rows)

    def forget(self, delta: str) -> None:
        """Drop the changes of a delta."""
        self.changes.pop(delta)

    def follow(self) -> None:
        """See `TokenEmbedding.follow`."""
        for embedding in self.embeddings.values():
            embedding.follow()

    def fuse(self) -> None:
        """See `TokenEmbedding.fuse`; after the shifts of the text encoder."""
        for embedding in self.embeddings.values():
            embedding.fuse()

    def unfuse(self) -> None:
        """See `TokenEmbedding.unfuse`; before the shifts of the text encoder."""
        for embedding in self.embeddings.values():
            embedding.unfuse()

    def unload(self) -> None:
        """The tables' own rows again."""
        for embedding in self.embeddings.values():
            embedding.unfuse()
            embedding.remove()
        self.changes, self.embeddings = {}, {}


def export_tokens(pipe: Any, tokens: Mapping[str, Tensor], lora: str | Path) -> list[Path]:
    """Write a delta's embeddings beside an exported LoRA, as textual inversion: <lora's name>-<token>.safetensors each.

    A file holds the embedding under the token's name, or under `clip_l` and `clip_g` where there are two text encoders.
    """
    by_token: dict[str, dict[str, Tensor]] = {}
    for name, change in tokens.items():
        encoder, token_id = parse_token_name(name)
        tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
        row = TokenEmbedding(getattr(pipe, encoder), token_id)
        row.remove()
        by_token.setdefault(tokenizer.decode([token_id]).replace("</w>", "").strip(), {})[encoder] = row.base + change
    paths = []
    for token, rows in by_token.items():
        keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        content = {(token if len(rows) == 1 else keys[encoder]): value[None] for encoder, value in rows.items()}
        paths.append(Path(lora).with_name(f"{Path(lora).stem}-{token}.safetensors"))
        with atomic_file(paths[-1]) as temporary:
            save_file({name: value.contiguous() for name, value in content.items()}, temporary)
    return paths

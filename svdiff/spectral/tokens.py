"""Embeddings of special tokens that stand in for rows of a text encoder's table: trained, or loaded with a delta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import Parameter

from svdiff.errors import SvdiffError
from svdiff.files import atomic_file
from svdiff.spectral.batch import Batch, rows_of
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

    `value` is one row (width,), or in mixed batches a row for each concept, of which `batch` gives each text one.
    """

    def __init__(self, encoder: Any, token_id: int, *, saved: bool = False) -> None:
        """`saved` says whether the text encoder's state dict has the value in it, as a pipeline's must."""
        self.encoder, self.token_id, self.saved = encoder, token_id, saved
        layer = encoder.get_input_embeddings()
        table = layer.base_weight() if isinstance(layer, SpectralLayer) else layer.weight.data
        self.base = table[token_id].detach().float().cpu().clone()
        self.value = Parameter(self.base.clone().to(table.device), requires_grad=False)
        self.batch = Batch()
        self._hooks: list[Any] = []
        self._row: Tensor | None = None  # of the table, while the value stands in it
        self.follow()

    def follow(self) -> None:
        """Act on the layer that looks embeddings up now: attaching, fusing and detaching shifts exchange it."""
        self.remove()
        layer = self.encoder.get_input_embeddings()
        self._hooks = [layer.register_forward_hook(self._insert)]
        if self.saved:
            save = partial(TokenEmbedding._save, self)  # torch marks the hook, which a bound method does not allow
            self._hooks.append(layer.register_state_dict_post_hook(save))

    def _insert(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mine = inputs[0] == self.token_id
        if not mine.any():
            return output  # without gradients where none are due
        value = self.value.to(output.device, output.dtype)
        if value.ndim > 1:
            if self.batch.index is None:
                raise SvdiffError(
                    f"the token has values of {len(value)} concepts, and nothing says which text takes which: assign an index, "
                    "one entry a text"
                )
            value = value[rows_of(self.batch.index, inputs[0])][:, None]
        return torch.where(mine.unsqueeze(-1), value, output)

    def _save(self, module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        """What saves the model saves the table with the value in it."""
        if self.value.ndim > 1:
            raise SvdiffError("the model holds several concepts at once, which cannot be saved: choose one first")
        if self.change.any():
            table = state[f"{prefix}weight"].clone()
            table[self.token_id] = self.value.detach().to(table)
            state[f"{prefix}weight"] = table

    @property
    def change(self) -> Tensor:
        """e − e₀, float32 on the CPU."""
        return self.value.detach().float().cpu() - self.base

    @torch.no_grad()
    def set_change(self, change: Tensor, index: Sequence[int] | None = None) -> None:
        """Use e₀ + `change`, or of a row for each concept the one that `index` gives each picture.

        Raises SvdiffError for another width.
        """
        if change.shape[-1] != len(self.base):
            raise SvdiffError(
                f"the delta's embedding of token {self.token_id} has {change.shape[-1]} numbers, the text encoder's "
                f"{len(self.base)}: it was trained on another base"
            )
        self.batch.assign(index, 1 if index is None else len(change))
        self.value.data = (self.base + change).to(self.value.device)

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
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


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
                self.embeddings[name] = TokenEmbedding(getattr(self.pipe, encoder), token_id, saved=True)
        self.changes[delta] = changes

    def use(self, mixes: Sequence[Mapping[str, float]], index: Sequence[int] | None = None) -> None:
        """Put the changes of deltas with weights in force: of the one mix, or of the one that each picture has."""
        mixed = [mix_changes([(self.changes.get(delta, {}), weight) for delta, weight in mix.items()]) for mix in mixes]
        for name, embedding in self.embeddings.items():
            rows = torch.stack([changes.get(name, torch.zeros_like(embedding.base)) for changes in mixed])
            embedding.set_change(rows[0] if index is None else rows, index)

    def forget(self, delta: str) -> None:
        """Drop the changes of a delta."""
        self.changes.pop(delta)

    def follow(self) -> None:
        """See `TokenEmbedding.follow`."""
        for embedding in self.embeddings.values():
            embedding.follow()

    def remove(self) -> None:
        """The tables' own rows again, until `follow`."""
        for embedding in self.embeddings.values():
            embedding.remove()

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

"""Special tokens in training: where their embeddings start, and training them beside what a method trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Family
from svdiff.spectral.tokens import MARK, TokenEmbedding, token_name

if TYPE_CHECKING:
    from svdiff.training.methods import Method

NAMES = "names.json"  # beside a tokenizer's files: words that the base was trained to take for somebody's name


def wants_tokens(config: TrainConfig) -> bool:
    """Whether a training changes the embeddings of special tokens."""
    return config.method == "custom-diffusion" or config.train_token or config.token_init != "keep"


def special_tokens(family: Family, tokens: Sequence[str], config: TrainConfig) -> dict[str, TokenEmbedding]:
    """The embeddings of special tokens at their start, in every text encoder that can be trained, by `token_name`."""
    trained = config.train_token or config.method == "custom-diffusion"
    embeddings = {}
    for encoder in family.encoder_names:
        tokenizer = family.tokenizer_of(encoder)
        for token in tokens:
            embedding = TokenEmbedding(getattr(family.pipe, encoder), token_id(tokenizer, token))
            if config.token_init == "distribution":
                embedding.set_change(start_embedding(embedding, tokenizer, token) - embedding.base)
            embedding.value.requires_grad_(trained)
            embeddings[token_name(encoder, embedding.token_id)] = embedding
    return embeddings


def start_embedding(embedding: TokenEmbedding, tokenizer: Any, token: str) -> Tensor:
    """Where a token starts: drawn from the distribution of the base's names, or of all words where it has no names.

    A token that is among the names has an embedding that the base was trained with, and keeps it.
    """
    names = [token_id(tokenizer, name) for name in read_names(tokenizer)]
    if embedding.token_id in names:
        return embedding.base
    table: Tensor = embedding.encoder.get_input_embeddings().weight.detach().float().cpu()
    return draw_embedding(table[names] if names else table, token)


def draw_embedding(rows: Tensor, token: str) -> Tensor:
    """e ~ N(mean, deviation²) of `rows` (words, width), element by element; the token's text is the seed."""
    seed = int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "little") >> 1
    noise = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    return rows.mean(0) + rows.std(0) * noise


def read_names(tokenizer: Any) -> list[str]:
    """The words of names.json in the tokenizer's folder; none where there is no such file.

    Raises SvdiffError for anything but a list of words.
    """
    path = Path(str(tokenizer.name_or_path)) / NAMES
    if not path.is_file():
        return []
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SvdiffError(f"{path} is not JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SvdiffError(f"{path} holds {type(names).__name__}; expected a list of words of the tokenizer")
    return names


def token_id(tokenizer: Any, token: str) -> int:
    """The one id of `token`. Raises SvdiffError if the tokenizer splits it or does not know it."""
    pieces = tokenizer.tokenize(token)
    found = tokenizer.convert_tokens_to_ids(pieces[0]) if len(pieces) == 1 else None
    if found is None or found == tokenizer.unk_token_id:
        raise SvdiffError(f"token '{token}' is not one token of the base's vocabulary, but {pieces}; choose e.g. sks")
    return int(found)


class WithTokens:
    """A method, and the embeddings of special tokens beside it; see `Method`."""

    def __init__(self, method: Method, tokens: dict[str, TokenEmbedding]) -> None:
        self.method, self.tokens = method, tokens
        for embedding in tokens.values():
            embedding.follow()  # the method has exchanged layers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    @property
    def base_hash(self) -> str:
        """See `Method`."""
        return self.method.base_hash

    def parameters(self) -> dict[str, list[Parameter]]:
        """See `Method`; the tokens learn at 'lr_token'."""
        trained = [embedding.value for embedding in self.tokens.values() if embedding.value.requires_grad]
        return self.method.parameters() | {"lr_token": trained}

    def state(self) -> dict[str, Tensor]:
        """See `Method`."""
        return self.method.state() | {name: e.value.detach().clone() for name, e in self.tokens.items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Method`."""
        if missing := self.tokens.keys() - state.keys():
            raise SvdiffError(f"the resume state lacks '{min(missing)}'; it was written by another training: remove it")
        for name, embedding in self.tokens.items():
            embedding.value.copy_(state[name])
        self.method.load_state({name: value for name, value in state.items() if MARK not in name})

    def save(self, path: Path, metadata: dict[str, str], tokens: Mapping[str, Tensor] | None = None) -> None:
        """See `Method`."""
        changes = {name: embedding.change for name, embedding in self.tokens.items()}
        self.method.save(path, metadata, changes | dict(tokens or {}))

    def detach(self) -> None:
        """See `Method`."""
        for embedding in self.tokens.values():
            embedding.remove()
        self.method.detach()

"""The baselines that train weights as they are: full fine-tuning (DreamBooth) and Custom Diffusion (Sec. 4.1).

What they learn is saved as differences, W − W₀, so that W₀ + sΔW (Fig. 26) can be had at any scale s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from svdiff.config import TrainConfig
from svdiff.errors import SvdiffError
from svdiff.models import Family, family_of
from svdiff.sampling.weights_delta import TOKEN_ROW, base_hashes, row_name, save_weights_delta
from svdiff.spectral import select

# Custom Diffusion (Kumari et al. 2023): the cross-attention's key and value projections.
CUSTOM_DIFFUSION = re.compile(r"(^|\.)attn2\.to_[kv]\.weight$")


class OpenWeights:
    """Parameters opened for training in float32, whatever they were; the base's tensors wait beside them."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.parameters = dict(parameters)
        self.base = {name: parameter.data for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.float().clone()
            parameter.requires_grad_(True)

    def deltas(self) -> dict[str, Tensor]:
        """W − W₀ of each, float32 on the CPU."""
        return {
            name: (parameter.detach() - self.base[name].float()).cpu() for name, parameter in self.parameters.items()
        }

    def close(self) -> None:
        """The base again, bit for bit: they are its own tensors."""
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.data = self.base[name]


class TokenRow:
    """The embedding of one token as a parameter of its own: no gradient and no step can reach another row."""

    def __init__(self, embedding: nn.Embedding, token_id: int) -> None:
        self.embedding, self.token_id = embedding, token_id
        self._name = f"{TOKEN_ROW}_{token_id}"
        self.base = embedding.weight.data[token_id].float().clone()
        self.row = Parameter(self.base.clone())
        # Registered, so that whoever asks finds that the text encoder trains.
        embedding.register_parameter(self._name, self.row)
        self._hook = embedding.register_forward_hook(self._insert)

    def _insert(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        chosen = (inputs[0] == self.token_id).unsqueeze(-1)
        return torch.where(chosen, self.row.to(output.dtype), output)

    def delta(self) -> Tensor:
        """The row's change, (width,)."""
        return (self.row.detach() - self.base).cpu()

    def close(self) -> None:
        """The base's row again."""
        self._hook.remove()
        del self.embedding._parameters[self._name]


class WeightsMethod:
    """Full fine-tuning: every weight and bias of the subset's layers, and of the text encoder when asked.

    Custom Diffusion: `attn2.to_k`, `attn2.to_v` and the special tokens.
    """

    def __init__(self, pipe: Any, config: TrainConfig, tokens: Sequence[str]) -> None:
        custom = config.method == "custom-diffusion"
        _refuse_unused(config)
        family = family_of(pipe)
        subsets = family.trained(config.subset, text_encoder=config.text_encoder)
        if custom and family.attention != "cross":
            raise SvdiffError(
                f"method custom-diffusion trains W^K and W^V of cross-attention, and {family.title} has joint attention "
                "of picture and text instead; choose method svdiff, full or lora"
            )
        self.base_hashes = base_hashes(pipe, [*subsets, *(family.encoder_names if custom else ())])
        chosen: dict[str, Parameter] = {}
        for network, subset in subsets.items():
            module = getattr(pipe, network)
            layers = layers_of(module, subset)
            for name, parameter in module.named_parameters():
                if CUSTOM_DIFFUSION.search(name) if custom else name.rpartition(".")[0] in layers:
                    chosen[f"{network}.{name}"] = parameter
        self.token_rows = token_rows(family, tokens) if custom else {}
        self.weights = OpenWeights(chosen)

    @property
    def base_hash(self) -> str:
        """The bases' hashes, joined: that of the denoising network first."""
        return "+".join(self.base_hashes.values())

    def _named(self) -> dict[str, Parameter]:
        return self.weights.parameters | {name: row.row for name, row in self.token_rows.items()}

    def parameters(self) -> dict[str, list[Parameter]]:
        """Trainable float32 parameters: 1-D ones (norms, biases) learn at 'lr_1d', the rest and the tokens at 'lr'."""
        one_dimensional = [p for p in self.weights.parameters.values() if p.ndim == 1]
        others = [p for name, p in self._named().items() if p.ndim != 1 or name not in self.weights.parameters]
        return {"lr": others, "lr_1d": one_dimensional}

    def state(self) -> dict[str, Tensor]:
        """A copy of everything trainable, by name."""
        return copy_state(self._named())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises SvdiffError where names or shapes differ."""
        load_state(self._named(), state)

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the changes W − W₀ as safetensors."""
        rows = {name: row.delta() for name, row in self.token_rows.items()}
        save_weights_delta(path, self.weights.deltas() | rows, metadata | self.base_hashes)

    def detach(self) -> None:
        """Give the pipeline its base weights back, bit for bit."""
        self.weights.close()
        while self.token_rows:
            self.token_rows.popitem()[1].close()


def _refuse_unused(config: TrainConfig) -> None:
    """Raise SvdiffError for settings that would say something of this training and change nothing in it."""
    custom = config.method == "custom-diffusion"
    if custom and config.text_encoder:
        raise SvdiffError(
            "train.text_encoder is true with method custom-diffusion, which trains W^K, W^V and the tokens' "
            "embeddings and nothing else; set text_encoder: false, or choose method full"
        )
    if custom and config.subset != "UNet":
        raise SvdiffError(
            f"train.subset is '{config.subset}' with method custom-diffusion, which trains W^K and W^V of "
            "cross-attention whatever the subset; set subset: UNet, or choose method svdiff, full or lora"
        )
    if config.rank is not None:
        raise SvdiffError(
            f"train.rank is {config.rank} with method {config.method}, which trains weights as they are; "
            "set rank: null, or choose method svdiff or lora"
        )


def layers_of(module: nn.Module, subset: str) -> set[str]:
    """Paths of the layers whose weights are in `subset`, for the methods that train biases or pairs beside them."""
    return {name.rpartition(".")[0] for name in select(module, subset)}


def token_rows(family: Family, tokens: Sequence[str]) -> dict[str, TokenRow]:
    """The embeddings of special tokens in every text encoder that can be trained, by their names in files."""
    rows = {}
    for encoder in family.encoder_names:
        embedding = getattr(family.pipe, encoder).get_input_embeddings()
        for token in tokens:
            token_id = special_token_id(family.tokenizer_of(encoder), token)
            rows[row_name(encoder, token_id)] = TokenRow(embedding, token_id)
    return rows


def special_token_id(tokenizer: Any, token: str) -> int:
    """The one id of `token`. Raises SvdiffError if the tokenizer splits it or does not know it."""
    pieces = tokenizer.tokenize(token)
    token_id = tokenizer.convert_tokens_to_ids(pieces[0]) if len(pieces) == 1 else None
    if token_id is None or token_id == tokenizer.unk_token_id:
        raise SvdiffError(f"token '{token}' is not one token of the base's vocabulary, but {pieces}; choose e.g. sks")
    return int(token_id)


def copy_state(parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """A copy of parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def load_state(parameters: Mapping[str, Parameter], state: Mapping[str, Tensor]) -> None:
    """Set parameters, in place and in their own float32. Raises SvdiffError where names or shapes differ."""
    different = sorted(parameters.keys() ^ state.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != state[name].shape
    ]
    if different:
        raise SvdiffError(
            f"the resume state does not fit the method: {len(different)} tensors differ, such as '{different[0]}'; "
            "it was written by another training: remove it"
        )
    for name, parameter in parameters.items():
        parameter.copy_(state[name])

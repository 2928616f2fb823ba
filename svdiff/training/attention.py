"""Records cross-attention maps of the UNet through diffusers' attention processors (supplement B, Fig. 20 and 24).

Nothing is replaced until a recorder is entered, and afterwards the very same processors are back: off costs nothing. On,
a layer's output still comes from its own processor; its maps are computed beside it, with gradients.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention


class AttentionRecorder:
    """Records what each picture position attends to in the text, while entered as a context.

    After a pass of the UNet `maps[layer]` is (B, side, side, tokens): attention probabilities, averaged over heads; every
    position sums to 1 over the tokens.

    Args:
        unet: plain or with spectral shifts, LoRA, ….
        layers: regular expression searched in the names of cross-attention layers, such as `up_blocks.1`.
        sides: record at these resolutions only, e.g. {16, 8}; None: at all.

    Raises:
        SvdiffError: no cross-attention layer matches, or a layer's positions are not a square.
    """

    def __init__(self, unet: UNet2DConditionModel, *, layers: str = "", sides: Collection[int] | None = None) -> None:
        self.unet, self.sides = unet, sides
        cross = [name.removesuffix(".processor") for name in unet.attn_processors if ".attn2." in f".{name}"]
        self.layers = [name for name in cross if re.search(layers, name)]
        if not self.layers:
            raise SvdiffError(f"no cross-attention layer matches '{layers}'; the UNet has {', '.join(cross) or 'none'}")
        self.maps: dict[str, Tensor] = {}
        self._originals: dict[str, Any] | None = None

    def __enter__(self) -> AttentionRecorder:
        self._originals = self.unet.attn_processors
        replaced = dict(self._originals)
        for name in self.layers:
            replaced[f"{name}.processor"] = _RecordingProcessor(name, self._originals[f"{name}.processor"], self)
        self.unet.set_attn_processor(replaced)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._originals is not None
        self.unet.set_attn_processor(self._originals)
        self._originals = None


class _RecordingProcessor:
    """The layer's own processor, and the maps beside it."""

    def __init__(self, name: str, original: Any, recorder: AttentionRecorder) -> None:
        self.name, self.original, self.recorder = name, original, recorder

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if encoder_hidden_states is not None:
            side = math.isqrt(hidden_states.shape[1])
            if side * side != hidden_states.shape[1]:
                raise SvdiffError(f"{self.name} has {hidden_states.shape[1]} positions; maps need a square picture")
            if self.recorder.sides is None or side in self.recorder.sides:
                self.recorder.maps[self.name] = attention_map(attn, hidden_states, encoder_hidden_states)
        return self.original(attn, hidden_states, encoder_hidden_states, **kwargs)


def attention_map(attn: Attention, hidden: Tensor, context: Tensor) -> Tensor:
    """softmax(QKᵀ/√d), averaged over heads: (B, side, side, tokens), float32.

    Args:
        attn: a cross-attention layer.
        hidden: (B, side², width), the layer's normalised input.
        context: (B, tokens, width of the text).
    """
    query, key = attn.head_to_batch_dim(attn.to_q(hidden)), attn.head_to_batch_dim(attn.to_k(context))
    heads = attn.get_attention_scores(query, key)
    side = math.isqrt(hidden.shape[1])
    return heads.float().reshape(len(hidden), attn.heads, side, side, context.shape[1]).mean(1)


def token_map(maps: Mapping[str, Tensor], positions: Sequence[Sequence[int]], side: int | None = None) -> Tensor:
    """The map of one word in each picture: averaged over layers (and over the word's tokens), resized bilinearly.

    Args:
        maps: of a recorder.
        positions: for each of the B pictures the word's places in its prompt, see `token_positions`.
        side: of the result; default that of the finest map.

    Returns:
        (B, side, side).
    """
    if not maps:
        raise SvdiffError("no attention maps recorded: run the UNet inside the recorder, at a resolution that it keeps")
    side = side or max(map_.shape[1] for map_ in maps.values())
    words = [
        torch.stack([picture[:, :, list(places)].mean(-1) for picture, places in zip(map_, positions, strict=True)])
        for map_ in maps.values()
    ]
    resized = [
        torch.nn.functional.interpolate(word[:, None], (side, side), mode="bilinear", antialias=True)[:, 0]
        for word in words
    ]
    return torch.stack(resized).mean(0)


def token_positions(tokenizer: Any, prompt: str, word: str) -> list[int]:
    """Places of `word` in the tokenised `prompt`, the start token being place 0.

    Raises SvdiffError if the prompt does not have it.
    """
    sought = tokenizer(word, add_special_tokens=False).input_ids
    if not sought:
        raise SvdiffError(f"'{word}' is no word; expected one of the prompt '{prompt}'")
    tokens = tokenizer(prompt).input_ids
    for start in range(len(tokens) - len(sought) + 1):
        if tokens[start : start + len(sought)] == sought:
            return list(range(start, start + len(sought)))
    raise SvdiffError(f"'{word}' is not in the prompt '{prompt}'")

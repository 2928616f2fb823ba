"""Which weights are shifted: the twelve subsets of Table 1, subsets by role for any network, or a pattern of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdiff.errors import SvdiffError
from svdiff.spectral.basis import full_rank, is_matrix
from svdiff.spectral.delta import SpectralDelta
from svdiff.spectral.layers import SpectralLayer

_Rule = Callable[[str, Tensor, int | None], bool]
"""Whether a weight belongs, by its name, itself, and the third of the network's depth that it is in."""


def _named(*parts: str) -> _Rule:
    return lambda name, weight, third: all(re.search(part, name) for part in parts)


def _third(number: int) -> _Rule:
    return lambda name, weight, third: third == number


_CA = r"(^|\.)attn2\."
_UP, _DOWN, _MID = r"(^|\.)up_blocks\.", r"(^|\.)down_blocks\.", r"(^|\.)mid_block\."

_RULES: dict[str, _Rule] = {
    "UNet": _named(),
    "UNet-CA": _named(_CA),
    "UNet-CA-KV": _named(_CA + r"to_[kv]\."),
    "UNet-1D": lambda name, weight, third: weight.ndim == 1,
    "UNet-2D": lambda name, weight, third: weight.ndim == 2,
    "UNet-4D": lambda name, weight, third: weight.ndim == 4,
    "Up-Blocks": _named(_UP),
    "Down-Blocks": _named(_DOWN),
    "Mid-Block": _named(_MID),
    "Up-CA": _named(_UP, _CA),
    "Down-CA": _named(_DOWN, _CA),
    "Mid-CA": _named(_MID, _CA),
}

_ROLES: dict[str, _Rule] = {
    "all": _named(),
    "attention": _named(r"(^|\.)(attn\d?|self_attn)\."),
    "feed-forward": _named(r"(^|\.)(ff|ff_context|mlp)\.|^single_transformer_blocks\.\d+\.proj_(mlp|out)\."),
    "norms": lambda name, weight, third: weight.ndim == 1,
    "early": _third(0),
    "middle": _third(1),
    "late": _third(2),
}

SUBSETS: tuple[str, ...] = tuple(_RULES)
"""The names of Table 1. `UNet` is every `weight` of whatever module it is asked of; no bias is in any."""

ROLES: tuple[str, ...] = tuple(_ROLES)
"""Subsets by what layers do and how deep they are: for networks whose blocks are not those of Table 1, and for UNets too.

`early`, `middle` and `late` are a UNet's way down, middle and way up, and thirds of a transformer's blocks; what is outside
of blocks (embeddings, the last layer) is in none of them.
"""

_BLOCK = re.compile(r"^(?:.*\.)?(transformer_blocks|single_transformer_blocks|layers)\.(\d+)\.")


def subsets_of(module: nn.Module) -> tuple[str, ...]:
    """The subsets to list for a network, the whole of it first: Table 1 for a UNet, roles for others."""
    return SUBSETS if any(name.startswith("down_blocks.") for name in weights(module)) else ROLES


def thirds(names: Iterable[str]) -> dict[str, int]:
    """The third of a network's depth that each weight inside of a block is in: 0 to 2."""
    found, blocks = {}, {}
    for name in names:
        if unet := re.match(r"(down|mid|up)_blocks?\.", name):
            found[name] = ("down", "mid", "up").index(unet[1])
        elif block := _BLOCK.match(name):
            blocks[name] = block.groups()
    depth = list(dict.fromkeys(blocks.values()))
    return found | {name: depth.index(block) * 3 // len(depth) for name, block in blocks.items()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Every `weight` parameter of a module by name, in the order of its layers; attached ones by shape alone."""
    found: dict[str, Tensor] = {}
    inside: set[nn.Module] = set()  # layers that spectral ones hold
    for path, owner in module.named_modules():
        if isinstance(owner, SpectralLayer):
            inside |= set(owner.modules()) - {owner}
            weight: Tensor | None = torch.empty(owner.shape, device="meta")
        else:
            weight = None if owner in inside else owner._parameters.get("weight")
        if weight is not None:
            found[f"{path}.weight" if path else "weight"] = weight
    return found


def select(module: nn.Module, subset: str) -> list[str]:
    """Names of the weights in `subset`: a name of Table 1, a role, or a regular expression searched in the names.

    Raises SvdiffError if nothing matches.
    """
    rule = (_RULES | _ROLES).get(subset)
    if rule is None:
        try:
            rule = _named(re.compile(subset).pattern)
        except re.error as error:
            raise SvdiffError(
                f"subset {subset!r} is neither one of {', '.join((*SUBSETS, *ROLES))} nor a regular expression: {error}"
            ) from None
    found = weights(module)
    depth = thirds(found)
    chosen = [name for name, weight in found.items() if rule(name, weight, depth.get(name))]
    if not chosen:
        raise SvdiffError(
            f"subset {subset!r} selects no weight of {type(module).__name__}. Use one of {', '.join(subsets_of(module))}, "
            "or a regular expression that is found in names such as "
            f"{next(iter(found), 'nothing: it has no weights')!r}"
        )
    return chosen


PAPER_KB: dict[str, float] = {
    "UNet": 1404, "UNet-CA": 194, "UNet-CA-KV": 84.8, "UNet-1D": 430, "UNet-2D": 617, "UNet-4D": 355,
    "Up-Blocks": 789, "Down-Blocks": 469, "Mid-Block": 135, "Up-CA": 106, "Down-CA": 70.4, "Mid-CA": 17.7,
}  # fmt: skip
"""Storage that Table 1 reports for the UNet of Stable Diffusion 1.x, in KB of 1024 bytes."""


@dataclass(frozen=True)
class SubsetSize:
    """A row of Table 1: bytes are those of our whole delta file, less its provenance."""

    name: str
    tensors: int
    shifts: int
    bytes_fp32: int
    bytes_fp16: int
    paper_kb: float | None


def shift_sizes(module: nn.Module, subset: str) -> dict[str, int]:
    """How many shifts each weight of `subset` has: `min(M, N)`, or the elements of a norm's weight."""
    sizes = {}
    for name in select(module, subset):
        owner = module.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, SpectralLayer):
            sizes[name] = owner.full_size
            continue
        weight: Tensor = owner.weight  # type: ignore[assignment]
        sizes[name] = full_rank(owner, weight) if is_matrix(owner) else weight.numel()
    return sizes


def subset_sizes(module: nn.Module, subset: str, *, prefix: str = "unet") -> SubsetSize:
    """Count one subset of a model, which may be on the meta device."""
    sizes = shift_sizes(module, subset)
    norms = [name for name in sizes if not is_matrix(module.get_submodule(name.rpartition(".")[0]))]
    delta = SpectralDelta.zeros(sizes, norms, prefix=prefix)
    full, half = (len(delta.to_bytes(d, provenance=False)) for d in (torch.float32, torch.float16))
    return SubsetSize(subset, len(sizes), sum(sizes.values()), full, half, PAPER_KB.get(subset))

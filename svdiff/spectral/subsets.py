"""Which weights are shifted: the twelve subsets of Table 1, or a pattern of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor, nn

from svdiff.errors import SvdiffError

_Rule = Callable[[str, Tensor], bool]


def _named(*parts: str) -> _Rule:
    return lambda name, weight: all(re.search(part, name) for part in parts)


_CA = r"(^|\.)attn2\."
_UP, _DOWN, _MID = r"(^|\.)up_blocks\.", r"(^|\.)down_blocks\.", r"(^|\.)mid_block\."

_RULES: dict[str, _Rule] = {
    "UNet": _named(),
    "UNet-CA": _named(_CA),
    "UNet-CA-KV": _named(_CA + r"to_[kv]\."),
    "UNet-1D": lambda name, weight: weight.ndim == 1,
    "UNet-2D": lambda name, weight: weight.ndim == 2,
    "UNet-4D": lambda name, weight: weight.ndim == 4,
    "Up-Blocks": _named(_UP),
    "Down-Blocks": _named(_DOWN),
    "Mid-Block": _named(_MID),
    "Up-CA": _named(_UP, _CA),
    "Down-CA": _named(_DOWN, _CA),
    "Mid-CA": _named(_MID, _CA),
}

SUBSETS: tuple[str, ...] = tuple(_RULES)
"""The names of Table 1. `UNet` is every `weight` of whatever module it is asked of; no bias is in any."""


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Every `weight` parameter of a module by name, in the order of its layers."""
    return {n: p for n, p in module.named_parameters() if n == "weight" or n.endswith(".weight")}


def select(module: nn.Module, subset: str) -> list[str]:
    """Names of the weights in `subset`: a name of Table 1, or a regular expression searched in the names.

    Raises SvdiffError if nothing matches.
    """
    rule = _RULES.get(subset)
    if rule is None:
        try:
            rule = _named(re.compile(subset).pattern)
        except re.error as error:
            raise SvdiffError(
                f"subset {subset!r} is neither one of {', '.join(SUBSETS)} nor a regular expression: {error}"
            ) from None
    chosen = [name for name, weight in weights(module).items() if rule(name, weight)]
    if not chosen:
        raise SvdiffError(
            f"subset {subset!r} selects no weight of {type(module).__name__}. Use one of {', '.join(SUBSETS)}, "
            "or a regular expression that is found in names such as "
            f"{next(iter(weights(module)), 'nothing: it has no weights')!r}"
        )
    return chosen

"""Layers made on the meta device, where they wait for their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class WithoutNumbers(TorchFunctionMode):
    """No numbers are worked out for tensors on the meta device, which keep none: PyTorch would import sympy to do so.

    What initialises weights leaves them as they are, and a range is its shape and dtype alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if getattr(func, "__module__", None) == "torch.nn.init" and named["tensor"].is_meta:
            return named["tensor"]
        if func is torch.arange and torch.device(named.get("device") or "cpu").type == "meta":
            return torch.arange(*args, **{**named, "device": "cpu"}).to("meta")
        if func is torch.empty_like and args[0].is_meta and named.get("device") is not None:
            return torch.empty(args[0].shape, **{"dtype": args[0].dtype, **named})
        return func(*args, **named)

"""What is made on the meta device while a base is loaded."""

from __future__ import annotations

import torch
from torch import nn

from svdiff.models.meta import WithoutNumbers


def test_on_the_meta_device_shapes_and_types_are_what_they_are_without_the_mode() -> None:
    def made() -> list[torch.Tensor]:
        with torch.device("meta"):
            own = [nn.Embedding(5, 3).weight, nn.Linear(3, 4).weight, torch.arange(7).expand(1, -1)]
            own += [torch.arange(0, 1, 0.25), torch.arange(3, dtype=torch.int16), torch.arange(2, device="cpu")]
        return [*own, *(torch.empty_like(tensor, device="cpu") for tensor in own)]

    plain = made()
    with WithoutNumbers():
        without = made()
    assert [(t.device, t.dtype, t.shape) for t in without] == [(t.device, t.dtype, t.shape) for t in plain]
    assert without[5].tolist() == [0, 1]


def test_elsewhere_numbers_are_drawn_and_counted_as_ever() -> None:
    def made() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [nn.Embedding(5, 3).weight, nn.Linear(3, 4).bias, torch.arange(7), torch.empty_like(torch.ones(2)) * 0]

    plain = made()
    with WithoutNumbers():
        assert all(torch.equal(one, other) for one, other in zip(made(), plain, strict=True))

"""Scores of edits against formulas of their own."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from svdiff.editing.edits import EditedPicture
from svdiff.editing.scores import psnr, score_edits
from svdiff.errors import SvdiffError
from svdiff.evaluation.evaluators import Evaluators


def noisy(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8))


def test_psnr() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    assert psnr(grey, Image.new("RGB", (8, 8), (110, 110, 110))) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr(grey, grey) == math.inf
    a, b = noisy(1), noisy(2)
    error = torch.nn.functional.mse_loss(*(torch.from_numpy(np.array(image)).double() for image in (a, b)))
    assert psnr(a, b) == pytest.approx(float(10 * torch.log10(255**2 / error)))
    with pytest.raises(SvdiffError, match=r"\(8, 8\)"):
        psnr(grey, a)


def test_means_are_of_targets_and_the_training_prompt_stands_apart() -> None:
    """Evaluators that can be followed by hand: red of a pixel as distance, and a text that is liked or not."""

    def red(images: list[Image.Image]) -> torch.Tensor:
        return torch.tensor([image.getpixel((0, 0))[0] / 255 for image in images])

    evaluators = Evaluators(
        encode_images=lambda images: torch.stack([red(images), torch.ones(len(images))], dim=1),
        encode_texts=lambda texts: torch.tensor([[1.0, 0.0] if "red" in text else [0.0, 0.5] for text in texts]),
        distance=lambda a, b: (red(a)[:, None] - red(b)[None]).abs(),
        encode_identity=lambda images: torch.ones(len(images), 1),
    )
    shades = [0, 51, 102, 153, 204, 255]  # of two starts, for the training prompt and two targets
    rows = [
        {"prompt_index": index, "prompt": text, "start": start, "seed": 0, "file": f"{index}-{start}"}
        for index, text in enumerate(("a dog", "a red dog", "a dog in red"))
        for start in ("noise", "inversion")
    ]
    edited = EditedPicture(
        original=Image.new("RGB", (8, 8), (0, 0, 0)),
        autoencoded=Image.new("RGB", (8, 8), (51, 0, 0)),
        reconstruction=Image.new("RGB", (8, 8), (102, 0, 0)),
        table=pd.DataFrame(rows),
        pictures=[Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades],
    )
    table, numbers = score_edits(edited, evaluators)
    assert table["faithfulness"].tolist() == pytest.approx([1 - shade / 255 for shade in shades])
    assert table["edit"].tolist() == pytest.approx([0.5, 0.5, 0.4, 0.6, 0.8, 1.0])
    assert numbers["noise_reconstruction"] == pytest.approx(1.0)
    assert numbers["inversion_reconstruction"] == pytest.approx(0.8)
    assert numbers["noise_edit"] == pytest.approx((0.4 + 0.8) / 2)
    assert numbers["inversion_faithfulness"] == pytest.approx((0.4 + 0.0) / 2)
    assert numbers["input_edit"] == pytest.approx(0.0)
    assert numbers["autoencoder_faithfulness"] == pytest.approx(0.8)
    assert numbers["reconstruction_psnr"] == pytest.approx(10 * math.log10(255**2 / (102**2 / 3)), abs=1e-5)

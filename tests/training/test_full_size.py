"""The `train` stage on a folder with the layout and the size of Stable Diffusion 1.5 (random weights, 256 × 256)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from svdiff.config import load_config
from svdiff.models.sizes import build
from svdiff.models.stable_diffusion import UNET
from svdiff.spectral import SpectralDelta
from svdiff.training import train
from tests.conftest import write_tiny_tokenizer
from tests.training.test_stage import draw_pictures, write_params

MEMORY_GB, DISK_GB = 13, 14


def write_base(folder: Path) -> Path:
    """The pipeline folder; only the tokenizer is smaller than the real one, whose vocabulary is not ours to ship."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    write_tiny_tokenizer(folder / "words")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=256,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=build("sd15", "text_encoder", "cpu"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words", model_max_length=77),
        unet=UNet2DConditionModel(**UNET | {"sample_size": 32}),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_few_steps_at_the_size_of_stable_diffusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if psutil.virtual_memory().available < MEMORY_GB * 1e9 or shutil.disk_usage(tmp_path).free < DISK_GB * 1e9:
        pytest.skip(f"needs {MEMORY_GB} GB of free memory and {DISK_GB} GB of disk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    draw_pictures(tmp_path / "data/concepts/pet", 3, "brown")
    draw_pictures(tmp_path / "out/prior/dog", 2, "grey")
    write_params(tmp_path, write_base(tmp_path / "base"), steps=3, validate_every=3, lr=1e-3)

    path = train(load_config(), "pet")

    delta = SpectralDelta.load(path)
    assert len(delta.tensors) == 391
    assert sum(shift.numel() for shift in delta.tensors.values()) == 322_856  # Table 1, UNet
    assert all(shift.isfinite().all() and shift.any() for shift in delta.tensors.values())
    curve = pd.read_csv(path.parent / "curve.csv")
    assert list(curve["step"]) == [1, 2, 3]
    assert curve["loss"].between(0, 10).all()
    shutil.rmtree(tmp_path / "scratch")

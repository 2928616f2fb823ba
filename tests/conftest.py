"""Things that several tests need: above all a random, tiny Stable Diffusion of real diffusers parts."""

from __future__ import annotations

import copy
import gc
import json
import os
import re
from pathlib import Path

# Read when torch is loaded: the models of tests are so small that threads only wait for each other, and tests run side by side.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # networks of tests are compared number by number on the CPU
os.environ["DVC_NO_ANALYTICS"] = "1"  # else every command in a project of a test starts a process that reports on it

import pytest
import torch

# As the command line does: looking for garbage among what torch brings is a fifth of the time.
gc.set_threshold(1_000_000)

ALL_SLOW = re.compile(r"^pytestmark = .*mark\.slow", re.MULTILINE)

# Words of the tiny tokenizer; each is one token. `sks` and `zwx` are the rare words kept for special tokens.
WORDS = [
    *("a", "an", "the", "photo", "picture", "of", "and", "on", "in", "left", "right", "up", "down"),
    *(
        "above",
        "below",
        "top",
        "bottom",
        "beside",
        "sitting",
        "background",
        "style",
        "thing",
        "red",
        "blue",
        "pink",
        "white",
    ),
    *("dog", "cat", "panda", "car", "house", "sks", "zwx"),
]
TINY_PIXELS = 16  # pictures are 16 × 16, latents 8 × 8


def write_tiny_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer that knows the alphabet and WORDS, merged from left to right."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = characters + [character + "</w>" for character in characters]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merge = f"{pieces[0]} {pieces[1]}"
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            if merge not in merges:
                merges.append(merge)
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


def make_tiny_base(folder: Path, seed: int = 0, prediction_type: str = "epsilon", **unet_settings: bool) -> Path:
    """Write a random Stable Diffusion of about a hundred thousand parameters to `folder`."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    write_tiny_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words", model_max_length=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
            **unet_settings,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=TINY_PIXELS,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        # Fresh norms are all ones and zeros; a little spread tells their entries apart.
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                with torch.no_grad():
                    parameter.add_(0.05 * torch.randn_like(parameter))
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that are slow as a whole are not even imported for the fast tests: some take seconds to."""
    if config.option.markexpr == "not slow" and collection_path.suffix == ".py":
        return True if ALL_SLOW.search(collection_path.read_text(encoding="utf-8")) else None
    return None


@pytest.fixture
def few_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss at fixed noise is taken at two levels, not eight: for tests of something else."""
    monkeypatch.setattr("svdiff.training.loop.VALIDATION_LEVELS", 2)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random tiny Stable Diffusion (pictures 16 × 16, latents 8 × 8 × 4), read only."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def _loaded_tiny_base(tiny_base: Path):
    from svdiff.config import BaseModelConfig
    from svdiff.models import load_pipeline

    return load_pipeline(BaseModelConfig(model=str(tiny_base)))


@pytest.fixture
def tiny_pipe(_loaded_tiny_base):
    """The tiny base as a pipeline of its own, for a test to change."""
    return copy.deepcopy(_loaded_tiny_base)

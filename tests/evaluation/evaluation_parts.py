"""Small real evaluators and a checkout with finished stages, for the tests of scores, analyses and report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from svdiff.config import Config
from svdiff.evaluation.evaluators import Evaluators
from svdiff.spectral import SpectralDelta

SIDE = 64
CONCEPTS = {"red-dog": ("dog", "sks", "crimson"), "green-cat": ("cat", "zwx", "seagreen")}
PROMPTS = ["a {subject} on a blue background", "a big {subject}"]
SEEDS = [3, 7]


CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


class TinyClip:
    """open_clip's own model and preprocessing, small and random."""

    def __init__(self) -> None:
        import open_clip

        torch.manual_seed(0)
        self.model = open_clip.CLIP(**CLIP_CONFIG).eval()
        self.preprocess = open_clip.image_transform(32, is_train=False)
        self.tokenize = open_clip.SimpleTokenizer(context_length=16)

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(i) for i in images]), normalize=True)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self.model.encode_text(self.tokenize(texts), normalize=True)


class TinyLpips:
    """The lpips package without learned heads on a random backbone: 1 − cosine, the mean over its layers."""

    def __init__(self) -> None:
        import lpips

        torch.manual_seed(0)
        self.net = lpips.LPIPS(net="squeeze", lpips=False, pretrained=False, pnet_rand=True, verbose=False).eval()

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], others: list[Image.Image]) -> torch.Tensor:
        def tensor(image: Image.Image) -> torch.Tensor:
            image = image.resize((SIDE, SIDE))  # the backbone needs some pixels
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1

        distances = [torch.cat([self.net(tensor(a), tensor(b)).flatten() for b in others]) for a in images]
        return torch.stack(distances) / (2 * self.net.L)


def drawing(colour: str, background: str = "white", *, seed: int = 0, side: int = SIDE) -> Image.Image:
    """A blob with two ears, a little different for each seed."""
    offset = np.random.default_rng(seed).integers(-4, 5, 2) * side // 64
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    x, y = (side // 2 + int(o) for o in offset)
    r = side // 4
    draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    for ear in (-1, 1):
        draw.polygon([(x + ear * r, y), (x + ear * r, y - 3 * r // 2), (x + ear * r // 4, y - r // 2)], fill=colour)
    return image


def random_delta(seed: int, base_hash: str = "b" * 64) -> SpectralDelta:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"unet.a.weight": 64, "unet.b.weight": 12, "unet.norm.weight": 8}
    tensors = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return SpectralDelta(tensors, {"base_hash": base_hash, "basis_id": "x:1", "norms": '["unet.norm.weight"]'})


def write_samples(folder: Path, token: str, class_word: str, colour: str) -> None:
    rows = []
    for model in ("trained", "base"):
        (folder / model).mkdir(parents=True, exist_ok=True)
        for index, prompt in enumerate(PROMPTS):
            for seed in SEEDS:
                file = f"{model}/p{index:02d}-s{seed:04d}.png"
                background = "royalblue" if index == 0 else "white"
                drawing(colour if model == "trained" else "goldenrod", background, seed=seed).save(folder / file)
                text = prompt.format(subject=f"{token} {class_word}")
                rows.append({"file": file, "model": model, "prompt": text, "prompt_index": index, "seed": seed})
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)


def write_drift(folder: Path, class_word: str, colours: dict[str, list[str]], pictures: int = 4) -> None:
    """Pictures of the bare class prompt; each model's colours follow each other."""
    rows = []
    for model, own in colours.items():
        (folder / model).mkdir(parents=True)
        for seed in range(pictures):
            file = f"{model}/p00-s{seed:04d}.png"
            drawing(own[seed % len(own)], seed=seed).save(folder / file)
            rows.append({"file": file, "model": model, "prompt": f"a {class_word}", "prompt_index": 0, "seed": seed})
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)


def write_training(folder: Path, seed: int, config: Config, name: str) -> None:
    (folder / "validation").mkdir(parents=True)
    for step in (0, 10, 20):
        drawing("gray", seed=step).save(folder / "validation" / f"step-{step:05d}.png")
    random_delta(seed).save(folder / "delta.safetensors")
    loss = np.random.default_rng(seed).random(20)
    curve = pd.DataFrame({"step": range(1, 21), "loss": loss, "loss_instance": loss / 2, "loss_prior": loss / 2})
    curve["fixed_noise_loss"] = curve["step"].map({10: 0.4, 20: 0.3})
    curve.to_csv(folder / "curve.csv", index=False)
    settings = config.train_config(name).model_dump(mode="json")
    (folder / "train.json").write_text(json.dumps({"config": settings, "parameters": 84, "seconds": 12.5}))


def embed(images: list[Image.Image]) -> torch.Tensor:
    """Unit vectors of small pictures: a plain evaluator that a test can understand."""
    small = [np.asarray(image.convert("RGB").resize((16, 16)), np.float32).ravel() - 128 for image in images]
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(small)), dim=1)


PLAIN = Evaluators(
    embed, lambda texts: torch.ones(len(texts), 768) / 768**0.5, lambda a, b: 1 - embed(a) @ embed(b).T, embed
)


def write_tiny_identity(folder: Path, kind: str = "resnet") -> Path:
    """A small random instance embedding as transformers saves it: a ResNet, or DINOv2's architecture."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "resnet":
            model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
        else:
            model = Dinov2Model(
                Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
            )
    model.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder

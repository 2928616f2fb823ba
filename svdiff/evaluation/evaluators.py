"""The models that score pictures: CLIP through open_clip, the perceptual distance through lpips.

Both come in two kinds under the same configuration keys: the embedded ones, trained on the picture world, and the
published ones by their hub names. Scores of one kind do not compare with the other's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from svdiff.config import EvaluatorsConfig
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    import torch

LOCAL = "local-dir:"


EncodeImages = Callable[[list[Image.Image]], "torch.Tensor"]
EncodeTexts = Callable[[list[str]], "torch.Tensor"]
Distance = Callable[[list[Image.Image], list[Image.Image]], "torch.Tensor"]


def load_clip(config: EvaluatorsConfig) -> tuple[EncodeImages, EncodeTexts]:
    """CLIP's two encoders: pictures (RGB, any size) and texts to N×d unit vectors, in fp32 on the CPU.

    `clip_model` is `local-dir:<folder>` (relative to the working directory) or an open_clip model name with
    `clip_pretrained` beside it. Raises SvdiffError if a local folder holds no model.
    """
    import open_clip
    import torch

    name = config.clip_model
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not (folder / "open_clip_config.json").is_file():
            raise SvdiffError(
                f"evaluators.clip_model: {folder} holds no open_clip_config.json; run `dvc pull`, "
                "or `svdiff base train clip` to make it"
            )
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenize = _local_tokenizer(folder)
    else:
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=config.clip_pretrained)
        tokenize = open_clip.get_tokenizer(name)
    model = model.float().eval().requires_grad_(False)

    @torch.inference_mode()
    def encode_images(pictures: list[Image.Image]) -> torch.Tensor:
        parts = [
            model.encode_image(
                torch.stack([preprocess(p.convert("RGB")) for p in pictures[i : i + 64]]), normalize=True
            )
            for i in range(0, len(pictures), 64)
        ]
        return torch.cat(parts).clone()

    @torch.inference_mode()
    def encode_texts(texts: list[str]) -> torch.Tensor:
        parts = [model.encode_text(tokenize(texts[i : i + 256]), normalize=True) for i in range(0, len(texts), 256)]
        return torch.cat(parts).clone()

    return encode_images, encode_texts


def _local_tokenizer(folder: Path) -> Callable[[list[str]], torch.Tensor]:
    import open_clip

    return open_clip.get_tokenizer(f"{LOCAL}{folder}")


def lpips_side(config: EvaluatorsConfig) -> int:
    """Side in pixels at which pictures are compared: the embedded base's own, or Stable Diffusion's."""
    return 64 if config.lpips_weights else 512


def load_lpips(config: EvaluatorsConfig) -> Distance:
    """The perceptual distance: (N pictures, M pictures) to N×M distances ≥ 0, in fp32 on the CPU.

    With `lpips_weights` the backbone of that file is used without learned heads (`lpips=False`), as the mean over
    its layers of half the squared difference of unit-normalised features, which is 1 − their cosine and so lies in
    [0, 1] as the published distance nearly does; without it, the published network with its heads. Pictures are
    compared as squares of `lpips_side` pixels. Raises SvdiffError if the weights are not there.
    """
    import lpips
    import torch

    if config.lpips_weights is None:
        network = lpips.LPIPS(net=config.lpips_net, verbose=False)
    else:
        from safetensors.torch import load_file

        path = Path(config.lpips_weights)
        if not path.is_file():
            raise SvdiffError(
                f"evaluators.lpips_weights: {path} does not exist; run `dvc pull`, "
                "or `svdiff base train lpips` to make it"
            )
        trained_for = path.with_name("config.json")
        if trained_for.is_file() and (net := json.loads(trained_for.read_text())["net"]) != config.lpips_net:
            raise SvdiffError(f"evaluators.lpips_net is {config.lpips_net!r}, but {path} is of {net!r}: say {net!r}")
        network = lpips.LPIPS(net=config.lpips_net, lpips=False, pnet_rand=True, pretrained=False, verbose=False)
        network.net.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    network = network.eval().requires_grad_(False)
    scale = 1.0 if config.lpips_weights is None else 1 / (2 * network.L)

    side = lpips_side(config)

    def tensor(pictures: list[Image.Image]) -> torch.Tensor:
        import numpy as np

        small = [p.convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
        return torch.from_numpy(np.stack([np.asarray(p, dtype=np.float32) for p in small]) / 127.5 - 1).permute(
            0, 3, 1, 2
        )

    @torch.inference_mode()
    def distance(first: list[Image.Image], second: list[Image.Image]) -> torch.Tensor:
        a, b = tensor(first), tensor(second)
        rows = [network(a[i : i + 1].expand(len(b), -1, -1, -1), b).reshape(1, -1) for i in range(len(a))]
        return (scale * torch.cat(rows)).clone()

    return distance

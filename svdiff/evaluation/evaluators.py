"""The networks that score pictures: CLIP (open_clip), the perceptual distance (lpips), an instance embedding (transformers).

Each comes in two kinds under the same configuration keys: the embedded one, trained on the picture world, and the
published ones by their hub names. Scores of one kind do not compare with the other's, so `describe_evaluators` says which
networks, weights and transforms made a score.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from svdiff.config import EvaluatorsConfig
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file
from svdiff.words import is_folder

if TYPE_CHECKING:
    import torch

    EncodeImages = Callable[[list[Image.Image]], torch.Tensor]
    EncodeTexts = Callable[[list[str]], torch.Tensor]
    Distance = Callable[[list[Image.Image], list[Image.Image]], torch.Tensor]

BATCH = 64  # pictures, or pairs of them, at a time
CLIP_WEIGHTS = {".safetensors", ".bin", ".pt"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of transformers; the first that is there is loaded
CLIP_AS_IDENTITY = "the image encoder of clip"


class Evaluators(NamedTuple):
    """What scores pictures. Encoders give N × d unit vectors, `distance` N × M numbers for N and M pictures."""

    encode_images: EncodeImages
    encode_texts: EncodeTexts
    distance: Distance
    encode_identity: EncodeImages


#: What `pip install 'svdiff[evaluation]'` brings, without which nothing is scored.
PACKAGES = ("open_clip", "lpips")


def load_evaluators(config: EvaluatorsConfig) -> Evaluators:
    """The evaluators that params.yaml names, in fp32 on the GPU if there is one.

    Raises SvdiffError if their packages or their weights are not there.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            raise SvdiffError(f"{package} is not installed: pip install 'svdiff[evaluation]'")
    encode_images, encode_texts = load_clip(config)
    encode_identity = encode_images if config.identity_model is None else load_identity(config.identity_model)
    return Evaluators(encode_images, encode_texts, load_lpips(config), encode_identity)


@contextmanager
def _loading(key: str, name: str) -> Iterator[None]:
    """Raise as SvdiffError, with the key that names the network, what keeps it from being loaded: a wrong name, no network."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise SvdiffError(f"evaluators.{key} '{name}' cannot be loaded: {error}") from error


def load_clip(config: EvaluatorsConfig) -> tuple[EncodeImages, EncodeTexts]:
    """CLIP's two encoders: pictures (RGB, any size) and texts to N×d unit vectors.

    `clip_model` is a folder (relative to the working directory), or an open_clip model name with `clip_pretrained` beside
    it. Raises SvdiffError if it cannot be loaded.
    """
    import open_clip
    import torch

    name = config.clip_model
    if is_folder(name):
        _check_clip(Path(name))
        name = f"local-dir:{name}"
    with _loading("clip_model", config.clip_model):
        model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=config.clip_pretrained)
        tokenize = open_clip.get_tokenizer(name)
    device = _device()
    model = model.float().eval().requires_grad_(False).to(device)

    def images(pictures: list[Image.Image]) -> torch.Tensor:
        pixels = torch.stack([preprocess(picture.convert("RGB")) for picture in pictures])
        return model.encode_image(pixels.to(device), normalize=True)

    def texts(words: list[str]) -> torch.Tensor:
        return model.encode_text(tokenize(words).to(device), normalize=True)

    return partial(_in_batches, images), partial(_in_batches, texts)


def _check_clip(folder: Path) -> None:
    """Raise SvdiffError for a folder that is not there or holds no model."""
    if not (folder / "open_clip_config.json").is_file():
        raise SvdiffError(
            f"evaluators.clip_model: {folder} holds no open_clip_config.json (looked from {Path.cwd()}); run `dvc pull`, "
            "or `svdiff base train clip` to make it"
        )


def load_identity(name: str) -> EncodeImages:
    """The instance embedding as transformers loads it, pictures to N×d unit vectors: the model's pooled output, or the mean
    of its last hidden state where it has none.

    `name` is a folder or a Hub id such as facebook/dinov2-base. Raises SvdiffError if it cannot be loaded.
    """
    import torch
    import transformers.utils.logging
    from transformers import AutoImageProcessor, AutoModel

    transformers.utils.logging.disable_progress_bar()
    _check_identity(name)
    with _loading("identity_model", name):
        processor, model = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
    device = _device()
    model = model.float().eval().requires_grad_(False).to(device)

    def embed(pictures: list[Image.Image]) -> torch.Tensor:
        pixels = processor(images=[picture.convert("RGB") for picture in pictures], return_tensors="pt").pixel_values
        output = model(pixel_values=pixels.to(device, torch.float32))
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:  # (N, tokens, d) of a transformer, (N, d, h, w) of a convolutional network
            last = output.last_hidden_state
            pooled = last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))
        return torch.nn.functional.normalize(pooled.flatten(1), dim=1)

    return partial(_in_batches, embed)


def _check_identity(name: str) -> None:
    """Raise SvdiffError for a folder that is not there or holds no model."""
    folder = Path(name)
    if folder.is_dir():
        missing = [file for file in ("config.json", "preprocessor_config.json") if not (folder / file).is_file()]
        if missing:
            raise SvdiffError(
                f"evaluators.identity_model: {folder} holds no {missing[0]}; expected what transformers' "
                "`save_pretrained` writes for a model and its image processor. For the embedded one run `dvc pull`"
            )
    elif is_folder(name):
        raise SvdiffError(
            f"evaluators.identity_model '{name}' is not a folder here (looked from {Path.cwd()}); run `dvc pull` for the "
            "embedded one, or name a folder or a Hub id such as facebook/dinov2-base"
        )


def lpips_side(config: EvaluatorsConfig) -> int:
    """Side in pixels at which pictures are compared: the embedded base's own, or Stable Diffusion's."""
    return 64 if config.lpips_weights else 512


def load_lpips(config: EvaluatorsConfig) -> Distance:
    """The perceptual distance: (N pictures, M pictures) to N×M distances ≥ 0.

    With `lpips_weights` the backbone of that file is used without learned heads (`lpips=False`), as the mean over
    its layers of half the squared difference of unit-normalised features, which is 1 − their cosine and so lies in
    [0, 1] as the published distance nearly does; without it, the published network with its heads. Pictures are
    compared as squares of `lpips_side` pixels. Raises SvdiffError if the weights are not there.
    """
    import lpips
    import numpy as np
    import torch
    from safetensors.torch import load_file

    embedded: dict[str, bool] = {}
    if config.lpips_weights is not None:
        _check_lpips(Path(config.lpips_weights), config.lpips_net)
        embedded = {"lpips": False, "pnet_rand": True, "pretrained": False}
    # lpips calls torchvision in a deprecated way.
    quiet = warnings.catch_warnings(action="ignore", category=UserWarning)
    with quiet, _loading("lpips_net", config.lpips_net):
        network = lpips.LPIPS(net=config.lpips_net, verbose=False, **embedded)
    if config.lpips_weights is not None:
        weights = load_file(config.lpips_weights)
        network.net.load_state_dict({name: value.float() for name, value in weights.items()})
    device = _device()
    network = network.eval().requires_grad_(False).to(device)
    scale = 1.0 if config.lpips_weights is None else 1 / (2 * network.L)
    side = lpips_side(config)

    def pixels(pictures: list[Image.Image]) -> torch.Tensor:
        small = [p.convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for p in pictures]
        return torch.from_numpy(np.stack([np.asarray(p, dtype=np.float32) for p in small]) / 127.5 - 1).permute(
            0, 3, 1, 2
        )

    def distance(first: list[Image.Image], second: list[Image.Image]) -> torch.Tensor:
        a, b = pixels(first), pixels(second)
        pairs = torch.cartesian_prod(torch.arange(len(a)), torch.arange(len(b)))

        def of_pairs(places: torch.Tensor) -> torch.Tensor:
            return network(a[places[:, 0]].to(device), b[places[:, 1]].to(device)).flatten()

        few = max(1, BATCH * 64 // side)  # the network's layers of all pairs of a batch are held at once
        return scale * _in_batches(of_pairs, pairs, few).reshape(len(a), len(b))

    return distance


def _check_lpips(path: Path, net: str) -> None:
    """Raise SvdiffError for a backbone that is not there, or of another architecture than `net`."""
    if not path.is_file():
        raise SvdiffError(
            f"evaluators.lpips_weights: {path} does not exist; run `dvc pull`, or `svdiff base train lpips` to make it"
        )
    trained_for = path.with_name("config.json")
    if trained_for.is_file() and (of := json.loads(trained_for.read_text())["net"]) != net:
        raise SvdiffError(f"evaluators.lpips_net is {net!r}, but {path} is of {of!r}: say {of!r}")


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _in_batches(function: Callable[[Any], torch.Tensor], items: Any, size: int = BATCH) -> torch.Tensor:
    """`function` of all items, at most `size` at a time."""
    import torch

    with torch.inference_mode():
        parts = torch.cat([function(items[start : start + size]) for start in range(0, len(items), size)])
    return parts.clone()


def describe_evaluators(config: EvaluatorsConfig) -> dict[str, dict[str, Any]]:
    """What must be equal for two scores to be comparable: networks, weights (hash, or the hub's tag), transforms, scale.

    Raises SvdiffError if weights are not there.
    """
    clip: dict[str, Any] = {"score": "cosine, not scaled"}
    if is_folder(config.clip_model):
        folder = Path(config.clip_model)
        _check_clip(folder)
        described = json.loads((folder / "open_clip_config.json").read_text())
        clip |= {
            "model": described.get("model_cfg"),
            "weights_sha256": _hashes(path for path in sorted(folder.iterdir()) if path.suffix in CLIP_WEIGHTS),
            "transform": described.get("preprocess_cfg"),
        }
    else:
        clip |= {
            "model": config.clip_model,
            "weights": sha256_file(tag) if (tag := config.clip_pretrained) and Path(tag).is_file() else tag,
            "transform": "open_clip's for this model",
        }
    lpips: dict[str, Any] = {"score": "1 − distance, mean over the training pictures", "net": config.lpips_net}
    if config.lpips_weights:
        _check_lpips(Path(config.lpips_weights), config.lpips_net)
        lpips |= {"weights_sha256": sha256_file(config.lpips_weights), "heads": "none: 1 − cosine, mean over layers"}
    else:
        lpips |= {"weights": "of the lpips package", "heads": "learned"}
    side = lpips_side(config)
    lpips["transform"] = f"RGB, {side} × {side} (Lanczos), in [-1, 1]"
    return {"identity": _describe_identity(config.identity_model), "clip": clip, "lpips": lpips}


def _describe_identity(name: str | None) -> dict[str, Any]:
    identity: dict[str, Any] = {"score": "cosine, mean over the training pictures"}
    if name is None:
        return identity | {"model": CLIP_AS_IDENTITY}
    from transformers.utils import cached_file

    _check_identity(name)

    def stored(file: str) -> Path | None:
        try:
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise SvdiffError(f"evaluators.identity_model '{name}' cannot be loaded: {error}") from error
        return Path(found) if found else None

    described, transform = stored("config.json"), stored("preprocessor_config.json")
    weights = [path for file in WEIGHTS if (path := stored(file))][:1]
    architecture = json.loads(described.read_text()) if described else {}
    return identity | {
        "model": "+".join(architecture.get("architectures") or []) if Path(name).is_dir() else name,
        "weights_sha256": _hashes(weights),
        "transform": json.loads(transform.read_text()) if transform else None,
    }


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in paths}

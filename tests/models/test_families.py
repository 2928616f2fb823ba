"""Every family on a tiny layout: sampling, training through the real stage, deltas there and back, LoRA for other tools."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from typer.testing import CliRunner

from svdiff.cli.spectral import app
from svdiff.config import BaseModelConfig, load_config
from svdiff.errors import SvdiffError
from svdiff.models import family_of, load_pipeline, native_size
from svdiff.sampling.guidance import sample_guided
from svdiff.sampling.images import Job, sample_images
from svdiff.sampling.stage import personalise
from svdiff.spectral import SpectralDelta, SpectralPipeline, attach, load_basis, weights_hash
from svdiff.spectral.export import export_lora
from svdiff.training import train
from tests.models.tiny import FAMILIES, PIXELS, base_settings, make_tiny

JOBS = [Job("a sks dog", 1), Job("a cat", 2)]
TRAINED = ("sd2", "sdxl", "sd3.5", "flux", "flux2", "flux2-klein")  # SD 1.x is trained by all other tests
# One with joint attention is fast; with cross-attention, the matrix of settings trains SDXL and all other tests SD 1.x.
TRAINED_SLOWLY = [pytest.param(f, marks=() if f == "sd3.5" else pytest.mark.slow) for f in TRAINED]
# Of each kind of network and of text encoders one is fast.
FAMILIES_SLOWLY = [
    pytest.param(f, marks=() if f in ("sd", "sdxl", "sd3.5", "flux2-klein") else pytest.mark.slow) for f in FAMILIES
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a family's tiny base, made when first asked for."""
    root, made = tmp_path_factory.mktemp("tiny-families"), {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, root / family)
        return made[family]

    return of


@pytest.fixture
def load(folder: Any) -> Any:
    """Loads a family's tiny base as `base` of params.yaml would have it."""
    return lambda family, **settings: load_pipeline(BaseModelConfig(**base_settings(family, folder(family)) | settings))


@pytest.fixture
def checkout(folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a checkout of one concept on a family's tiny base the current folder."""

    def make(family: str, **training: object) -> Path:
        for name, colour in (("data/concepts/pet", "brown"), ("out/prior/dog", "grey")):
            (tmp_path / name).mkdir(parents=True)
            for i in range(3):
                image = Image.new("RGB", (40, 40), "white")
                ImageDraw.Draw(image).ellipse((6 + i, 8, 30 + i, 34), fill=colour)
                image.save(tmp_path / name / f"{i:03d}.png")
        params = {
            "base": base_settings(family, folder(family)),
            "classes": ["dog"],
            "concepts": {"pet": {"class_word": "dog", "token": "sks"}},
            "train": {"steps": 3, "lr": 1e-2, "lr_1d": 1e-2, "validate_every": 3, "validation_seeds": [0]} | training,
            "sample": {"prompts": ["a {subject}"], "steps": 2},
            "rank": {"concepts": ["pet"]},
            "tracking": {"live": "none"},
        }
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
        return tmp_path

    return make


def pictures(pipe: Any) -> np.ndarray:
    return np.stack([np.asarray(image, int) for image in sample_images(pipe, JOBS, steps=2, guidance=2.0)])


def hashes(pipe: Any) -> dict[str, str]:
    return {name: weights_hash(part) for name, part in family_of(pipe).parts.items()}


@torch.no_grad()
def prediction(pipe: Any) -> torch.Tensor:
    family = family_of(pipe)
    latents = torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(5))
    return family.predict(latents, torch.tensor([700, 300]), family.encode(["a sks dog", "a cat"]))


@pytest.mark.parametrize("family", FAMILIES_SLOWLY)
def test_our_sampling_loop_draws_the_pictures_of_the_pipeline(load: Any, family: str) -> None:
    pipe = load(family)
    for guidance in (1.0, 3.0):
        theirs = sample_images(pipe, JOBS, steps=3, guidance=guidance)
        ours = sample_guided(pipe, JOBS, steps=3, guidance=guidance)
        assert theirs[0].size == (PIXELS, PIXELS)
        for a, b in zip(theirs, ours, strict=True):
            assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    assert np.abs(np.asarray(theirs[0], int) - np.asarray(theirs[1], int)).max() > 1


@pytest.mark.parametrize("family", FAMILIES_SLOWLY)
def test_latents_return_to_the_autoencoder_as_they_came(load: Any, folder: Any, family: str) -> None:
    pipe = load(family)
    view = family_of(pipe)
    pixels = torch.rand(2, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = view.to_latents(pixels)
    assert mean.shape == deviation.shape == (2, *view.latent_shape)
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    torch.testing.assert_close(view.unscaled(mean), posterior.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.unscaled(mean + deviation), posterior.mean + posterior.std, rtol=1e-4, atol=1e-4)
    assert native_size(BaseModelConfig(**base_settings(family, folder(family)))) == PIXELS == view.image_size


@pytest.mark.parametrize("family", TRAINED_SLOWLY)
def test_from_params_to_a_delta_to_pictures_and_back(checkout: Any, family: str) -> None:
    """The whole stage, then the delta on a fresh base: it changes pictures, fuses, and leaves no bit behind."""
    checkout(family)
    config = load_config()
    path = train(config, "pet")
    peaks = json.loads(path.with_name("train.json").read_text())["peak_bytes"]
    assert set(peaks) == {"loading", "encoding", "decomposition", "training", "validation"}
    delta = SpectralDelta.load(path)
    pipe = load_pipeline(config.base)
    network = family_of(pipe).network_name
    assert delta.prefixes() == [network]
    # What the text asks in the last block reaches no picture, so that its weights stay as they are.
    assert sum(bool(value.any()) for value in delta.tensors.values()) > 0.9 * len(delta.tensors)
    before, plain = hashes(pipe), pictures(pipe)
    personal = personalise(pipe, path)
    shifted = pictures(pipe)
    assert np.abs(shifted - plain).max() > 0
    assert isinstance(personal, SpectralPipeline)
    personal.fuse()
    assert np.abs(pictures(pipe) - shifted).max() <= 2
    personal.unfuse()
    assert np.array_equal(pictures(pipe), shifted)
    personal.unload()
    assert hashes(pipe) == before
    assert np.array_equal(pictures(pipe), plain)


@pytest.mark.parametrize("family", TRAINED_SLOWLY)
def test_zero_shifts_are_the_plain_pipeline(load: Any, family: str, tmp_path: Path) -> None:
    pipe = load(family)
    plain = prediction(pipe)
    for name in (family_of(pipe).network_name, *family_of(pipe).encoder_names):
        attach(getattr(pipe, name), load_basis(getattr(pipe, name), tmp_path, progress=False), prefix=name)
    torch.testing.assert_close(prediction(pipe), plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", TRAINED_SLOWLY)
def test_lora_of_full_rank_is_the_delta_without_its_norms(load: Any, family: str, tmp_path: Path) -> None:
    """Reloaded by diffusers itself, for the network and the text encoders."""
    pipe = load(family)
    parts = {family_of(pipe).network_name: "UNet"} | dict.fromkeys(family_of(pipe).encoder_names, "UNet")
    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    bases = {name: load_basis(getattr(pipe, name), tmp_path / "bases", progress=False) for name in parts}
    metadata: dict[str, str] = {}
    for name, basis in bases.items():
        shifts = attach(getattr(pipe, name), basis, prefix=name)
        zero = shifts.delta()
        shifts.detach()
        metadata |= zero.metadata
        for key, value in zero.tensors.items():
            linear = key.removeprefix(f"{name}.") in basis and "embed_tokens" not in key and "embedding" not in key
            tensors[key] = 0.05 * torch.randn(value.shape, generator=random) * linear
    delta = SpectralDelta(tensors, metadata)
    personal = SpectralPipeline(pipe, cache=tmp_path / "bases", progress=False)
    plain = prediction(pipe)
    personal.load_delta(delta, "pet")
    wanted = prediction(pipe)
    personal.unload()
    modules = {name: getattr(pipe, name) for name in parts}
    export_lora(modules, bases, delta, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert (wanted - plain).abs().max() > 0.02
    torch.testing.assert_close(prediction(pipe), wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kohyas_names_reach_every_layer_that_diffusers_knows_them_of(load: Any, family: str, tmp_path: Path) -> None:
    """The same as diffusers' own names, of all layers but two of SDXL; text encoders' are those in ComfyUI's table."""
    pipe = load(family)
    parts = (family_of(pipe).network_name, *family_of(pipe).encoder_names)
    modules = {name: getattr(pipe, name) for name in parts}
    bases = {name: load_basis(module, tmp_path / "bases", progress=False) for name, module in modules.items()}
    tensors, metadata = {}, {}
    for name, basis in bases.items():
        shifts = attach(modules[name], basis, prefix=name)
        zero = shifts.delta()
        shifts.detach()
        metadata |= zero.metadata
        known = {key: "add_embedding" not in key and key.removeprefix(f"{name}.") in basis for key in zero.tensors}
        tensors |= {key: torch.full_like(value, 0.05 * known[key]) for key, value in zero.tensors.items()}
    delta = SpectralDelta(tensors, metadata)
    plain, seen = prediction(pipe), []
    for layout in ("kohya", "diffusers"):
        file = f"{layout}.safetensors"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # embeddings have no place in it
            export_lora(modules, bases, delta, tmp_path / file, layout=layout, kohya=family_of(pipe).lora_names)  # type: ignore[arg-type]
        pipe.load_lora_weights(tmp_path, weight_name=file)
        seen.append(prediction(pipe))
        pipe.unload_lora_weights()
    assert torch.equal(seen[0], seen[1])
    assert (seen[0] - plain).abs().max() > 0.01
    layer = r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)|text_projection"
    for file, start, dot in (
        ("diffusers.safetensors", "text_encoder(_2)?", r"\."),
        ("kohya.safetensors", "lora_te[12]?", "_"),
    ):
        names = [name.rsplit(".", 2)[0] for name in load_file(tmp_path / file) if name.startswith(("text", "lora_te"))]
        known = re.compile(start + dot + "(" + layer.replace(r"\.", dot) + ")")
        assert names
        assert [name for name in names if not known.fullmatch(name)] == []


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("sd3", {"single_subject_weight": 0.1}, "joint attention of picture and text"),
        ("flux", {"method": "custom-diffusion", "subset": "UNet"}, "joint attention"),
        ("flux2-klein", {"text_encoder": True}, "is a language model"),
    ],
)
def test_what_a_family_cannot_do_is_refused_in_one_sentence(
    checkout: Any, family: str, settings: dict[str, Any], message: str
) -> None:
    checkout(family, **settings)
    with pytest.raises(SvdiffError, match=message) as error:
        train(load_config(), "pet")
    assert "\n" not in str(error.value)


def test_kohyas_names_are_refused_of_a_transformer(folder: Any, tmp_path: Path) -> None:
    SpectralDelta({}, {"base_hash": "x"}).save(tmp_path / "delta.safetensors")
    given = [str(tmp_path / "delta.safetensors"), "--base", str(folder("sd3")), "-o", str(tmp_path / "x.safetensors")]
    done = CliRunner().invoke(app, ["export", *given, "--lora", "--kohya"])
    assert "--kohya is for UNets; of Stable Diffusion 3" in str(done.exception)


def test_what_sampling_cannot_do_is_refused(load: Any) -> None:
    with pytest.raises(SvdiffError, match="set eta to 0"):
        sample_images(load("sd3"), JOBS, steps=2, guidance=2.0, eta=0.5)
    with pytest.raises(SvdiffError, match="knows no negative prompts"):
        sample_guided(load("flux"), JOBS, steps=2, guidance=2.0, beta=0.5, negatives=["a dog"])


@pytest.mark.parametrize(
    "family", ["sd", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sdxl", "sd3.5", "flux"))]
)
def test_weights_are_held_in_the_asked_precision_for_sampling_and_training(checkout: Any, family: str) -> None:
    root = checkout(family)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["base"] |= {"precision": "bf16", "vae_slicing": True, "vae_tiling": True}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    config = load_config()
    pipe = load_pipeline(config.base)
    assert {p.dtype for part in family_of(pipe).parts.values() for p in part.parameters()} == {torch.bfloat16}
    assert pipe.vae.use_slicing
    assert pipe.vae.use_tiling
    delta = SpectralDelta.load(train(config, "pet"))
    assert {value.dtype for value in delta.tensors.values()} == {torch.float32}
    plain = pictures(pipe)
    personalise(pipe, Path("out/train/pet/delta.safetensors"))
    assert np.abs(pictures(pipe) - plain).max() > 0


def test_a_resolution_of_ones_own_must_fit_the_patches(load: Any) -> None:
    pipe = load("sd", resolution=24)
    assert sample_images(pipe, JOBS[:1], steps=1, guidance=1.0)[0].size == (24, 24)
    with pytest.raises(SvdiffError, match="a multiple of 4 pixels"):
        load("flux", resolution=18)


def test_a_single_file_needs_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match="is not a file here"):
        load_pipeline(BaseModelConfig(model=str(tmp_path / "model.safetensors")))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SvdiffError, match=r"set base\.config"):
        load_pipeline(BaseModelConfig(model=str(tmp_path / "model.safetensors")))

"""Which bases are taken, and what is said of the others before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from svdiff.cli.spectral import subsets
from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError
from svdiff.models import load_pipeline, native_size
from svdiff.models.loading import _placed
from svdiff.spectral import weights_hash

OTHERS = ("StableDiffusionImg2ImgPipeline", "PixArtAlphaPipeline", "StableDiffusionInpaintPipeline")


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of a supported base, to make another of."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.mark.parametrize("found", OTHERS)
def test_another_architecture_is_refused_in_one_sentence(folder: Path, found: str) -> None:
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": found}))
    config = BaseModelConfig(model=str(folder))
    for refused in (lambda: load_pipeline(config), lambda: native_size(config), lambda: subsets(base=str(folder))):
        with pytest.raises(SvdiffError, match=f"is a {found}; supported are StableDiffusionPipeline") as error:
            refused()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("found", OTHERS)
def test_another_architecture_on_the_hub_is_refused_before_its_weights(monkeypatch, found: str) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: {"_class_name": found})
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(SvdiffError, match=f"'somebody/model' is a {found}; supported are StableDiffusionPipeline"):
        load_pipeline(BaseModelConfig(model="somebody/model"))


def test_a_folder_that_is_no_base_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match=r"without model_index\.json; expected a diffusers folder"):
        load_pipeline(BaseModelConfig(model=str(tmp_path)))
    with pytest.raises(SvdiffError, match="is not a folder here"):
        load_pipeline(BaseModelConfig(model=str(tmp_path / "nowhere")))


def test_files_of_a_variant_are_read_where_it_is_asked_for(tiny_pipe, tmp_path: Path) -> None:
    tiny_pipe.save_pretrained(tmp_path / "base", variant="fp16")
    assert list(tmp_path.rglob("*.fp16.safetensors"))
    loaded = load_pipeline(BaseModelConfig(model=str(tmp_path / "base"), variant="fp16"))
    assert weights_hash(loaded.unet) == weights_hash(tiny_pipe.unet)
    with pytest.raises(SvdiffError, match="cannot be loaded"):
        load_pipeline(BaseModelConfig(model=str(tmp_path / "base")))


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_single_file_is_read_with_the_configuration_beside_it(
    tiny_pipe, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    from diffusers import StableDiffusionPipeline

    asked: dict[str, Any] = {}
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(
        StableDiffusionPipeline,
        "from_single_file",
        lambda file, **options: asked.update(options, file=file) or tiny_pipe,
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    load_pipeline(BaseModelConfig(model=str(file), config=str(tiny_base), precision="bf16"))
    assert asked["file"] == str(file)
    assert asked["config"] == str(tiny_base)
    assert asked["torch_dtype"] == torch.bfloat16
    assert asked["local_files_only"]  # the file is here, and so are its configurations


@pytest.mark.parametrize(
    ("offload", "called"),
    [("none", ["to"]), ("parts", ["enable_model_cpu_offload"])],
)
def test_on_a_gpu_tensor_float_32_is_allowed_and_parts_or_layers_wait_in_main_memory(
    monkeypatch: pytest.MonkeyPatch, offload: Any, called: list[str]
) -> None:
    allowed: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", allowed.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = MagicMock()
    _placed(pipe, BaseModelConfig(offload=offload), torch.device("cuda"))
    assert [call[0] for call in pipe.method_calls] == called
    assert allowed == ["high"]
    assert torch.backends.cudnn.allow_tf32
    pipe.reset_mock()
    _placed(pipe, BaseModelConfig(offload=offload), torch.device("cpu"))
    assert [call[0] for call in pipe.method_calls] == ["to"]


def test_offline_a_hub_id_comes_from_the_local_cache_at_its_revision(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    shutil.copytree(tiny_base, tmp_path / "models--owner--name" / "snapshots" / commit)
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "of-mine").write_text(commit)
    loaded = load_pipeline(BaseModelConfig(model="owner/name", revision="of-mine"))
    assert weights_hash(loaded.unet) == weights_hash(load_pipeline(BaseModelConfig(model=str(tiny_base))).unet)
    with pytest.raises(SvdiffError, match="only the local cache was looked in"):
        load_pipeline(BaseModelConfig(model="owner/name", revision="another"))

"""Hashes of weights that come from files are read once; whatever changes weights or files is noticed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError
from svdiff.models import family_of, load_pipeline
from svdiff.spectral import SpectralDelta, SpectralPipeline, attach, hashing, load_basis, weights_hash


class Read:
    """Counts the bytes that are hashed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, real = 0, hashing.raw_bytes

        def counted(tensor: torch.Tensor) -> memoryview:
            found = real(tensor)
            self.bytes += len(found)
            return found

        monkeypatch.setattr(hashing, "raw_bytes", counted)

    def by(self, module: torch.nn.Module) -> tuple[str, int]:
        """A module's hash, and the bytes that were read for it."""
        self.bytes = 0
        return weights_hash(module), self.bytes


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Read:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "scratch"))
    monkeypatch.setattr(hashing, "SETTLED", -3600.0)  # files of these tests are seconds old
    return Read(monkeypatch)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def load(folder: Path, **settings: str) -> dict[str, torch.nn.Module]:
    return family_of(load_pipeline(BaseModelConfig(model=str(folder), **settings))).parts


def test_files_are_read_once_however_often_they_are_loaded(read: Read, folder: Path) -> None:
    first = {}
    for name, part in load(folder).items():
        first[name], size = read.by(part)
        assert size == sum(tensor.nbytes for tensor in part.state_dict().values())
    for name, part in load(folder).items():
        assert read.by(part) == (first[name], 0)
    half = load(folder, precision="bf16")["unet"]
    found, size = read.by(half)
    assert found != first["unet"]
    assert size
    assert read.by(load(folder, precision="bf16")["unet"]) == (found, 0)


def test_weights_that_are_exchanged_or_written_to_are_read_again(read: Read, folder: Path) -> None:
    unet = load(folder)["unet"]
    plain, _ = read.by(unet)
    found = {plain}
    with torch.no_grad():
        unet.conv_in.bias.add_(1)
    found.add(read.by(unet)[0])
    unet = load(folder)["unet"]
    assert read.by(unet)[1] == 0
    unet.conv_in.bias.data = unet.conv_in.bias.data + 2
    found.add(read.by(unet)[0])
    unet = load(folder)["unet"]
    unet.load_state_dict({name: value + 3 for name, value in unet.state_dict().items()})
    found.add(read.by(unet)[0])
    unet = load(folder)["unet"]
    unet.conv_in = torch.nn.Conv2d(4, 32, 3)
    found.add(read.by(unet)[0])
    unet = load(folder)["unet"]
    unet.conv_in.weight.data += 1e-3 * torch.randn(unet.conv_in.weight.shape)  # as PEFT merges a LoRA
    found.add(read.by(unet)[0])
    assert len(found) == 6
    assert read.by(load(folder)["unet"]) == (plain, 0)  # what was hashed meanwhile is not taken for what the files hold


def test_files_that_change_are_read_again_though_size_and_time_are_what_they_were(read: Read, folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    base = load(folder)["unet"]
    before, stat = read.by(base)[0], file.stat()
    assert read.by(base) == (before, 0)
    weights = load_file(file)
    weights["conv_in.bias"] += 1e-3
    save_file(weights, folder / "other.safetensors", metadata={"format": "pt"})
    other = (folder / "other.safetensors").read_bytes()
    assert len(other) == stat.st_size
    with file.open("r+b") as stream:  # the same inode
        stream.write(other)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = load(folder)["unet"]
    after, size = read.by(changed)
    assert after != before
    assert size


def test_files_that_change_while_they_are_loaded_are_not_known(
    read: Read, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "SETTLED", 2.0)  # they were copied just now
    for _ in range(2):
        assert read.by(load(folder)["unet"])[1]


def test_files_that_change_after_they_were_loaded_are_not_known(read: Read, folder: Path, tmp_path: Path) -> None:
    """A weight may be mapped, and is another one then."""
    unet = load(folder)["unet"]
    os.utime(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert read.by(unet)[1]
    assert not (tmp_path / "scratch/hashes").exists()


def test_what_cannot_be_kept_or_is_spoilt_is_found_anew(read: Read, folder: Path, tmp_path: Path) -> None:
    found, _ = read.by(load(folder)["unet"])
    [kept] = (tmp_path / "scratch/hashes").iterdir()
    kept.write_text("f" * 20)
    again, size = read.by(load(folder)["unet"])
    assert again == found == kept.read_text()
    assert size
    shutil.rmtree(kept.parent)
    kept.parent.write_text("no folder")
    assert read.by(load(folder)["unet"])[0] == found


def test_a_delta_of_a_part_is_refused_on_a_base_that_differs_elsewhere(
    read: Read, folder: Path, tmp_path: Path
) -> None:
    unet = load(folder)["unet"]
    shifts = attach(unet, load_basis(unet, tmp_path / "bases", progress=False), subset="UNet-CA")
    shifts.delta(concept="dog").save(tmp_path / "delta.safetensors")
    shifts.detach()
    delta = SpectralDelta.load(tmp_path / "delta.safetensors")
    for _ in range(2):
        read.bytes, pipe = 0, load_pipeline(BaseModelConfig(model=str(folder)))
        SpectralPipeline(pipe, cache=tmp_path / "bases", progress=False).load_delta(delta, "dog")
        assert not read.bytes
    with torch.no_grad():
        pipe = load_pipeline(BaseModelConfig(model=str(folder)))
        pipe.unet.conv_in.bias.add_(1)  # of no cross-attention
    with pytest.raises(SvdiffError, match="trained on"):
        SpectralPipeline(pipe, cache=tmp_path / "bases", progress=False).load_delta(delta, "dog")

"""The commands, as a person calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from svdiff.cli import app
from svdiff.cli.pictures import _stem
from svdiff.config import BaseModelConfig
from svdiff.errors import SvdiffError
from svdiff.models import load_pipeline
from svdiff.spectral import SUBSETS, SpectralDelta, attach, load_basis
from tests.spectral.conftest import perturb
from tests.spectral.test_pipeline import draw, make_delta


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def deltas(tiny_pipe, bases: Path, tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, path in enumerate(paths):
        make_delta(tiny_pipe, bases, seed).save(path)
    return paths


def test_subsets(tiny_base: Path) -> None:
    rows = json.loads(run("subsets", "--base", "sd15", "--json"))
    assert [row["name"] for row in rows] == list(SUBSETS)
    assert rows[0].keys() == {"name", "tensors", "shifts", "bytes_fp32", "bytes_fp16", "paper_kb"}
    assert (rows[0]["tensors"], rows[0]["shifts"], rows[0]["paper_kb"]) == (391, 322_856, 1404)
    own = json.loads(run("subsets", "--base", tiny_base, "--text-encoder", "--json"))
    assert {row["paper_kb"] for row in own} == {None}
    assert own[-1]["name"] == "text encoder"
    assert "UNet-CA-KV" in run("subsets", "--base", tiny_base)
    with pytest.raises(SvdiffError, match="'/nowhere' is not a folder here"):
        run("subsets", "--base", "/nowhere")


def test_bytes_are_those_of_a_file_less_its_provenance(tiny_base: Path, deltas: list[Path], tmp_path: Path) -> None:
    row = json.loads(run("subsets", "--base", tiny_base, "--json"))[0]
    delta = SpectralDelta.load(deltas[0])
    bare = SpectralDelta(delta.tensors, {"norms": delta.metadata["norms"]})
    bare.save(tmp_path / "bare.safetensors")
    bare.save(tmp_path / "half.safetensors", torch.float16)
    assert (tmp_path / "bare.safetensors").stat().st_size == row["bytes_fp32"]
    assert (tmp_path / "half.safetensors").stat().st_size == row["bytes_fp16"]


def test_delta_verbs(deltas: list[Path], tmp_path: Path) -> None:
    a, b = (SpectralDelta.load(path) for path in deltas)
    shown = run("delta", "show", deltas[0])
    assert a.hash in shown
    assert "unet.conv_in.weight" in shown
    assert json.loads(run("delta", "show", deltas[0], "--json"))["hash"] == a.hash
    out = tmp_path / "sum.safetensors"
    run("delta", "combine", f"{deltas[0]}:0.25", deltas[1], "-o", out)
    assert SpectralDelta.load(out).hash == (0.25 * a + b).hash
    half = tmp_path / "half.safetensors"
    run("delta", "combine", f"{deltas[0]}:0.25", deltas[1], "--half", "-o", half)
    assert {shifts.dtype for shifts in load_file(half).values()} == {torch.float16}
    compared = json.loads(run("delta", "diff", deltas[0], deltas[1], "--json"))
    assert not compared["equal"]
    assert abs(compared["mean"]) < 0.5
    assert "mean cosine 1.0000" in run("delta", "diff", deltas[0], deltas[0])
    with pytest.raises(SvdiffError, match="after the colon a finite number"):
        run("delta", "combine", f"{deltas[0]}:half", "-o", out)


def test_export(tiny_pipe, tiny_base: Path, deltas: list[Path], tmp_path: Path, monkeypatch) -> None:
    from diffusers import StableDiffusionPipeline

    from svdiff.spectral import SpectralPipeline

    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "home"))
    run("export", deltas[0], "--base", tiny_base, "-o", tmp_path / "plain")
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "plain")
    concepts = SpectralPipeline(tiny_pipe)
    concepts.load_delta(deltas[0], "a")
    for pipe in (plain, tiny_pipe):
        pipe.set_progress_bar_config(disable=True)
    assert torch.allclose(draw(plain), draw(tiny_pipe), atol=1e-3)
    with pytest.warns(UserWarning, match="LoRA has no place"):
        run("export", deltas[0], "--base", tiny_base, "--lora", "--rank", 2, "-o", tmp_path / "l.safetensors")
    concepts.unload()
    tiny_pipe.load_lora_weights(tmp_path, weight_name="l.safetensors")
    entries = json.loads(run("cache", "--json"))
    assert len(entries) == 1
    assert "weights" in run("cache")
    run("cache", "--prune", 0)
    assert "no decompositions" in run("cache")
    with pytest.raises(SvdiffError, match="add --lora"):
        run("export", deltas[0], "--base", tiny_base, "--rank", 2, "-o", tmp_path / "x")


@pytest.mark.parametrize("way", [["-o", "plain"], ["--lora", "-o", "lora.safetensors"]])
def test_a_delta_of_another_base_is_refused_before_anything_is_decomposed(
    tiny_base: Path, deltas: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]
) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    delta = SpectralDelta.load(deltas[0])
    SpectralDelta(delta.tensors, delta.metadata | {"base_hash": "0" * 64}).save(Path("other.safetensors"))
    with pytest.raises(SvdiffError, match="load the base that it was trained on"):
        run("export", "other.safetensors", "--base", tiny_base, *way)
    SpectralDelta(
        {name.replace("unet.", "transformer."): shifts for name, shifts in delta.tensors.items()}, {"norms": "[]"}
    ).save(Path("flux.safetensors"))
    with pytest.raises(SvdiffError, match="trained for another architecture"):
        run("export", "flux.safetensors", "--base", tiny_base, *way)
    assert not (tmp_path / "home/bases").exists()


def test_a_delta_of_a_half_precision_base_is_exported_from_that_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDIFF_HOME", str(tmp_path / "home"))
    pipe = load_pipeline(BaseModelConfig(model=str(tiny_base), precision="bf16"))
    shifts = attach(pipe.unet, load_basis(pipe.unet, None, progress=False))
    perturb(shifts)
    shifts.delta().save(tmp_path / "half.safetensors")
    with pytest.raises(SvdiffError, match="in the same precision"):
        run("export", tmp_path / "half.safetensors", "--base", tiny_base, "-o", tmp_path / "plain")
    run("export", tmp_path / "half.safetensors", "--base", tiny_base, "--precision", "bf16", "-o", tmp_path / "plain")
    fused = load_pipeline(BaseModelConfig(model=str(tmp_path / "plain"))).unet.state_dict()
    shifts.fuse()
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(fused[name], weight.float()), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache", "--prune", "-1"], "greater than or equal to 0"),
        (["delta", "import", "notes.txt", "--part", "unett", "-o", "o.safetensors"], "'unet'"),
        (["delta", "import", "notes.txt", "-o", "o.safetensors"], "notes.txt is not a file here"),
    ],
)
def test_what_is_asked_wrongly_is_refused(tmp_path: Path, monkeypatch, arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)


def test_strips_of_files_have_files_of_their_own() -> None:
    assert [
        _stem(name) for name in ("rex", "a.safetensors", "deltas/b.safetensors", "out/train/rex/delta.safetensors")
    ] == [
        "rex",
        "a",
        "b",
        "rex",
    ]

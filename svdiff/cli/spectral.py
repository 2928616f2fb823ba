"""`svdiff subsets | cache | delta | export`: the spectral parameter space."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from svdiff.cli.arguments import AsJson, wrote
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.spectral.delta import SpectralDelta

app = typer.Typer()
delta_app = typer.Typer(no_args_is_help=True, help="Show, combine and compare delta files.")
app.add_typer(delta_app, name="delta")

Base = Annotated[str, typer.Option("--base", help="diffusers folder, Hub id, or a size: sd15, sdxl, flux, …")]
Half = Annotated[bool, typer.Option("--half", help="store float16 instead of float32")]
Precision = Annotated[
    Literal["fp32", "bf16", "fp16"],
    typer.Option(
        "--precision", help="numbers that the base is loaded in: those that it was trained on, base.precision"
    ),
]
EMBEDDED = "models/base"


def _cache_folder() -> Path:
    return Path(os.environ.get("SVDIFF_HOME", ".svdiff")) / "bases"


@app.command()
def subsets(
    base: Base = EMBEDDED,
    text_encoder: Annotated[bool, typer.Option("--text-encoder", help="add a row for each text encoder")] = False,
    as_json: AsJson = False,
) -> None:
    """Table 1 for any base: tensors, shifts and bytes of each subset.

    `--base sd15`, `sdxl`, `sd3.5-medium`, `sd3.5-large`, `flux` and `flux2` need no download.
    """
    from dataclasses import asdict, replace

    from svdiff.models.sizes import build, family_named
    from svdiff.spectral.subsets import subset_sizes, subsets_of

    family = family_named(base)
    network = build(base)
    # The paper's sizes are those of Stable Diffusion 1.x.
    paper = sum(p.numel() for p in network.parameters()) == 859_520_964
    rows = []
    for name in subsets_of(network):
        try:
            row = subset_sizes(network, name, prefix=family.network_name)
        except SvdiffError:  # a base without a middle block, say
            continue
        rows.append(row if paper else replace(row, paper_kb=None))
    for encoder in family.encoder_names if text_encoder else ():
        extra = subset_sizes(build(base, encoder), "all", prefix=encoder)
        rows.append(replace(extra, name=encoder.replace("_", " "), paper_kb=None))
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=1))
        return
    typer.echo(f"{'subset':<15}{'tensors':>8}{'shifts':>10}{'fp32 KB':>10}{'fp16 KB':>10}{'paper KB':>10}")
    for row in rows:
        full, half = row.bytes_fp32 / 1024, row.bytes_fp16 / 1024
        theirs = f"{row.paper_kb:.1f}" if row.paper_kb else "-"
        typer.echo(f"{row.name:<15}{row.tensors:>8}{row.shifts:>10}{full:>10.1f}{half:>10.1f}{theirs:>10}")


@app.command()
def cache(
    folder: Annotated[Path | None, typer.Option(help="the cache [default: .svdiff/bases]")] = None,
    prune: Annotated[int | None, typer.Option(min=0, help="keep only so many, the most recently used")] = None,
    as_json: AsJson = False,
) -> None:
    """Show cached decompositions, or prune them."""
    from dataclasses import asdict

    from svdiff.spectral.cache import list_cache, prune_cache

    folder = folder or _cache_folder()
    gone = prune_cache(folder, keep=prune) if prune is not None else []
    for entry in gone:
        typer.echo(f"deleted {entry.base_hash[:16]} ({entry.bytes / 1e6:.1f} MB)", err=True)
    found = list_cache(folder)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], indent=1))
        return
    if not found:
        typer.echo(f"no decompositions in {folder}")
    for entry in found:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        typer.echo(f"{entry.base_hash[:16]}  {entry.weights:>4} weights  {entry.bytes / 1e6:>8.1f} MB  used {used}")


@delta_app.command()
def show(file: Path, as_json: AsJson = False) -> None:
    """What a delta shifts, how far, and where it comes from."""
    delta = _load(file)
    norms = delta.norms
    rows = [
        {
            "name": name,
            "shifts": len(v),
            "kind": "1-D" if name in norms else "spectral",
            "norm": float(v.norm()),
            "largest": float(v.abs().max()),
        }
        for name, v in delta.tensors.items()
    ]
    facts = {k: v for k, v in sorted(delta.metadata.items()) if k != "norms" and not k.endswith("fingerprints")}
    if as_json:
        typer.echo(json.dumps({"hash": delta.hash, "metadata": facts, "tensors": rows}, indent=1))
        return
    for key, value in facts.items():
        typer.echo(f"{key:<14} {value}")
    typer.echo(f"{'hash':<14} {delta.hash}\n")
    typer.echo(f"{'weight':<76}{'shifts':>7}{'|δ|':>10}{'max |δ|':>10}")
    for row in rows:
        typer.echo(f"{row['name']:<76}{row['shifts']:>7}{row['norm']:>10.4f}{row['largest']:>10.4f}")
    typer.echo(f"{len(rows)} weights, {sum(len(v) for v in delta.tensors.values())} shifts")


@delta_app.command("combine")
def combine_files(
    files: Annotated[
        list[str], typer.Argument(help="delta files, each with its weight after a colon: a.safetensors:0.5")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")],
    half: Half = False,
) -> None:
    """Σ wᵢ δᵢ: addition (Eq. 4), interpolation (weights α and 1−α, Eq. 5) or scaling (one file)."""
    import torch

    from svdiff.spectral.delta import combine

    parts = [_weighted(file) for file in files]
    combine([(_load(path), weight) for path, weight in parts]).save(output, torch.float16 if half else torch.float32)
    typer.echo(f"{output}: " + " + ".join(f"{weight:g} x {path.name}" for path, weight in parts))


@delta_app.command()
def diff(first: Path, second: Path, as_json: AsJson = False) -> None:
    """Cosine similarity of two deltas, layer by layer (Fig. 9a takes the mean)."""
    from svdiff.spectral.delta import cosine_similarity

    a, b = _load(first), _load(second)
    cosines = cosine_similarity(a, b)
    if not cosines:
        raise SvdiffError(f"{first} and {second} shift no weight in common")
    mean = sum(cosines.values()) / len(cosines)
    only = {"first": sorted(a.tensors.keys() - b.tensors.keys()), "second": sorted(b.tensors.keys() - a.tensors.keys())}
    if as_json:
        typer.echo(json.dumps({"mean": mean, "cosine": cosines, "only": only, "equal": a.hash == b.hash}, indent=1))
        return
    for name, value in cosines.items():
        distance = float((a.tensors[name] - b.tensors[name]).norm())
        typer.echo(f"{name:<76} cosine {value:>7.4f}  |δ₁ − δ₂| {distance:.4g}")
    for which, names in only.items():
        if names:
            typer.echo(f"only in the {which}: {len(names)} weights, such as {names[0]}")
    typer.echo(f"mean cosine {mean:.4f} over {len(cosines)} weights" + ("; equal" if a.hash == b.hash else ""))


@delta_app.command("import")
def import_file(
    file: Path,
    output: Annotated[Path, typer.Option("--output", "-o", help="the file to write")],
    base: Base = EMBEDDED,
    precision: Precision = "fp32",
    part: Annotated[Literal["unet", "text_encoder"], typer.Option(help="what the shifts are of")] = "unet",
) -> None:
    """Read `spectral_shifts.safetensors` of svdiff-pytorch 0.2."""
    from svdiff.spectral.cache import load_basis
    from svdiff.spectral.legacy import import_spectral_shifts

    if not file.is_file():
        raise SvdiffError(f"{file} is not a file here")
    module = getattr(_pipeline(base, precision), part, None)
    if module is None:
        raise SvdiffError(
            f"--part {part}: the base {base} has none, and svdiff-pytorch knew Stable Diffusion 1.x and 2.x alone"
        )
    import_spectral_shifts(file, module, load_basis(module, _cache_folder()), prefix=part).save(output)
    wrote(output)


@app.command()
def export(
    file: Path,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="a folder for plain weights, a .safetensors file for LoRA")
    ],
    base: Base = EMBEDDED,
    precision: Precision = "fp32",
    lora: Annotated[bool, typer.Option("--lora", help="LoRA instead of plain diffusers weights")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="of the LoRA [default: full, exact but for norms]")] = None,
    kohya: Annotated[
        bool, typer.Option("--kohya", help="kohya's names, which ComfyUI wants of Stable Diffusion and SDXL")
    ] = False,
    half: Half = False,
) -> None:
    """A delta as plain diffusers weights (exact), or as LoRA for every other tool (without its norms' shifts)."""
    if not lora and (rank is not None or kohya):
        raise SvdiffError("--rank and --kohya are for LoRA: add --lora")
    if lora == (output.suffix != ".safetensors"):
        kind = "a LoRA is a .safetensors file" if lora else "plain weights are a folder, and --lora makes a file"
        raise SvdiffError(f"--output is '{output}': {kind}")
    import torch

    from svdiff.files import atomic_dir
    from svdiff.models import family_of
    from svdiff.spectral.export import export_lora
    from svdiff.spectral.pipeline import SpectralPipeline
    from svdiff.spectral.tokens import export_tokens

    delta, dtype = _load(file), torch.float16 if half else torch.float32
    concepts = SpectralPipeline(_pipeline(base, precision), cache=_cache_folder())
    family = family_of(concepts.pipe)
    if kohya and not family.lora_names:
        raise SvdiffError(f"--kohya is for UNets; of {family.title} all tools read diffusers' names: leave it out")
    if lora:
        bases = concepts.bases_of(delta)
        modules = {prefix: getattr(concepts.pipe, prefix) for prefix in bases}
        layout: Literal["diffusers", "kohya"] = "kohya" if kohya else "diffusers"
        names = family.lora_names
        export_lora(modules, bases, delta, output, rank=rank, dtype=dtype, layout=layout, kohya=names)
        for path in export_tokens(concepts.pipe, delta.tokens, output):
            typer.echo(str(path))
    else:
        concepts.load_delta(delta, "concept")
        concepts.fuse()
        with atomic_dir(output) as folder:
            concepts.pipe.to(dtype).save_pretrained(folder)
    wrote(output)


def _pipeline(base: str, precision: Literal["fp32", "bf16", "fp16"]) -> Any:
    from svdiff.config import BaseModelConfig
    from svdiff.models import load_pipeline

    return load_pipeline(BaseModelConfig(model=base, precision=precision))


def _load(path: Path) -> SpectralDelta:
    from svdiff.spectral.delta import SpectralDelta

    return SpectralDelta.load(path)


def _weighted(text: str) -> tuple[Path, float]:
    path, colon, weight = text.rpartition(":")
    if not colon:
        return Path(text), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SvdiffError(f"{text!r}: after the colon a finite number is expected, as in {path}:0.5")
    return Path(path), number

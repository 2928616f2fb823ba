"""`svdiff push`: a trained concept as a repository folder for the Hugging Face Hub, written without any network."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdiff.cli.arguments import PARAMS, Entry, Params, wrote
from svdiff.models.loading import DTYPES

if TYPE_CHECKING:
    from flows.pipeline.results import Results
    from svdiff.config import BaseModelConfig, Config

app = typer.Typer()


@app.command()
def push(
    name: Entry,
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder to write; new or empty")],
    params: Params = PARAMS,
) -> None:
    """A trained concept as a folder for the Hub: delta, model card and sample pictures; nothing is uploaded."""
    from flows.pipeline.results import read_results
    from svdiff.config import load_config

    config = load_config(params)
    wrote(write_repository(config, read_results(config, name, params.resolve().parent), output))
    typer.echo(f"upload it with: hf upload YOUR-NAME/{name} {output}")


def write_repository(config: Config, results: Results, output: Path) -> Path:
    """Write delta.safetensors, README.md with the model card, and the sample grids.

    Raises SvdiffError for a folder that has something in it, and for a delta or scores that are not finite.
    """
    from flows.registry.runs import sample_grids
    from svdiff.errors import SvdiffError
    from svdiff.files import atomic_dir

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SvdiffError(f"--output is '{output}', where something lies already: name a new or empty folder")
    results.check_numbers()
    with atomic_dir(output) as folder:
        shutil.copyfile(results.delta, folder / "delta.safetensors")
        (folder / "README.md").write_text(_readme(config, results))
        for model, grid in sample_grids(results).items():
            grid.save(folder / f"{model}.png")
    return output


def _readme(config: Config, results: Results) -> str:
    """The model card, with what the Hub reads before it and how to draw after it."""
    from huggingface_hub import ModelCardData

    from flows.registry.summary import card

    entry, model = results.entry, config.base.model
    facts = ModelCardData(
        base_model=None if (results.root / model).exists() else model,
        pipeline_tag="text-to-image",
        library_name="diffusers",
        tags=["svdiff", "text-to-image", "diffusers"],
        instance_prompt=f"a {entry.subject}",
    )
    return (
        f"---\n{facts.to_yaml()}\n---\n\n{card(config, results)}\n"
        "## How to draw with it\n\n"
        "The delta fits these base weights alone, in the precision that they were trained in.\n\n"
        "```python\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "from svdiff.spectral import SpectralPipeline\n\n"
        f"base = DiffusionPipeline.from_pretrained({_loaded(config.base)})\n"
        "personal = SpectralPipeline(base)\n"
        f'personal.load_delta("delta.safetensors", "{results.concept}")\n'
        f'personal.pipe("a {entry.subject}").images[0]\n'
        "```\n"
    )


def _loaded(base: BaseModelConfig) -> str:
    """Arguments with which diffusers loads a base as the delta fits it."""
    asked = {"revision": base.revision, "variant": base.variant}
    named = "".join(f', {key}="{value}"' for key, value in asked.items() if value is not None)
    return f'"{base.model}", dtype=torch.{DTYPES[base.precision]}{named}'

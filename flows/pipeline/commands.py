"""Command `sync`: the data and base of a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def sync(params: Annotated[Path, typer.Option("--params", help="the parameters file")] = Path("params.yaml")) -> None:
    """Bring data and base that are missing here or were changed in git, and track new concept folders; your changes stay."""
    from flows.pipeline.sync import sync as run
    from svdiff.check import check_written
    from svdiff.config import load_config

    config = load_config(params)
    check_written(config, params)
    for line in run(params.resolve().parent, config):
        typer.echo(line)

"""Arguments and options that several commands share: one name for one idea."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svdiff.config import Config

PARAMS = Path("params.yaml")
PICTURES = Path("pictures")

Name = Annotated[str, typer.Argument(help="name of a concept, pair or edit in params.yaml")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


def read(params: Path) -> Config:
    """params.yaml, validated."""
    from svdiff.config import load_config

    return load_config(params)


def wrote(path: Path) -> None:
    """Say where the result is."""
    typer.echo(f"wrote {path}")

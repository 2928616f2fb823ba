"""Arguments and options that several commands share: one name for one idea."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdiff.errors import SvdiffError
from svdiff.threads import use_threads

if TYPE_CHECKING:
    from svdiff.config import Config

PARAMS = Path("params.yaml")
PICTURES = Path("pictures")


def _name(text: str) -> str:
    """`teapot`, also where DVC says `train@teapot`."""
    return text.rpartition("@")[2] if text == os.environ.get("DVC_STAGE") else text


def _known(kinds: str, incomplete: str) -> list[str]:
    """For the shell's completion: names of params.yaml that begin so."""
    try:
        config = read(PARAMS)
    except SvdiffError:
        return []
    return [name for kind in kinds.split() for name in getattr(config, kind) if name.startswith(incomplete)]


def named(kinds: str, help: str) -> Any:
    """The argument NAME, one of the sections `kinds` of params.yaml; DVC names it by its variable DVC_STAGE."""
    return typer.Argument(
        metavar="NAME",
        envvar="DVC_STAGE",
        show_envvar=False,
        parser=_name,
        autocompletion=lambda incomplete: _known(kinds, incomplete),
        help=help,
    )


Names = Annotated[list[str], named("concepts pairs edits", "concepts, pairs or edits of params.yaml")]
Entry = Annotated[str, named("concepts pairs", "a concept or pair of params.yaml")]
Concept = Annotated[str, named("concepts", "a concept of params.yaml")]
Pair = Annotated[str, named("pairs", "a pair of params.yaml")]
ClassWord = Annotated[str, named("class_words", "a class word of params.yaml, such as dog")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]


def finite(number: float) -> float:
    """An option's number. Raises typer.BadParameter for nan and inf, which typer takes for numbers."""
    if not math.isfinite(number):
        raise typer.BadParameter(f"{number} is not a finite number")
    return number


def read(params: Path) -> Config:
    """params.yaml, validated; what the command computes from here on uses its threads."""
    from svdiff.config import load_config

    config = load_config(params)
    use_threads(config.threads)
    return config


def wrote(path: Path) -> None:
    """Say where the result is."""
    typer.echo(f"wrote {path}")


def refuse(context: typer.Context, options: str, why: str) -> None:
    """Raise SvdiffError if one of `options` was given on the command line, where it would have no effect."""
    for option in options.split():
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise SvdiffError(f"--{option.replace('_', '-')} {why}")

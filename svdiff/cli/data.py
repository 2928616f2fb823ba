"""`svdiff data check`: whether the pictures of a concept are worth training on."""

from __future__ import annotations

from typing import Annotated

import typer

from svdiff.cli.arguments import PARAMS, Params, read

app = typer.Typer(no_args_is_help=True, help="The pictures of concepts.")


@app.callback()
def data() -> None:
    """The pictures of concepts."""


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(help="concepts of params.yaml; none: all", show_default=False)
    ] = None,
    params: Params = PARAMS,
) -> None:
    """Say go, fix first or stop, and why; exit status 1 for a stop. Every training asks the same first."""
    config = read(params)
    for name in names or []:
        config.concept(name)
    from svdiff.data.check import check_folder
    from svdiff.data.concepts import concept_folder
    from svdiff.models import native_size, picture_grid

    size, grid, stopped = native_size(config.base), picture_grid(config.base), False
    for name in names or config.concepts:
        settings = config.train_config(name)
        verdict = check_folder(concept_folder(name), size, settings.fit, masks=settings.masks == "loss", grid=grid)
        stopped |= verdict.word == "stop"
        typer.echo("\n".join(verdict.lines(name)))
    if stopped:
        raise typer.Exit(1)

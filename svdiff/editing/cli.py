"""`svdiff edit | edit-curves`: the editing of single pictures from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svdiff.errors import SvdiffError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
PARAMS = Path("params.yaml")
PICTURES = Path("pictures")


@app.command()
def edit(
    what: Annotated[str, typer.Argument(metavar="IMAGE|NAME", help="a picture, or a name under `edits:`")],
    prompt: Annotated[str | None, typer.Option(help="what the picture shows, without a special token")] = None,
    target: Annotated[list[str] | None, typer.Option(help="an edited prompt; may be given several times")] = None,
    method: Annotated[str | None, typer.Option(help="svdiff, full or lora")] = None,
    steps: Annotated[int | None, typer.Option(help="training steps")] = None,
    inversion: Annotated[
        bool | None, typer.Option("--inversion/--no-inversion", help="only with or only without; default both")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="η of DDIM after inversion, instead of those of `edit.starts`")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="α of Eq. 7, 0 (the inverted picture) to 1 (noise)")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for the result")] = PICTURES,
    params: Params = PARAMS,
) -> None:
    """Edit a picture (Sec. 3.4): train on it, then sample other prompts. With a name alone: the stage.

    Example: svdiff edit cat.png --prompt "a cat on a blue background" --target "a cat on a red background"
    """
    from svdiff.config import load_config
    from svdiff.editing.stage import choose_starts, edit_any
    from svdiff.editing.stage import edit as run

    config = load_config(params)
    if all(option is None for option in (prompt, target, method, steps, inversion, eta, alpha)):
        typer.echo(f"wrote {run(config, what)}")
        return
    if prompt is None or not target:
        raise SvdiffError(
            f"{'--prompt' if prompt is None else '--target'} is missing: to edit the picture {what}, say by --prompt what "
            "it shows and by --target what it shall show; settings of an edit of params.yaml stand there"
        )
    config = config.model_copy(update={"edit": choose_starts(config.edit, inversion=inversion, eta=eta, alpha=alpha)})
    overrides: dict[str, Any] = {k: v for k, v in (("method", method), ("steps", steps)) if v is not None}
    folder = edit_any(config, Path(what), prompt, target, overrides=overrides, output=output)
    typer.echo(f"wrote {folder}/sheet.png")


@app.command("edit-curves")
def edit_curves(
    name: Annotated[list[str] | None, typer.Option("--edit", help="one of the eight edits; default all")] = None,
    method: Annotated[list[str] | None, typer.Option(help="training method; default svdiff, full and lora")] = None,
    steps: Annotated[list[int] | None, typer.Option(help="a length of training; default 50, 100, 200 and 400")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for tables and figures")] = PICTURES
    / "edit-curves",
    params: Params = PARAMS,
) -> None:
    """Edit score against reconstruction, for methods and lengths of training, on edits whose answer is known."""
    from svdiff.config import load_config
    from svdiff.editing.curves import LENGTHS, METHODS
    from svdiff.editing.curves import edit_curves as run

    folder = run(
        load_config(params), names=name or (), methods=method or METHODS, lengths=steps or LENGTHS, output=output
    )
    typer.echo(f"wrote {folder}")

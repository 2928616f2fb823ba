"""`svdiff edit`: the editing of single pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svdiff.cli.arguments import PARAMS, PICTURES, Params, named, read, refuse, wrote
from svdiff.errors import SvdiffError

app = typer.Typer()


@app.command()
def edit(
    context: typer.Context,
    what: Annotated[str, named("edits", "an edit of params.yaml, or the file of a picture")],
    prompt: Annotated[str | None, typer.Option(help="what the picture shows, without a special token")] = None,
    target: Annotated[list[str] | None, typer.Option(help="an edited prompt; may be given several times")] = None,
    method: Annotated[str | None, typer.Option(help="svdiff, full or lora")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps")] = None,
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
    from svdiff.editing.stage import choose_starts, edit_any
    from svdiff.editing.stage import edit as run

    config = read(params)
    if all(option is None for option in (prompt, target, method, steps, inversion, eta, alpha)):
        refuse(context, "output", "has no effect on an edit of params.yaml, which the pipeline keeps in out/edit")
        wrote(run(config, what))
        return
    if prompt is None or not target:
        raise SvdiffError(
            f"{'--prompt' if prompt is None else '--target'} is missing: to edit the picture {what}, say by --prompt what "
            "it shows and by --target what it shall show; settings of an edit of params.yaml stand there"
        )
    config = config.model_copy(update={"edit": choose_starts(config.edit, inversion=inversion, eta=eta, alpha=alpha)})
    overrides: dict[str, Any] = {k: v for k, v in (("method", method), ("steps", steps)) if v is not None}
    folder = edit_any(config, Path(what), prompt, target, overrides=overrides, output=output)
    wrote(folder / "sheet.png")

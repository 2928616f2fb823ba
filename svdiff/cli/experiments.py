"""`svdiff ablate | compare-pairs | edit-curves`: experiments beside the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from svdiff.cli.arguments import PARAMS, PICTURES, Params, read, refuse, wrote
from svdiff.errors import SvdiffError

app = typer.Typer()


@app.command("compare-pairs")
def compare_pairs(
    context: typer.Context,
    name: Annotated[list[str] | None, typer.Argument(help="pairs of params.yaml (default: all)")] = None,
    method: Annotated[list[str] | None, typer.Option(help="of training (default: svdiff and full)")] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="without, cut-mix-unmix, unmix; the first is what others are compared with")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each way")] = 3,
    pictures: Annotated[int, typer.Option(min=1, help="pictures of each training")] = 40,
    prompt: Annotated[str, typer.Option(help="with {first} and {second}")] = "a {first} sitting beside a {second}",
    unmix_weight: Annotated[float, typer.Option(min=0, help="of the way `unmix`")] = 1.0,
    steps: Annotated[int | None, typer.Option(min=1, help="training steps (default: the pair's)")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("out/compare-pairs"),
    params: Params = PARAMS,
) -> None:
    """How well identities are kept apart, with and without Cut-Mix-Unmix (Fig. 6). Resumes: what is finished is kept."""
    if way and "unmix" not in way:
        refuse(context, "unmix_weight", "is of the way `unmix` alone: add --way unmix, or leave it out")
    config = read(params)
    from svdiff.experiments import pairs

    overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
    path = pairs.compare_pairs(
        config,
        name or [],
        methods=method or pairs.METHODS,
        ways=way or pairs.WAYS,
        seeds=seeds,
        pictures=pictures,
        prompt=prompt,
        unmix_weight=unmix_weight,
        overrides=overrides,
        output=output,
    )
    typer.echo((path / "table.md").read_text())
    wrote(path)


@app.command("edit-curves")
def edit_curves(
    name: Annotated[list[str] | None, typer.Option("--edit", help="one of the ten edits; default all")] = None,
    method: Annotated[list[str] | None, typer.Option(help="training method; default svdiff, full and lora")] = None,
    steps: Annotated[
        list[int] | None, typer.Option(min=1, help="a length of training; default 50, 100, 200 and 400")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder for tables and figures")] = PICTURES
    / "edit-curves",
    params: Params = PARAMS,
) -> None:
    """Edit score against reconstruction, for methods and lengths of training, on edits whose answer is known."""
    from svdiff.base.config import load_base_training
    from svdiff.base.loop import load_world
    from svdiff.base.scenes import scene_edits
    from svdiff.experiments.edits import LENGTHS, METHODS
    from svdiff.experiments.edits import edit_curves as run

    config = read(params)
    world = load_world(load_base_training(params))
    edits = [edit.known(world) for edit in scene_edits(world)]
    folder = run(config, edits, names=name or (), methods=method or METHODS, lengths=steps or LENGTHS, output=output)
    wrote(folder)


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="a concept or pair")],
    key: Annotated[str, typer.Argument(help="a key of `train`, such as prior_weight")],
    values: Annotated[list[str], typer.Argument(help="its values, one training each")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder (default pictures/ablate-NAME-KEY)")
    ] = None,
    params: Params = PARAMS,
) -> None:
    """Train once a value of one key of `train`: gains over the untrained base with intervals, and a strip of pictures.

    Example: svdiff ablate teapot prior_weight 0 0.3 1
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    from svdiff.experiments.ablation import ablation

    try:
        chosen = [YAML(typ="safe").load(value) for value in values]  # as params.yaml is read
    except YAMLError:
        raise SvdiffError(f"values {' '.join(values)}: expected each as it would stand in params.yaml") from None
    wrote(ablation(read(params), name, key, chosen, output=output or PICTURES / f"ablate-{name}-{key}"))

"""`svdiff base …`: make the picture world, train the embedded base and its evaluators, write the card."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from svdiff.base.config import BaseTrainingConfig

app = typer.Typer(help="The embedded base: picture world, training, card.", no_args_is_help=True)

ConfigPath = Annotated[Path, typer.Option("--config", help="parameters; the section base_training is read")]


class Part(StrEnum):
    """What can be trained, in the order in which `all` trains it."""

    AUTOENCODER = "autoencoder"
    TEXT = "text"
    UNET = "unet"
    IDENTITY = "identity"
    CLIP = "clip"
    LPIPS = "lpips"
    ALL = "all"


@app.command()
def world(
    folder: Annotated[Path, typer.Option(help="where the things' sheets go")] = Path("data/world"),
    concepts: Annotated[Path, typer.Option(help="where the concept folders go")] = Path("data/concepts"),
    cache: Annotated[Path, typer.Option(help="fetched icon packages")] = Path(".svdiff/base/artwork"),
) -> None:
    """Write the things' sheets, from icons that npm fetches and whose licences are checked, and the concept folders."""
    from svdiff.base.concepts import write_concepts
    from svdiff.base.things import write_things

    typer.echo(f"{folder}: {', '.join(write_things(folder, cache))}")
    typer.echo(f"{concepts}: {', '.join(write_concepts(concepts))}")


def _train(part: Part, settings: BaseTrainingConfig, models: Path) -> bool:
    """Train one part; returns whether it came to its end."""
    from svdiff.base import loop

    vae, text = loop.scratch("vae"), loop.scratch("text-encoder")
    if part is Part.UNET:
        from svdiff.base import unet

        return unet.train(settings, vae, text, models / "base")
    train: Callable[[BaseTrainingConfig, Path], bool]
    if part is Part.AUTOENCODER:
        from svdiff.base.autoencoder import train
    elif part is Part.TEXT:
        from svdiff.base.text_encoder import train
    elif part is Part.IDENTITY:
        from svdiff.base.identity import train
    elif part is Part.CLIP:
        from svdiff.base.clip import train
    else:
        from svdiff.base.lpips import train
    return train(settings, {Part.AUTOENCODER: vae, Part.TEXT: text}.get(part, models / part))


@app.command()
def train(
    part: Annotated[Part, typer.Argument(help="what to train")],
    config: ConfigPath = Path("params.yaml"),
    models: Annotated[Path, typer.Option(help="where the weights go")] = Path("models"),
) -> None:
    """Train one part, or all of them, from nothing, or go on where an interrupted training stopped.

    The order is autoencoder, text, unet, and then the evaluators identity, clip and lpips, which need none of the others.
    The UNet writes the whole pipeline to models/base at every checkpoint.
    """
    from svdiff.base.config import load_base_training

    settings = load_base_training(config)
    for one in [p for p in Part if p is not Part.ALL] if part is Part.ALL else [part]:
        if not _train(one, settings, models):
            typer.echo(f"stopped in {one}; the same command goes on from there", err=True)
            raise typer.Exit(130)


@app.command()
def card(
    config: ConfigPath = Path("params.yaml"),
    models: Annotated[Path, typer.Option(help="where the weights are")] = Path("models"),
) -> None:
    """Measure the base and its evaluators, and write models/card/README.md with its pictures."""
    from svdiff.base.card import write_card
    from svdiff.config import load_config
    from svdiff.threads import use_threads

    use_threads(load_config(config).threads)
    typer.echo(write_card(config, models))

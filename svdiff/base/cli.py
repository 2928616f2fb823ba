"""`svdiff base …`: make the picture world, train the embedded base and its evaluators, write the card."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The embedded base: picture world, training, card.", no_args_is_help=True)

ConfigPath = Annotated[Path, typer.Option("--config", help="parameters; the section base_training is read")]


class Part(StrEnum):
    """What can be trained."""

    AUTOENCODER = "autoencoder"
    TEXT = "text"
    UNET = "unet"
    CLIP = "clip"
    LPIPS = "lpips"


@app.command()
def world(
    folder: Annotated[Path, typer.Option(help="where the world goes")] = Path("data/world"),
    concepts: Annotated[Path, typer.Option(help="where the concept folders go")] = Path("data/concepts"),
    cache: Annotated[Path, typer.Option(help="fetched icon packages")] = Path(".svdiff/base/artwork"),
) -> None:
    """Fetch the pinned artwork with npm, check its licences, write the world's sprites and the concept folders."""
    from svdiff.base.artwork import write_world
    from svdiff.base.concepts import write_concepts

    typer.echo(f"{folder}: {len(write_world(folder, cache))} things")
    typer.echo(f"{concepts}: {', '.join(write_concepts(concepts, cache))}")


@app.command()
def train(
    part: Annotated[Part, typer.Argument(help="what to train")],
    config: ConfigPath = Path("params.yaml"),
    models: Annotated[Path, typer.Option(help="where the weights go")] = Path("models"),
) -> None:
    """Train one part from nothing, or go on where an interrupted training stopped.

    Autoencoder and text encoder come before the UNet. The UNet writes the whole pipeline to models/base at every checkpoint.
    """
    from svdiff.base import loop
    from svdiff.base.config import load_base_training

    settings = load_base_training(config)
    vae, text = loop.scratch("vae"), loop.scratch("text-encoder")
    if part is Part.AUTOENCODER:
        from svdiff.base.autoencoder import train as train_autoencoder

        train_autoencoder(settings, vae)
    elif part is Part.TEXT:
        from svdiff.base.reading import train as train_text

        train_text(settings, text)
    elif part is Part.UNET:
        from svdiff.base.unet import train as train_unet

        # Go on with the landed ones where nothing new was trained.
        landed = [models / "base" / "vae", models / "base" / "text_encoder"]
        vae, text = (new if new.exists() else old for new, old in zip((vae, text), landed, strict=True))
        train_unet(settings, vae, text, models / "base")
    elif part is Part.CLIP:
        from svdiff.base.clip import train as train_clip

        train_clip(settings, models / "clip")
    else:
        from svdiff.base.lpips import train as train_lpips

        train_lpips(settings, models / "lpips")


@app.command()
def card(
    config: ConfigPath = Path("params.yaml"),
    models: Annotated[Path, typer.Option(help="where the weights are")] = Path("models"),
) -> None:
    """Measure the base and its evaluators, and write models/card/README.md with a sample grid."""
    from svdiff.base.card import write_card
    from svdiff.base.config import load_base_training

    typer.echo(write_card(load_base_training(config), models))


@app.command()
def concepts(
    params: Annotated[Path, typer.Option("--params", help="the settings of `train` and `sample` are read")] = Path(
        "params.yaml"
    ),
    models: Annotated[Path, typer.Option(help="where the weights are")] = Path("models"),
) -> None:
    """Train eight concepts on the base, and draw models/card/concepts.webp: unseen prompts with each."""
    from svdiff.base import loop
    from svdiff.base.concept_sheet import draw_concepts
    from svdiff.config import load_config

    typer.echo(draw_concepts(load_config(params), models / "card" / "concepts.webp", loop.scratch("concepts")))

"""`svdiff attention | strip`: pictures for looking closer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdiff.cli.arguments import PARAMS, PICTURES, Params, finite, read, wrote
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.evaluation.strips import Column

app = typer.Typer()
strip_app = typer.Typer(
    no_args_is_help=True, help="Strips of pictures under combined deltas: scale, interpolate, add, style."
)
app.add_typer(strip_app, name="strip")

Delta = Annotated[str, typer.Argument(help="name of a trained concept, pair or edit, or a delta file")]
Prompts = Annotated[list[str], typer.Option("--prompt", help="a row a prompt and seed")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", min=0, help="noise of a row (default 0)")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="the PNG to write")]


@app.command()
def attention(
    name: Annotated[str, typer.Argument(help="name of a trained concept or pair")],
    prompt: Annotated[str, typer.Option(help="{subject}, or {first} and {second}, stand for what NAME has learned")],
    word: Annotated[
        list[str] | None, typer.Option(help="words to show (default: NAME's tokens and class words)")
    ] = None,
    delta: Annotated[list[str] | None, typer.Option(help="a further row: an entry or delta file")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    layers: Annotated[
        str, typer.Option(help="regular expression searched in the names of cross-attention layers")
    ] = "",
    side: Annotated[
        list[int] | None, typer.Option(min=1, help="maps of these sides only, e.g. 8 (default: all)")
    ] = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """Draw what the words of a prompt attend to, before and after the training (Fig. 20, 24)."""
    config = read(params)
    entry = config.entry(name)
    [chosen, *others] = entry.prompts([prompt])
    if others:
        raise SvdiffError(f"prompt '{prompt}' is {1 + len(others)} prompts for {name}; name the subjects themselves")
    from svdiff.evaluation.attention_maps import draw_attention

    shown = [entry.concepts[concept] for concept in entry.shown(chosen)]
    words = word or [part for concept in shown for part in (concept.token, concept.class_word)]
    if not words:
        raise SvdiffError(
            f"prompt '{prompt}' names nothing that {name} has learned, so that no map would be drawn: write {{subject}} in it, "
            "or say with --word what to show"
        )
    deltas = {text: _find(text) for text in (name, *(delta or []))}
    path = output or PICTURES / f"attention-{name}.png"
    wrote(draw_attention(config, deltas, chosen, words, path, seed=seed, layers=layers, sides=side))


@strip_app.command()
def scale(
    delta: Delta,
    prompt: Prompts,
    at: Annotated[list[float] | None, typer.Option(help="strength s, a column each (default 0 0.5 1 1.5 2)")] = None,
    seed: Seeds = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """One delta at several strengths (Fig. 26)."""
    from svdiff.evaluation.strips import scaling

    strengths = [finite(strength) for strength in at or (0.0, 0.5, 1.0, 1.5, 2.0)]
    columns = scaling(_find(delta), strengths)
    _draw("scale", columns, [delta], prompt, seed, output, params)


@strip_app.command()
def interpolate(
    first: Delta,
    second: Delta,
    prompt: Prompts,
    points: Annotated[int, typer.Option(min=2, help="columns, the two ends included")] = 5,
    seed: Seeds = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """From SECOND to FIRST by Eq. 5 (Fig. 11)."""
    from svdiff.evaluation.strips import interpolation

    columns = interpolation(_find(first), _find(second), points)
    _draw("interpolate", columns, [first, second], prompt, seed, output, params)


@strip_app.command()
def add(
    deltas: Annotated[
        list[str], typer.Argument(help="names or delta files, each with its weight after a colon: cat:0.7")
    ],
    prompt: Prompts,
    seed: Seeds = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """Each delta alone, and all added up by Eq. 4 (Fig. 8, 16)."""
    from svdiff.evaluation.strips import addition
    from svdiff.sampling.stage import find_delta

    _draw("add", addition([find_delta(text) for text in deltas], deltas), deltas, prompt, seed, output, params)


@strip_app.command()
def style(
    geometry: Delta,
    appearance: Delta,
    prompt: Prompts,
    layers: Annotated[
        str | None,
        typer.Option(
            help="regular expression of weight names that carry geometry (default: the deepest layers, as in Fig. 10)"
        ),
    ] = None,
    seed: Seeds = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """Geometry from one delta, appearance from another, by layers (Fig. 10)."""
    from svdiff.evaluation.strips import style_mixing

    columns = style_mixing(_find(geometry), _find(appearance), layers)
    _draw("style", columns, [geometry, appearance], prompt, seed, output, params)


def _find(delta: str) -> Path:
    from svdiff.sampling.stage import find_delta

    path, weight = find_delta(delta)
    if weight != 1:
        raise SvdiffError(f"'{delta}': a weight has no effect here; give {delta.rpartition(':')[0]}")
    return path


def _stem(name: str) -> str:
    """What a delta is called in a file's name: its entry, or the folder or stem of its file."""
    path = Path(name)
    if path.suffix != ".safetensors":
        return name
    return path.parent.name if path.name == "delta.safetensors" and path.parent.name else path.stem


def _draw(
    kind: str,
    columns: list[Column],
    deltas: list[str],
    prompts: list[str],
    seeds: list[int] | None,
    output: Path | None,
    params: Path,
) -> None:
    """Draw a strip; {subject} in a prompt becomes that of the first delta, if it is an entry."""
    from svdiff.evaluation.strips import draw_strip

    config = read(params)
    names = [text.partition(":")[0] for text in deltas]
    if any("{" in prompt for prompt in prompts):
        prompts = config.entry(names[0]).prompts(prompts)
    stems = [_stem(name) for name in names]
    path = output or PICTURES / f"{kind}-{'-'.join(stems)}.png"
    wrote(draw_strip(config, columns, prompts, seeds or [0], path))

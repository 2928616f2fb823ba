"""`svdiff attention | strip | compare-pairs`: pictures and tables for looking closer, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config
    from svdiff.evaluation.strips import Column

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
strip_app = typer.Typer(
    no_args_is_help=True, help="Strips of pictures under combined deltas: scale, interpolate, add, style."
)
app.add_typer(strip_app, name="strip")

Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
PARAMS = Path("params.yaml")
Delta = Annotated[str, typer.Argument(help="name of a trained concept, pair or edit, or a delta file")]
Prompts = Annotated[list[str], typer.Option("--prompt", help="a row a prompt and seed")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="noise of a row (default 0)")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="the PNG to write")]


@app.command()
def attention(
    name: Annotated[str, typer.Argument(help="name of a trained concept or pair")],
    prompt: Annotated[str, typer.Option(help="{subject}, or {first} and {second}, stand for what NAME has learned")],
    word: Annotated[
        list[str] | None, typer.Option(help="words to show (default: NAME's tokens and class words)")
    ] = None,
    delta: Annotated[list[str] | None, typer.Option(help="a further row: an entry or delta file")] = None,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
    layers: Annotated[
        str, typer.Option(help="regular expression searched in the names of cross-attention layers")
    ] = "",
    side: Annotated[list[int] | None, typer.Option(help="maps of these sides only, e.g. 8 (default: all)")] = None,
    output: Output = None,
    params: Params = PARAMS,
) -> None:
    """Draw what the words of a prompt attend to, before and after the training (Fig. 20, 24)."""
    from svdiff.config import load_config

    config = load_config(params)
    entry = config.entry(name)
    [chosen, *others] = entry.prompts([prompt])
    if others:
        raise SvdiffError(f"prompt '{prompt}' is {1 + len(others)} prompts for {name}; name the subjects themselves")
    from svdiff.evaluation.attention_maps import draw_attention
    from svdiff.sampling.stage import find_delta

    shown = [entry.concepts[concept] for concept in entry.shown(chosen)]
    words = word or [part for concept in shown for part in (concept.token, concept.class_word)]
    deltas = {text: find_delta(text)[0] for text in (name, *(delta or []))}
    path = output or Path("pictures") / f"attention-{name}.png"
    _report(draw_attention(config, deltas, chosen, words, path, seed=seed, layers=layers, sides=side))


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

    columns = scaling(_find(delta), at or [0.0, 0.5, 1.0, 1.5, 2.0])
    _draw("scale", columns, [delta], prompt, seed, output, params)


@strip_app.command()
def interpolate(
    first: Delta,
    second: Delta,
    prompt: Prompts,
    points: Annotated[int, typer.Option(help="columns, the two ends included")] = 5,
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


@app.command("compare-pairs")
def compare_pairs(
    pair: Annotated[list[str] | None, typer.Argument(help="names under `pairs:` (default: all)")] = None,
    method: Annotated[list[str] | None, typer.Option(help="of training (default: svdiff and full)")] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="without, cut-mix-unmix, unmix; the first is what others are compared with")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each way")] = 3,
    pictures: Annotated[int, typer.Option(min=1, help="pictures of each training")] = 40,
    prompt: Annotated[str, typer.Option(help="with {first} and {second}")] = "a {first} sitting beside a {second}",
    unmix_weight: Annotated[float, typer.Option(help="of the way `unmix`")] = 1.0,
    steps: Annotated[int | None, typer.Option(help="training steps (default: the pair's)")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="folder")] = Path("out/compare-pairs"),
    params: Params = PARAMS,
) -> None:
    """How well identities are kept apart, with and without Cut-Mix-Unmix (Fig. 6). Resumes: what is finished is kept."""
    from svdiff.config import load_config

    config = load_config(params)
    from svdiff.evaluation import comparison

    overrides: dict[str, Any] = {} if steps is None else {"steps": steps}
    path = comparison.compare_pairs(
        config,
        pair or [],
        methods=method or comparison.METHODS,
        ways=way or comparison.WAYS,
        seeds=seeds,
        pictures=pictures,
        prompt=prompt,
        unmix_weight=unmix_weight,
        overrides=overrides,
        output=output,
    )
    typer.echo((path / "table.md").read_text())
    _report(path)


def _find(delta: str) -> Path:
    from svdiff.sampling.stage import find_delta

    return find_delta(delta)[0]


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
    from svdiff.config import load_config
    from svdiff.evaluation.strips import draw_strip

    config: Config = load_config(params)
    names = [text.partition(":")[0] for text in deltas]
    if any("{" in prompt for prompt in prompts):
        prompts = config.entry(names[0]).prompts(prompts)
    stems = [Path(name).parent.name if name.endswith(".safetensors") else name for name in names]
    path = output or Path("pictures") / f"{kind}-{'-'.join(stems)}.png"
    _report(draw_strip(config, columns, prompts, seeds or [0], path))


def _report(path: Path) -> None:
    typer.echo(f"wrote {path}")

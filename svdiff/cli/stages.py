"""`svdiff prior | mix | train | sample | score | correlate | rank | report`: what dvc.yaml calls, and what a person calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdiff.cli.arguments import PARAMS, Params, read, wrote
from svdiff.errors import SvdiffError

app = typer.Typer()
Concept = Annotated[str, typer.Option("--concept", "-c", help="name under `concepts:` in params.yaml")]
NameOrNone = Annotated[
    str | None, typer.Argument(help="name of a concept, pair or edit in params.yaml", show_default=False)
]
NamedConcept = Annotated[str | None, typer.Option("--concept", "-c", help="the same as NAME")]
Pair = Annotated[str, typer.Argument(help="name under `pairs:` in params.yaml")]


def _name(name: str | None, concept: str | None) -> str:
    """The one name that was given. Raises SvdiffError for none or two."""
    if (name is None) == (concept is None):
        raise SvdiffError("give one name of a concept, pair or edit in params.yaml, such as `svdiff train teapot`")
    return str(name or concept)


@app.command()
def prior(
    class_word: Annotated[str, typer.Option("--class", help="one of `classes:` in params.yaml")],
    params: Params = PARAMS,
) -> None:
    """Stage: prior images of a class word, from the base."""
    from svdiff.sampling.prior import make_prior_images

    wrote(make_prior_images(read(params), class_word))


@app.command()
def mix(pair: Pair, params: Params = PARAMS) -> None:
    """Stage: the Cut-Mix-Unmix dataset of a pair (Sec. 3.3), and a contact sheet of it."""
    config = read(params)
    from svdiff.data.mixes import make_mixes

    wrote(make_mixes(config, pair))


@app.command()
def train(name: NameOrNone = None, concept: NamedConcept = None, params: Params = PARAMS) -> None:
    """Stage: train a concept or a pair; resumes by itself."""
    config, name = read(params), _name(name, concept)
    config.entry(name)
    from svdiff.training import train as run

    wrote(run(config, name))


@app.command()
def sample(
    name: NameOrNone = None,
    concept: NamedConcept = None,
    delta: Annotated[
        list[str] | None,
        typer.Option(
            help="instead of NAME: an entry or delta file and its weight, teapot:0.7; several add up (Eq. 4, 5)"
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="a picture now: {subject}, or {first} and {second}, stand for what NAME has learned"),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="with --prompt: one picture a prompt and seed (default 0)")
    ] = None,
    scale: Annotated[float, typer.Option(help="with --prompt: strength s of NAME's shifts (Fig. 26)")] = 1.0,
    guidance: Annotated[float | None, typer.Option(help="with --prompt: scale s of Eq. 9")] = None,
    steps: Annotated[int | None, typer.Option(help="with --prompt: DDIM steps")] = None,
    eta: Annotated[float | None, typer.Option(help="with --prompt: η of DDIM, 0 to 1; 0 is deterministic")] = None,
    negative: Annotated[
        list[str] | None, typer.Option(help="with --prompt: c^neg of Eq. 10 (default: NAME's prior prompts)")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="with --prompt: β of Eq. 10; 1 is plain guidance, below it negatives count")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="with --prompt: folder for the pictures")] = Path(
        "pictures"
    ),
    params: Params = PARAMS,
) -> None:
    """Stage: the evaluation pictures of a concept or a pair. With --prompt: pictures of your own."""
    config = read(params)
    if delta and not prompt:
        raise SvdiffError("--delta without --prompt: say what to draw, as in --prompt 'a sks dog'")
    if not delta:
        name = _name(name, concept)
        entry = config.entry(name)
    elif name or concept:
        raise SvdiffError(f"give either NAME or --delta; NAME adds up as well, as --delta {name or concept}:1")
    given = {"guidance": guidance, "steps": steps, "eta": eta, "beta": beta, "negatives": negative}
    settings = config.sample.replaced({key: value for key, value in given.items() if value is not None})
    if negative and settings.beta == 1:
        raise SvdiffError("--negative needs --beta below 1: how much of the empty prompt is left in Eq. 10, e.g. 0.5")
    from svdiff.sampling.stage import default_negatives, delta_path, find_delta, sample_entry, sample_prompts

    if not prompt:
        wrote(sample_entry(config, str(name)))
        return
    negatives: list[str] = []
    if delta:
        deltas = [find_delta(text) for text in delta]
    else:
        deltas = [(delta_path(str(name)), scale)]
        prompt, negatives = entry.prompts(prompt), default_negatives(config, entry)
    for path in sample_prompts(
        config, deltas, prompt, seed or [0], output=output, settings=settings, negatives=negatives
    ):
        wrote(path)


@app.command()
def score(name: NameOrNone = None, concept: NamedConcept = None, params: Params = PARAMS) -> None:
    """Stage: identity, text and image alignment (Fig. 9b) and drift of the class word, beside the untrained base."""
    config, name = read(params), _name(name, concept)
    from svdiff.evaluation.score import score as run

    wrote(run(config, name))


@app.command()
def correlate(
    second_run: Annotated[
        str | None, typer.Option(help="train this concept a second time instead: the diagonal of Fig. 9a")
    ] = None,
    params: Params = PARAMS,
) -> None:
    """Stage: correlation of all concepts' shifts (Fig. 9a, 15)."""
    from svdiff.evaluation.correlation import correlate as run
    from svdiff.evaluation.correlation import train_second_run

    config = read(params)
    wrote(run(config) if second_run is None else train_second_run(config, second_run))


@app.command()
def rank(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: alignment against the rank trained with (Fig. 25)."""
    from svdiff.experiments.rank import rank as run

    wrote(run(read(params), concept))


@app.command()
def report(params: Params = PARAMS) -> None:
    """Stage: one page to look at."""
    from svdiff.report.page import report as run

    wrote(run(read(params)))

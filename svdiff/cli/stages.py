"""`svdiff prior | mix | train | sample | score | correlate | rank | report`: what dvc.yaml calls, and what a person calls."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from svdiff.cli.arguments import (
    PARAMS,
    PICTURES,
    ClassWord,
    Concept,
    Entry,
    Names,
    Pair,
    Params,
    finite,
    named,
    read,
    refuse,
    wrote,
)
from svdiff.errors import SvdiffError
from svdiff.words import fill

app = typer.Typer()


@app.command()
def prior(name: ClassWord, params: Params = PARAMS) -> None:
    """Stage: prior images of a class word, from the base or from your own pictures."""
    from svdiff.sampling.prior import make_prior_images

    wrote(make_prior_images(read(params), name))


@app.command()
def mix(name: Pair, params: Params = PARAMS) -> None:
    """Stage: the Cut-Mix-Unmix dataset of a pair (Sec. 3.3), and a contact sheet of it."""
    config = read(params)
    config.pair_of(name)
    from svdiff.data.mixes import make_mixes

    wrote(make_mixes(config, name))


@app.command()
def train(names: Names, params: Params = PARAMS) -> None:
    """Stage: train a concept, a pair or an edit, or several as one batch; resumes by itself."""
    config = read(params)
    for name in names:
        config.entry(name)
    from svdiff.training import train_together

    for path in train_together(config, names):
        wrote(path)


@app.command()
def sample(
    context: typer.Context,
    name: Annotated[str | None, named("concepts pairs edits", "a concept, pair or edit of params.yaml")] = None,
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
        list[int] | None, typer.Option(min=0, help="with --prompt: one picture a prompt and seed (default 0)")
    ] = None,
    scale: Annotated[
        float, typer.Option(callback=finite, help="with --prompt: strength s of NAME's shifts (Fig. 26)")
    ] = 1.0,
    guidance: Annotated[float | None, typer.Option(help="with --prompt: scale s of Eq. 9")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="with --prompt: DDIM steps")] = None,
    eta: Annotated[float | None, typer.Option(help="with --prompt: η of DDIM, 0 to 1; 0 is deterministic")] = None,
    negative: Annotated[
        list[str] | None, typer.Option(help="with --prompt: c^neg of Eq. 10 (default: NAME's prior prompts)")
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="with --prompt: β of Eq. 10; 1 is plain guidance, below it negatives count")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="with --prompt: folder for the pictures")] = PICTURES,
    params: Params = PARAMS,
) -> None:
    """Stage: the evaluation pictures of a concept or a pair. With --prompt: pictures of your own."""
    config = read(params)
    if not prompt:
        refuse(context, "delta seed scale guidance steps eta negative beta output", "has no effect without --prompt")
    if not delta:
        entry = config.entry(_given(name))
    elif name:
        raise SvdiffError(f"give either NAME or --delta; NAME adds up as well, as --delta {name}:1")
    else:
        refuse(context, "scale", "is of NAME alone; a weight of --delta stands after a colon, as in teapot:0.7")
        for text in prompt or []:
            fill(text)
    given = {"guidance": guidance, "steps": steps, "eta": eta, "beta": beta, "negatives": negative}
    settings = config.sample.replaced({key: value for key, value in given.items() if value is not None})
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
def score(name: Entry, params: Params = PARAMS) -> None:
    """Stage: identity, text and image alignment (Fig. 9b) and drift of the class word, beside the untrained base."""
    config = read(params)
    config.entry(name)
    from svdiff.evaluation.score import score as run

    wrote(run(config, name))


@app.command()
def correlate(params: Params = PARAMS) -> None:
    """Stage: correlation of all concepts' shifts (Fig. 9a, 15)."""
    from svdiff.evaluation.correlation import correlate as run

    wrote(run(read(params)))


@app.command("second-run")
def second_run(name: Concept, params: Params = PARAMS) -> None:
    """Stage: train a concept a second time, for the diagonal of Fig. 9a."""
    config = read(params)
    config.concept(name)
    from svdiff.evaluation.correlation import train_second_run

    wrote(train_second_run(config, name))


@app.command()
def rank(name: Concept, params: Params = PARAMS) -> None:
    """Stage: alignment against the rank trained with (Fig. 25)."""
    config = read(params)
    config.concept(name)
    from svdiff.experiments.rank import rank as run

    wrote(run(config, name))


@app.command()
def report(params: Params = PARAMS) -> None:
    """Stage: one page to look at."""
    from svdiff.report.page import report as run

    wrote(run(read(params)))


def _given(name: str | None) -> str:
    if name is None:
        raise SvdiffError("NAME is missing: a concept or pair of params.yaml, or --delta with what stands for it")
    return name

"""`svdiff <stage> …`: what dvc.yaml calls, and what a person calls.

Nothing heavy is imported until a command needs it, so `svdiff --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config

# Groups and commands that other modules bring, imported when one of them is named.
ELSEWHERE = {
    "edit": ("svdiff.editing.cli", "Edit a picture: train on it, then sample other prompts (Sec. 3.4)."),
    "edit-curves": ("svdiff.editing.cli", "Edit score against reconstruction, for methods and lengths of training."),
    "base": ("svdiff.base.cli", "The embedded base: its picture world, its training, its card."),
    "attention": ("svdiff.evaluation.cli", "What the words of a prompt attend to, before and after (Fig. 20, 24)."),
    "strip": ("svdiff.evaluation.cli", "Strips of pictures under combined deltas: scale, interpolate, add, style."),
    "compare-pairs": ("svdiff.evaluation.cli", "How well identities are kept apart, with and without Cut-Mix-Unmix."),
    "subsets": ("svdiff.spectral.cli", "Table 1 for any base: tensors, shifts and bytes of each subset."),
    "delta": ("svdiff.spectral.cli", "Show, combine and compare delta files."),
    "export": ("svdiff.spectral.cli", "A delta as plain diffusers weights, or as LoRA for every other tool."),
    "cache": ("svdiff.spectral.cli", "Show and prune cached decompositions."),
}


class LazyGroup(TyperGroup):
    """Lists every command, and imports those of other modules only when one is named."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module, summary = ELSEWHERE[cmd_name]
        if cmd_name not in sys.argv:  # `svdiff --help` wants a line of each
            return TyperCommand(cmd_name, help=summary)
        command: Any = typer.main.get_command(import_module(module).app)
        return getattr(command, "commands", {}).get(cmd_name, command)


app = typer.Typer(
    no_args_is_help=True, add_completion=False, cls=LazyGroup, pretty_exceptions_enable=False, help=__doc__
)
Concept = Annotated[str, typer.Option("--concept", "-c", help="name under `concepts:` in params.yaml")]
Name = Annotated[str | None, typer.Argument(help="name of a concept, pair or edit in params.yaml", show_default=False)]
NamedConcept = Annotated[str | None, typer.Option("--concept", "-c", help="the same as NAME")]
Pair = Annotated[str, typer.Argument(help="name under `pairs:` in params.yaml")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
PARAMS = Path("params.yaml")


def _config(path: Path) -> Config:
    from svdiff.config import load_config

    return load_config(path)


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
    from svdiff.data.prior import make_prior_images

    _report(make_prior_images(_config(params), class_word))


@app.command()
def mix(pair: Pair, params: Params = PARAMS) -> None:
    """Stage: the Cut-Mix-Unmix dataset of a pair (Sec. 3.3), and a contact sheet of it."""
    config = _config(params)
    from svdiff.data.mixes import make_mixes

    _report(make_mixes(config, pair))


@app.command()
def train(name: Name = None, concept: NamedConcept = None, params: Params = PARAMS) -> None:
    """Stage: train a concept or a pair; resumes by itself."""
    config, name = _config(params), _name(name, concept)
    config.entry(name)
    from svdiff.training import train as run

    _report(run(config, name))


@app.command()
def sample(
    name: Name = None,
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
    config = _config(params)
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
        _report(sample_entry(config, str(name)))
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
        _report(path)


@app.command()
def score(name: Name = None, concept: NamedConcept = None, params: Params = PARAMS) -> None:
    """Stage: text and image alignment (Fig. 9b), beside the untrained base; for a pair also how well it is kept apart."""
    config, name = _config(params), _name(name, concept)
    if config.entry(name).kind == "pair":
        from svdiff.evaluation.pairs import score_pair

        _report(score_pair(config, name))
        return
    from svdiff.evaluation.score import score as run

    _report(run(config, name))


@app.command()
def correlate(params: Params = PARAMS) -> None:
    """Stage: correlation of all concepts' shifts (Fig. 9a, 15)."""
    from svdiff.evaluation.correlation import correlate as run

    _report(run(_config(params)))


@app.command()
def rank(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: alignment against the rank trained with (Fig. 25)."""
    from svdiff.evaluation.rank import rank as run

    _report(run(_config(params), concept))


@app.command()
def report(params: Params = PARAMS) -> None:
    """Stage: one page to look at."""
    from svdiff.evaluation.report import report as run

    _report(run(_config(params)))


@app.command("config")
def show_config(params: Params = PARAMS) -> None:
    """Describe every key of params.yaml, with the values in force."""
    from svdiff.config import describe

    for line in describe(_config(params)):
        typer.echo(line)


@app.command()
def plan(params: Params = PARAMS) -> None:
    """What `dvc repro` would run, and about how long it takes on this machine."""
    from svdiff.plan import plan as run

    for line in run(_config(params)):
        typer.echo(line)


@app.command()
def doctor(params: Params = PARAMS) -> None:
    """What this machine or checkout lacks; exit status 1 if anything does."""
    from svdiff.doctor import examine

    findings = examine(params)
    for finding in findings:
        typer.echo(
            f"{'ok  ' if finding.ok else 'MISS'} {finding.what}" + ("" if finding.ok else f"\n     fix: {finding.fix}")
        )
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _report(path: Path) -> None:
    typer.echo(f"wrote {path}")


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        app()
    except SvdiffError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()

"""`svdiff <stage> …`: what dvc.yaml calls, and what a person calls.

Nothing heavy is imported until a command needs it, so `svdiff --help` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from svdiff.config import Config

# Command groups whose modules are loaded when one of their commands is named.
GROUPS = {
    "base": ("svdiff.base.cli", "The embedded base: its picture world, its training, its card."),
    "delta": ("svdiff.spectral.cli", "Show, combine and compare delta files."),
    "cache": ("svdiff.spectral.cli", "Show and prune cached decompositions."),
}
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Concept = Annotated[str, typer.Option("--concept", "-c", help="name under `concepts:` in params.yaml")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
PARAMS = Path("params.yaml")


def _config(path: Path) -> Config:
    from svdiff.config import load_config

    return load_config(path)


@app.command()
def prior(
    class_word: Annotated[str, typer.Option("--class", help="one of `classes:` in params.yaml")], params: Params = PARAMS
) -> None:
    """Stage: prior images of a class word, from the base."""
    from svdiff.data.prior import make_prior_images

    _report(make_prior_images(_config(params), class_word))


@app.command()
def train(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: train a concept; resumes by itself."""
    config = _config(params)
    config.concept(concept)
    from svdiff.training import train as run

    _report(run(config, concept))


@app.command()
def sample(
    concept: Concept,
    prompt: Annotated[list[str] | None, typer.Option(help="a picture now: '{subject}' or the token stands for the concept")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="with --prompt: one picture a prompt and seed (default 0)")] = None,
    scale: Annotated[float, typer.Option(help="with --prompt: strength s of the shifts (Fig. 26)")] = 1.0,
    guidance: Annotated[float | None, typer.Option(help="with --prompt: scale s of Eq. 9")] = None,
    steps: Annotated[int | None, typer.Option(help="with --prompt: DDIM steps")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="with --prompt: folder for the pictures")] = Path("pictures"),
    params: Params = PARAMS,
) -> None:
    """Stage: the evaluation pictures of a concept. With --prompt: pictures of your own."""
    config = _config(params)
    config.concept(concept)
    from svdiff.sampling.stage import sample_concept, sample_prompts

    if not prompt:
        _report(sample_concept(config, concept))
        return
    for path in sample_prompts(
        config, concept, prompt, seed or [0], output=output, scale=scale, guidance=guidance, steps=steps
    ):
        _report(path)


@app.command()
def score(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: text and image alignment (Fig. 9b), beside the untrained base."""
    from svdiff.evaluation.score import score as run

    _report(run(_config(params), concept))


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
        typer.echo(f"{'ok  ' if finding.ok else 'MISS'} {finding.what}" + ("" if finding.ok else f"\n     fix: {finding.fix}"))
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def _report(path: Path) -> None:
    typer.echo(f"wrote {path}")


class _Lazy(TyperGroup):
    """A click group that imports a group's module only when asked for it."""


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        _mount_named_group(sys.argv[1] if len(sys.argv) > 1 else "")
        app()
    except SvdiffError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)


def _mount_named_group(name: str) -> None:
    for group, (module, summary) in GROUPS.items():
        if name == group:
            app.add_typer(import_module(module).app, name=group)
        else:
            app.add_typer(typer.Typer(help=summary), name=group)


if __name__ == "__main__":
    main()

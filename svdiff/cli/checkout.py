"""`svdiff config | check | plan | doctor`: what is set, what is to be done, what is missing."""

from __future__ import annotations

import typer

from svdiff.cli.arguments import PARAMS, Params, read, wrote
from svdiff.secrets import redacted

app = typer.Typer()


@app.command("config")
def show(params: Params = PARAMS) -> None:
    """Describe every key of params.yaml, with the values in force."""
    from svdiff.base.config import load_base_training
    from svdiff.check import check_written
    from svdiff.config import describe

    config, base_training = read(params), load_base_training(params)
    check_written(config, params)
    lines = describe(config.model_copy(update={"base_training": base_training}))
    for line in lines:
        typer.echo(redacted(line))


@app.command()
def check(params: Params = PARAMS) -> None:
    """Stage: refuse a params.yaml that the pipeline cannot work with, before anything runs."""
    from svdiff.check import check as run
    from svdiff.check import check_written

    config = read(params)
    check_written(config, params)
    wrote(run(config))


@app.command()
def plan(params: Params = PARAMS) -> None:
    """What `dvc repro` would run, and about how long it takes on this machine."""
    from svdiff.plan import plan as run

    for line in run(read(params)):
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

"""The command `reevaluate`: samples and scores registered champions again, without Prefect."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.registry.commands import PARAMS, Params, connected
from svdiff.secrets import redacted

app = typer.Typer()


@app.command()
def reevaluate(
    concept: Annotated[list[str] | None, typer.Option("--concept", "-c", help="default: all champions in use")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="only say what would be measured, and why")] = False,
    force: Annotated[bool, typer.Option("--force", help="measure again what is fresh")] = False,
    accept: Annotated[bool, typer.Option("--accept", help="take today's scores as the baseline")] = False,
    params: Params = PARAMS,
) -> None:
    """Sample and score champions again: unchanged, evaluator or prompts changed, drift or broken artifact.

    Exit status 1 if any drifted, broke or could not be measured. The rule is under `reevaluate:` in params.yaml.
    """
    from flows.monitoring.round import Round

    config, tracking = connected(params)
    round_ = Round(tracking, config, params.resolve().parent, force=force, accept=accept)
    planned = round_.plan(concept or None)
    if not planned:
        typer.echo(
            "no concept has a champion, so there is nothing to re-evaluate; `svdiff registry list` shows them all"
        )
    if plan:
        for p in planned:
            typer.echo(f"{p.concept} version {p.version}: {'measure' if p.due else 'skip'} ({p.why})")
        return
    wrong = []
    for p in planned:
        try:
            result = round_.reevaluate(p.concept)
        except Exception as error:  # one that fails does not stop the others
            typer.secho(f"{p.concept} version {p.version}: failed: {redacted(str(error))}", err=True, fg="red")
            wrong.append(p.concept)
            continue
        typer.echo(result.line())
        if result.verdict.alarming:
            wrong.append(p.concept)
    round_.scorer.peaks.say()
    if wrong:
        typer.secho(f"{len(wrong)} of {len(planned)} need attention: {', '.join(wrong)}", err=True, fg="red")
        raise typer.Exit(1)

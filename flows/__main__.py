"""`python -m flows …`: registry and deployments from the command line. Thin: the work is in the modules beside it."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.registry import commands
from flows.registry.commands import PARAMS, Params, connected
from svdiff.errors import SvdiffError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Concept = Annotated[str, typer.Option("--concept", "-c", help="name under `concepts:` in params.yaml")]
app.add_typer(commands.app)


@app.command()
def init(params: Params = PARAMS) -> None:
    """Make the MLflow database and experiment, if they are not there."""
    _, tracking = connected(params)
    typer.echo(f"MLflow: {tracking.uri}, experiment '{tracking.experiment}' ({tracking.experiment_id})")


@app.command()
def register(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: log a concept's training to MLflow and register its delta; writes out/register/<concept>.json."""
    from flows.pipeline.results import read_results
    from svdiff.config import load_config
    from svdiff.files import write_atomic

    root = params.resolve().parent
    # Before MLflow is imported: a missing file or an unknown concept is told at once.
    results = read_results(load_config(params), concept, root)
    from flows.registry.register import register as run

    config, tracking = connected(params)
    done = run(tracking, config, results)
    record = {"concept": concept, "version": done.version, "run_id": done.run_id}
    record |= {"run_url": tracking.run_url(done.run_id)}
    record |= {"delta_sha256": done.delta_sha256, "base_hash": done.base_hash}
    record |= {"role": done.role, "reason": done.verdict.reason}
    write_atomic(root / "out" / "register" / f"{concept}.json", json.dumps(record, indent=2) + "\n")
    typer.echo(
        f"{concept}: version {done.version} {'registered' if done.new else 'was registered already'}, "
        f"{record['role']} ({record['reason']})\nmodels:/{concept}/{done.version}, run {record['run_url']}"
    )


@app.command()
def up(
    workers: Annotated[int, typer.Option(min=0, help="flow runs that the worker here takes at once; 0: none")] = 4,
    gpus: Annotated[int | None, typer.Option(min=1, help="stages at once, on all workers, that need a GPU")] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="start the MLflow UI as well")] = False,
) -> None:
    """Set up what is missing: Prefect server, work pool, automations, deployments, worker. `down` stops it."""
    from flows.services.control import up as run

    for line in run(Path.cwd(), worker_limit=workers, gpus=gpus, mlflow_ui=mlflow):
        typer.echo(line)


@app.command()
def worker(limit: Annotated[int, typer.Option(help="flow runs that it takes at once")] = 2) -> None:
    """Work for a team's server in this clone: stages are shared with other clones through the DVC remote."""
    from flows.services.control import worker as run

    for line in run(Path.cwd(), limit):
        typer.echo(line)


@app.command()
def down(
    remove: Annotated[bool, typer.Option("--remove", help="also take deployments, automations and pool away")] = False,
) -> None:
    """Stop what `up` started here; the history stays, and runs in work go on when a worker is up again."""
    from flows.services.control import down as run

    for line in run(Path.cwd(), remove):
        typer.echo(line)


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    # MLflow brings hundreds of thousands of objects that stay to the end: looking through them for garbage, while they
    # come and once more at the exit, took a fifth of the time of a listing.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    try:
        app()
    except SvdiffError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()

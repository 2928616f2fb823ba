"""Commands `up`, `worker` and `down`: the processes that the workflow runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


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
def worker(limit: Annotated[int, typer.Option(min=1, help="flow runs that it takes at once")] = 2) -> None:
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

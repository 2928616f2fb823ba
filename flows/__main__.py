"""`python -m flows …`: registry and deployments from the command line. Thin: the work is in the modules beside it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from flows.tracking import Tracking
    from svdiff.config import Config

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Concept = Annotated[str, typer.Option("--concept", "-c", help="name under `concepts:` in params.yaml")]
Name = Annotated[str, typer.Argument(help="registered concept")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="why; stays with the version")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
PARAMS = Path("params.yaml")


def _connected(params: Path) -> tuple[Config, Tracking]:
    from flows.tracking import connect
    from svdiff.config import load_config

    config = load_config(params)
    return config, connect(config.tracking, params.resolve().parent)


@app.command()
def init(params: Params = PARAMS) -> None:
    """Make the MLflow database and experiment, if they are not there."""
    _, tracking = _connected(params)
    typer.echo(f"MLflow: {tracking.uri}, experiment '{tracking.experiment}' ({tracking.experiment_id})")


@app.command()
def register(concept: Concept, params: Params = PARAMS) -> None:
    """Stage: log a concept's training to MLflow and register its delta; writes out/register/<concept>.json."""
    from flows.results import read_results
    from svdiff.config import load_config
    from svdiff.files import write_atomic

    root = params.resolve().parent
    # Before MLflow is imported: a missing file or an unknown concept is told at once.
    results = read_results(load_config(params), concept, root)
    from flows.registry import register as run

    config, tracking = _connected(params)
    done = run(tracking, config, results)
    record = {"concept": concept, "version": done.version, "run_id": done.run_id}
    record |= {"run_url": tracking.run_url(done.run_id)}
    record |= {"delta_sha256": done.delta_sha256, "base_hash": done.base_hash}
    record |= {"role": "champion" if done.verdict.promoted else "challenger", "reason": done.verdict.reason}
    write_atomic(root / "out" / "register" / f"{concept}.json", json.dumps(record, indent=2) + "\n")
    typer.echo(
        f"{concept}: version {done.version} {'registered' if done.new else 'was registered already'}, "
        f"{record['role']} ({record['reason']})\nmodels:/{concept}/{done.version}, run {record['run_url']}"
    )


@app.command()
def promote(
    concept: Name,
    reason: Reason,
    version: Annotated[int | None, typer.Option(help="default: the challenger")] = None,
    params: Params = PARAMS,
) -> None:
    """Make a version the champion, whatever the rule said."""
    from flows.promotion import promote_by_hand

    number = promote_by_hand(_connected(params)[1], concept, version, reason)
    typer.echo(f"{concept}: champion is version {number} now")


@app.command()
def rollback(concept: Name, reason: Reason, params: Params = PARAMS) -> None:
    """Put the previous champion back; the present one is not promoted again by itself."""
    from flows.promotion import rollback as run

    was, now = run(_connected(params)[1], concept, reason)
    typer.echo(f"{concept}: champion was version {was}, is version {now} now")


@app.command("list")
def list_registered(
    params: Params = PARAMS, as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False
) -> None:
    """Registered concepts: champion, challenger, scores, and why the champion is one."""
    from flows.registry import list_concepts

    entries = list_concepts(_connected(params)[1])
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    row = "{:<24} {:>8} {:>10} {:>7} {:>7}  {}".format
    typer.echo(row("concept", "champion", "challenger", "image", "text", "reason"))
    for e in entries:
        scores = ["-" if value is None else f"{value:.4f}" for value in (e.image_alignment, e.text_alignment)]
        typer.echo(row(e.concept, e.champion or "-", e.challenger or "-", *scores, e.reason))


@app.command()
def up(
    workers: Annotated[int, typer.Option(help="flow runs that the worker takes at once")] = 4,
    mlflow: Annotated[bool, typer.Option("--mlflow/--no-mlflow", help="start the MLflow UI as well")] = False,
) -> None:
    """Start what is not running: Prefect server, work pool, deployments, worker. `down` stops it."""
    from flows.services import up as run

    for line in run(Path.cwd(), worker_limit=workers, mlflow_ui=mlflow):
        typer.echo(line)


@app.command()
def down() -> None:
    """Stop what `up` started here; the history stays."""
    from flows.services import down as run

    for line in run(Path.cwd()):
        typer.echo(line)


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    try:
        app()
    except SvdiffError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()

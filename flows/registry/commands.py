"""Commands on registered concepts: list, lineage, promote, rollback, retire, reproduce, register, disk usage and pruning.

Everything that is slow to import (MLflow, DVC) is imported by the command that needs it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdiff.cli.arguments import Entry

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from flows.registry.tracking import Tracking
    from svdiff.config import Config

app = typer.Typer(no_args_is_help=True, help="Registered concepts: what there is, where it comes from, what is in use.")
Name = Annotated[str, typer.Argument(help="registered concept")]
Which = Annotated[str, typer.Argument(help="CONCEPT (its champion), CONCEPT@VERSION or CONCEPT@ALIAS")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="why; stays with the version")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]
PARAMS = Path("params.yaml")
LAST = 2**31 - 1  # versions are whole numbers of a database


def connected(params: Path) -> tuple[Config, Tracking]:
    """params.yaml, and the MLflow store that it names."""
    from flows.registry.tracking import connect
    from svdiff.config import load_config

    config = load_config(params)
    return config, connect(config.tracking, params.resolve().parent)


@app.command()
def init(params: Params = PARAMS) -> None:
    """Make the MLflow database and experiment, if they are not there."""
    from svdiff.secrets import redacted

    _, tracking = connected(params)
    typer.echo(f"MLflow: {redacted(tracking.uri)}, experiment '{tracking.experiment}' ({tracking.experiment_id})")


@app.command()
def register(
    name: Entry,
    params: Params = PARAMS,
) -> None:
    """Stage: log a concept's training to MLflow and register its delta; writes out/register/<name>.json and its model card."""
    from flows.pipeline.results import read_results
    from svdiff.config import load_config
    from svdiff.files import write_atomic

    root = params.resolve().parent
    # Before MLflow is imported: a missing file or an unknown concept is told at once.
    results = read_results(load_config(params), name, root)
    from flows.registry.register import register as run
    from flows.registry.summary import card

    config, tracking = connected(params)
    done = run(tracking, config, results)
    record = {
        "concept": name,
        "version": done.version,
        "run_id": done.run_id,
        "run_url": tracking.run_url(done.run_id),
        "delta_sha256": done.delta_sha256,
        "base_hash": done.base_hash,
        "role": done.role,
        "reason": done.decision.reason,
    }
    write_atomic(root / "out" / "register" / f"{name}.md", card(config, results))
    write_atomic(root / "out" / "register" / f"{name}.json", json.dumps(record, indent=2) + "\n")
    typer.echo(
        f"{name}: version {done.version} {'registered' if done.new else 'was registered already'}, "
        f"{done.role} ({done.decision.reason})\nmodels:/{name}/{done.version}, run {record['run_url']}"
    )


@app.command("list")
def list_registered(
    params: Params = PARAMS,
    retired: Annotated[bool, typer.Option("--retired", help="those out of use as well")] = False,
    as_json: AsJson = False,
) -> None:
    """Registered concepts: champion, challenger, scores, last re-evaluation, and why the champion is one."""
    from flows.registry.concepts import list_concepts

    found = list_concepts(connected(params)[1], retired=retired)
    if as_json:
        typer.echo(json.dumps([asdict(concept) for concept in found], indent=2))
        return
    row = "{:<24} {:>8} {:>10} {:>8} {:>8} {:>7} {:>7}  {:<28} {}".format
    head = ("concept", "champion", "challenger", "versions", "identity", "text", "drift", "re-evaluation", "reason")
    typer.echo(row(*head))
    for c in found:
        scores = [
            "-" if value is None else f"{value:.4f}" for value in (c.identity, c.text_alignment, c.drift_identity)
        ]
        last, why = c.reevaluation or "-", f"retired: {c.retired}" if c.retired else c.reason
        typer.echo(row(c.concept, c.champion or "-", c.challenger or "-", c.versions, *scores, last, why))


@app.command()
def lineage(which: Which, params: Params = PARAMS, as_json: AsJson = False) -> None:
    """Where a version comes from: data, commit, base, what DVC recorded, and what became of it."""
    from flows.registry.concepts import find
    from flows.registry.runs import read_lineage

    _, tracking = connected(params)
    version = find(tracking, which)
    content = read_lineage(tracking, version)
    if as_json:
        typer.echo(json.dumps({"version": int(version.version), "tags": version.tags, **content}, indent=2))
        return
    lines = _lineage_lines(version, content, tracking.run_url(str(version.run_id)))
    width = max(map(len, lines))
    for key, value in lines.items():
        typer.echo(f"{key:<{width}}  {value}")


def _lineage_lines(version: ModelVersion, content: dict[str, Any], url: str) -> dict[str, str]:
    from flows.pipeline.lineage import outputs

    dirty = "dirty: tracked files differed from it" if content["git_dirty"] != "false" else "clean"
    base = content["base"]
    return {
        "version": f"models:/{version.name}/{version.version}",
        "run": url,
        "commit": f"{content['git_commit']} ({dirty})",
        "base": f"{base['model']}, weights {base['hash']}",
        **{f"data {name}": value for name, value in content["data"].items()},
        "delta sha256": content["delta_sha256"],
        **{f"dvc {path}": value for path, value in outputs(content["stages"]).items()},
        **{f"train.{key}": value for key, value in content["train"].items()},
        "packages": ", ".join(f"{name} {number}" for name, number in content["packages"].items()),
        **{f"tag {key}": value for key, value in sorted(version.tags.items()) if key not in content},
    }


@app.command()
def promote(
    concept: Name,
    reason: Reason,
    version: Annotated[int | None, typer.Option(min=1, max=LAST, help="default: the challenger")] = None,
    params: Params = PARAMS,
) -> None:
    """Make a version the champion, whatever the rule said."""
    from flows.registry.overrides import promote_manually

    number = promote_manually(connected(params)[1], concept, version, reason)
    typer.echo(f"{concept}: champion is version {number} now")


@app.command()
def rollback(concept: Name, reason: Reason, params: Params = PARAMS) -> None:
    """Put the previous champion back; the present one is not promoted again by itself."""
    from flows.registry.overrides import rollback as run

    was, now = run(connected(params)[1], concept, reason)
    typer.echo(f"{concept}: champion was version {was}, is version {now} now")


@app.command()
def retire(
    concept: Name,
    reason: Annotated[str, typer.Option("--reason", "-m", help="why; stays with it (not needed with --undo)")] = "",
    version: Annotated[
        int | None, typer.Option(min=1, max=LAST, help="only this version; default the whole concept")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="take it back into use")] = False,
    params: Params = PARAMS,
) -> None:
    """Take a concept or a version out of use: no alias, not listed, not re-evaluated. Nothing is deleted."""
    from flows.registry import overrides
    from svdiff.errors import SvdiffError

    if not undo and not reason:
        raise SvdiffError("say why with --reason: it is what the next person will ask")
    what, (_, tracking) = concept if version is None else f"{concept} version {version}", connected(params)
    if undo:
        given_back = overrides.reinstate(tracking, concept, version)
        typer.echo(f"{what} is in use again; aliases given back: {', '.join(given_back) or 'none'}")
    else:
        removed = overrides.retire(tracking, concept, version, reason)
        typer.echo(f"{what} is retired; aliases removed: {', '.join(removed) or 'none'}")


@app.command()
def reproduce(
    which: Which,
    into: Annotated[Path | None, typer.Option(help="folder for the clone, which then stays there")] = None,
    params: Params = PARAMS,
) -> None:
    """Train a version again from its lineage alone, and compare it bit for bit. Exit status 1 if it differs."""
    from flows.pipeline.reproduce import reproduce as run
    from flows.registry.concepts import fetch, find
    from flows.registry.runs import read_lineage

    _, tracking = connected(params)
    version = find(tracking, which)

    def fetch_delta(folder: Path) -> Path:
        return fetch(tracking, version, folder)[0]

    name, recorded = f"{version.name}@{version.version}", read_lineage(tracking, version)
    done = run(params.resolve().parent, name, recorded, fetch_delta, into=into, say=typer.echo)
    if done.equal:
        typer.echo(f"{done.version}: equal, bit for bit (sha256 {done.made})")
        return
    typer.echo(f"{done.version}: differs; registered {done.registered}, made {done.made}")
    for difference in done.differences:
        typer.echo(f"  {difference}")
    raise typer.Exit(1)


@app.command()
def storage(params: Params = PARAMS, as_json: AsJson = False) -> None:
    """What checkpoints, decompositions, DVC and MLflow take on this disk."""
    from flows.registry.storage import disk_usage, human

    found = disk_usage(connected(params)[1], params.resolve().parent)
    if as_json:
        typer.echo(json.dumps([asdict(usage) for usage in found], indent=2))
        return
    for u in found:
        typer.echo(f"{human(u.bytes):>10}  {u.files:>7} files  {u.what}  ({u.where})")
    typer.echo(f"{human(sum(u.bytes for u in found)):>10}  together")


@app.command()
def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be removed")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    details: Annotated[bool, typer.Option("--details", help="a line for each thing")] = False,
    params: Params = PARAMS,
) -> None:
    """Remove what nothing refers to: finished resume states, unused decompositions, MLflow's and DVC's leftovers.

    Says what it would remove, and asks first.
    """
    from flows.registry.prune import find_unused
    from flows.registry.storage import human

    _, tracking = connected(params)
    parts = list(find_unused(tracking, params.resolve().parent))
    for part in parts:
        size = human(sum(thing.bytes for thing in part.found))
        typer.echo(f"{part.name}: {part.problem or f'{len(part.found)} to remove, {size}'}")
        for thing in part.found if details else []:
            typer.echo(f"  {human(thing.bytes):>10}  {thing.what}  {thing.where}")
    total = human(sum(thing.bytes for part in parts for thing in part.found))
    if dry_run or not any(part.found for part in parts):
        typer.echo(f"together {total}; nothing was removed")
        return
    if not yes:
        typer.confirm(f"remove all of it, together {total}?", abort=True)
    for part in parts:
        part.remove()
    typer.echo(f"removed {total}")

"""Commands on registered concepts, beside the MLflow UI: `python -m flows list|lineage|promote|rollback|retire|…`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flows.registry.store import Tracking
    from svdiff.config import Config

app = typer.Typer()
Name = Annotated[str, typer.Argument(help="registered concept")]
Which = Annotated[str, typer.Argument(help="CONCEPT (its champion), CONCEPT@VERSION or CONCEPT@ALIAS")]
Reason = Annotated[str, typer.Option("--reason", "-m", help="why; stays with the version")]
Params = Annotated[Path, typer.Option("--params", help="the parameters file")]
AsJson = Annotated[bool, typer.Option("--json", help="for programs")]
PARAMS = Path("params.yaml")


def connected(params: Path) -> tuple[Config, Tracking]:
    """params.yaml, and the MLflow store that it names."""
    from flows.registry.store import connect
    from svdiff.config import load_config

    config = load_config(params)
    return config, connect(config.tracking, params.resolve().parent)


def looked_at(params: Path) -> tuple[Config, Tracking]:
    """As `connected`, for commands that only read the catalogue: that of a SQLite file does without MLflow."""
    from flows.registry.store import locate
    from svdiff.config import load_config

    config = load_config(params)
    tracking = locate(config.tracking, params.resolve().parent)
    readable = tracking.database is not None and tracking.database.is_file()
    return (config, tracking) if readable else connected(params)


@app.command("list")
def list_registered(
    params: Params = PARAMS,
    retired: Annotated[bool, typer.Option("--retired", help="those out of use as well")] = False,
    as_json: AsJson = False,
) -> None:
    """Registered concepts: champion, challenger, scores, last re-evaluation, and why the champion is one."""
    from flows.registry.catalogue import list_concepts

    entries = list_concepts(looked_at(params)[1], retired=retired)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    row = "{:<24} {:>8} {:>10} {:>8} {:>7} {:>7}  {:<28} {}".format
    typer.echo(row("concept", "champion", "challenger", "versions", "image", "text", "re-evaluation", "reason"))
    for e in entries:
        scores = ["-" if value is None else f"{value:.4f}" for value in (e.image_alignment, e.text_alignment)]
        last, why = e.reevaluation or "-", f"retired: {e.retired}" if e.retired else e.reason
        typer.echo(row(e.concept, e.champion or "-", e.challenger or "-", e.versions, *scores, last, why))


@app.command()
def lineage(which: Which, params: Params = PARAMS, as_json: AsJson = False) -> None:
    """Where a version comes from: data, commit, base, what DVC recorded, and what became of it."""
    from flows.pipeline.lineage import read_lineage
    from flows.registry.catalogue import find

    _, tracking = connected(params)
    version = find(tracking, which)
    content = read_lineage(tracking, version)
    if as_json:
        typer.echo(json.dumps({"version": int(version.version), "tags": version.tags, **content}, indent=2))
        return
    for line in _lineage_lines(version, content, tracking.run_url(str(version.run_id))):
        typer.echo(line)


def _lineage_lines(version: Any, content: dict[str, Any], url: str) -> list[str]:
    from flows.pipeline.lineage import outputs

    dirty = "dirty: tracked files differed from it" if content["git_dirty"] != "false" else "clean"
    base = content["base"]
    lines = {
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
    width = max(map(len, lines))
    return [f"{key:<{width}}  {value}" for key, value in lines.items()]


@app.command()
def promote(
    concept: Name,
    reason: Reason,
    version: Annotated[int | None, typer.Option(help="default: the challenger")] = None,
    params: Params = PARAMS,
) -> None:
    """Make a version the champion, whatever the rule said."""
    from flows.registry.overrides import promote_by_hand

    number = promote_by_hand(connected(params)[1], concept, version, reason)
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
    version: Annotated[int | None, typer.Option(help="only this version; default the whole concept")] = None,
    undo: Annotated[bool, typer.Option("--undo", help="take it back into use")] = False,
    params: Params = PARAMS,
) -> None:
    """Take a concept or a version out of use: no alias, not listed, not re-evaluated. Nothing is deleted."""
    from flows.registry.overrides import reinstate
    from flows.registry.overrides import retire as run
    from svdiff.errors import SvdiffError

    if not undo and not reason:
        raise SvdiffError("say why with --reason: it is what the next person will ask")
    _, tracking = connected(params)
    aliases = reinstate(tracking, concept, version) if undo else run(tracking, concept, version, reason)
    what = concept if version is None else f"{concept} version {version}"
    done = "is in use again" if undo else "is retired"
    typer.echo(f"{what} {done}; aliases {'given back' if undo else 'removed'}: {', '.join(aliases) or 'none'}")


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
    from flows.monitoring.round import Reevaluation

    config, tracking = (looked_at if plan else connected)(params)
    round_ = Reevaluation(tracking, config, params.resolve().parent, force=force, accept=accept)
    planned = round_.plan(concept or None)
    if plan:
        for p in planned:
            typer.echo(f"{p.concept} version {p.version}: {'measure' if p.due else 'keep'} ({p.why})")
        return
    wrong = []
    for p in planned:
        try:
            result = round_.examine(p.concept)
        except Exception as error:  # one that fails does not stop the others
            typer.secho(f"{p.concept} version {p.version}: failed: {error}", err=True, fg="red")
            wrong.append(p.concept)
            continue
        typer.echo(result.line())
        if result.verdict.alarming:
            wrong.append(p.concept)
    if wrong:
        typer.secho(f"{len(wrong)} of {len(planned)} want looking at: {', '.join(wrong)}", err=True, fg="red")
        raise typer.Exit(1)


@app.command()
def reproduce(
    which: Which,
    into: Annotated[Path | None, typer.Option(help="folder for the clone, which then stays there")] = None,
    params: Params = PARAMS,
) -> None:
    """Train a version again from its lineage alone, and compare it bit for bit. Exit status 1 if it differs."""
    from flows.pipeline.reproduce import reproduce as run
    from flows.registry.catalogue import find

    _, tracking = connected(params)
    done = run(tracking, params.resolve().parent, find(tracking, which), into=into, say=typer.echo)
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
    from flows.registry.storage import human
    from flows.registry.storage import storage as run

    found = run(connected(params)[1], params.resolve().parent)
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
    from flows.registry.prune import look
    from flows.registry.storage import human

    config, tracking = connected(params)
    parts = list(look(tracking, config, params.resolve().parent))
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

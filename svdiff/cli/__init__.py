"""The command line `svdiff …`: which commands there are, and where each is written.

A command's module is imported when the command is named, so `svdiff --help` answers at once.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from importlib import import_module
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("TYPER_USE_RICH", "0")  # plain help costs half of the time: typer looks when it is imported

import typer
from typer.core import TyperCommand, TyperGroup

from svdiff import __version__
from svdiff.errors import SvdiffError, for_people
from svdiff.files import use_utf8
from svdiff.secrets import show_exception
from svdiff.words import did_you_mean


class Place(NamedTuple):
    """Where a command is written, and what the list of commands says of it."""

    module: str
    summary: str


COMMANDS = {
    "prior": Place("svdiff.cli.stages", "Stage: prior images of a class word, from the base or your own."),
    "mix": Place("svdiff.cli.stages", "Stage: the Cut-Mix-Unmix dataset of a pair (Sec. 3.3), and a contact sheet of it."),
    "train": Place("svdiff.cli.stages", "Stage: train a concept, a pair or an edit, or several as one batch; resumes by itself."),
    "sample": Place("svdiff.cli.stages", "Stage: the evaluation pictures of a concept or a pair. With --prompt: pictures of your own."),
    "score": Place("svdiff.cli.stages", "Stage: text and image alignment (Fig. 9b), beside the untrained base; for a pair also how well it is kept apart."),
    "edit": Place("svdiff.cli.editing", "Edit a picture (Sec. 3.4): train on it, then sample other prompts. With a name alone: the stage."),
    "correlate": Place("svdiff.cli.stages", "Stage: correlation of all concepts' shifts (Fig. 9a, 15)."),
    "second-run": Place("svdiff.cli.stages", "Stage: train a concept a second time, for the diagonal of Fig. 9a."),
    "rank": Place("svdiff.cli.stages", "Stage: alignment against the rank trained with (Fig. 25)."),
    "report": Place("svdiff.cli.stages", "Stage: one page to look at."),
    "config": Place("svdiff.cli.checkout", "Describe every key of params.yaml, with the values in force."),
    "sync": Place("flows.pipeline.commands", "Bring data and base that are missing or changed in git, track new concept folders; your changes stay."),
    "data": Place("svdiff.cli.data", "Check the pictures of concepts: go, fix first or stop."),
    "check": Place("svdiff.cli.checkout", "Stage: refuse a params.yaml that the pipeline cannot work with, before anything runs."),
    "plan": Place("svdiff.cli.checkout", "What `dvc repro` would run, and about how long it takes on this machine."),
    "doctor": Place("svdiff.cli.checkout", "What this machine or checkout lacks; exit status 1 if anything does."),
    "attention": Place("svdiff.cli.pictures", "Draw what the words of a prompt attend to, before and after the training (Fig. 20, 24)."),
    "strip": Place("svdiff.cli.pictures", "Strips of pictures under combined deltas: scale, interpolate, add, style."),
    "compare-pairs": Place("svdiff.cli.experiments", "How well identities are kept apart, with and without Cut-Mix-Unmix (Fig. 6)."),
    "ablate": Place("svdiff.cli.experiments", "What a key of `train` does, a training a value, with intervals."),
    "edit-curves": Place("svdiff.cli.experiments", "Edit score against reconstruction, for methods and lengths of training."),
    "registry": Place("flows.registry.commands", "Registered versions: list, lineage, promote, rollback, retire, reproduce, prune."),
    "reevaluate": Place("flows.monitoring.commands", "Sample and score registered champions again: unchanged, drifted or broken."),
    "serve": Place("flows.serving.commands", "Draw registered concepts over HTTP, in OpenAI's image form, with a page to try it."),
    "up": Place("flows.services.commands", "Start what is missing of the workflow: Prefect server, deployments, worker."),
    "worker": Place("flows.services.commands", "Work for a team's server in this clone."),
    "down": Place("flows.services.commands", "Stop what `up` started here; the history stays."),
    "subsets": Place("svdiff.cli.spectral", "Table 1 for any base: tensors, shifts and bytes of each subset."),
    "delta": Place("svdiff.cli.spectral", "Show, combine and compare delta files."),
    "export": Place("svdiff.cli.spectral", "A delta as plain diffusers weights, or as LoRA for every other tool."),
    "push": Place("flows.registry.push", "A trained concept as a folder for the Hugging Face Hub; nothing is uploaded."),
    "cache": Place("svdiff.cli.spectral", "Show cached decompositions, or prune them."),
    "base": Place("svdiff.base.cli", "The embedded base: picture world, training, card."),
}  # fmt: skip


#: What `pip install svdiff` leaves out, by the extra that brings it.
EXTRAS = {
    **dict.fromkeys(("open_clip", "lpips", "torchvision", "jinja2"), "evaluation"),
    **dict.fromkeys(("mlflow", "prefect", "dvc", "sqlalchemy", "psutil"), "workflow"),
    **dict.fromkeys(("ray", "fastapi", "uvicorn", "prometheus_client"), "serve"),
    "resvg_py": "world",
}


class Commands(TyperGroup):
    """Lists the commands of COMMANDS, and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The name and summary alone, for the list and for suggestions."""
        return TyperCommand(cmd_name, short_help=COMMANDS[cmd_name].summary) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command '{args[0]}'{did_you_mean(args[0], COMMANDS)} `svdiff --help` lists them.")
        name, found, rest = super().resolve_command(ctx, args)
        return name, load(str(name)) if found else None, rest


def load(name: str) -> Any:
    """The command or group of commands called `name`."""
    group: Any = typer.main.get_group(import_module(COMMANDS[name].module).app)
    return group.commands.get(name, group)


app = typer.Typer(no_args_is_help=True, cls=Commands, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"svdiff {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="the version, and nothing else")
    ] = False,
) -> None:
    """Personalise diffusion models by shifting the singular values of their weights."""


def main() -> None:
    """Entry point of `svdiff`."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run the command that was given; errors meant for people are printed without a traceback."""
    use_utf8()
    # Most of a million objects come with torch and diffusers, and stay: looking through them for garbage while they are imported
    # and when all is done is a quarter of the time that a picture takes.
    gc.set_threshold(1_000_000)
    atexit.register(gc.freeze)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # It tells of every class that does without torchvision, which only [evaluation] brings.
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other in turns of milliseconds, as they do by default, starve where another process works.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    sys.excepthook = show_exception
    try:
        app()
    except (SvdiffError, OSError) as error:
        typer.secho(f"error: {for_people(error)}", err=True, fg="red")
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(str(error.name).partition(".")[0])
        if extra is None:
            raise
        fix = f"pip install 'svdiff[{extra}]'"
        typer.secho(f"error: this needs {error.name}, which is not installed: {fix}", err=True, fg="red")
        sys.exit(2)

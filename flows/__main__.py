"""`python -m flows COMMAND`: the commands of the workflow without those of the library, as stages call them."""

from __future__ import annotations

import sys

import typer

from flows.monitoring import commands as monitoring
from flows.pipeline import commands as pipeline
from flows.registry import commands as registry
from flows.services import commands as services
from flows.serving import commands as serving
from svdiff.errors import SvdiffError, for_people
from svdiff.files import use_utf8
from svdiff.secrets import show_exception

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for part in (registry, monitoring, serving, services, pipeline):
    app.registered_commands += part.app.registered_commands


def main() -> None:
    """Entry point: errors meant for people are printed without a traceback."""
    use_utf8()
    sys.excepthook = show_exception
    try:
        app()
    except (SvdiffError, OSError) as error:
        typer.secho(f"error: {for_people(error)}", err=True, fg="red")
        sys.exit(2)


if __name__ == "__main__":
    main()

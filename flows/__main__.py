"""`python -m flows COMMAND`: the commands of the workflow without those of the library, as stages call them."""

from __future__ import annotations

import typer

from flows.monitoring import commands as monitoring
from flows.pipeline import commands as pipeline
from flows.registry import commands as registry
from flows.services import commands as services
from flows.serving import commands as serving
from svdiff.cli import run

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for part in (registry, monitoring, serving, services, pipeline):
    app.registered_commands += part.app.registered_commands

if __name__ == "__main__":
    run(app)

"""The command `serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.registry.commands import PARAMS, Params

app = typer.Typer()


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="address to listen at; there is no login, so keep it private")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[
        int, typer.Option(min=0, help="processes that draw, by Ray Serve; 0: this one, without Ray")
    ] = 0,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs of a replica; default: 1 if this machine has any")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="pictures drawn at once")] = 8,
    queue: Annotated[int, typer.Option(min=1, help="pictures that may wait; more are answered with 429")] = 64,
    max_steps: Annotated[int, typer.Option(min=1, help="DDIM steps that a request may ask for")] = 100,
    resident: Annotated[int, typer.Option(min=1, help="concepts held in memory")] = 1000,
    poll: Annotated[float, typer.Option(min=0.1, help="seconds between two looks at the registry")] = 2.0,
    params: Params = PARAMS,
) -> None:
    """Draw registered concepts for whoever asks over HTTP, in OpenAI's image form, with a page at /."""
    from flows.serving.server import Settings

    settings = Settings(params.resolve(), batch_size, queue, max_steps, resident, poll)
    if replicas:
        import torch

        from flows.serving import cluster

        typer.echo(f"starting {replicas} replicas; then http://{host}:{port}/")
        cluster.run(settings, host, port, replicas, float(torch.cuda.is_available()) if gpus is None else gpus)
        return
    import uvicorn

    from flows.serving.api import make_app
    from flows.serving.server import one_process

    typer.echo(f"loading base and concepts; then http://{host}:{port}/")
    uvicorn.run(make_app(one_process(settings), settings), host=host, port=port, log_level="warning")

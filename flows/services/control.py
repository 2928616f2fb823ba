"""Brings up what the workflow runs on, and takes it down: Prefect's server, work pool, automations, deployments, worker.

State lies in .prefect/ of the checkout. A server elsewhere (PREFECT_API_URL) is used as it is and never started or stopped.
The server that is started here keeps its records in SQLite, or where PREFECT_SERVER_DATABASE_CONNECTION_URL says
(postgresql+asyncpg://user:password@host/database).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from flows.pipeline.stages import SHARE
from flows.pipeline.sync import sync
from flows.services.supervision import Supervisor, answers
from svdiff.config import load_config
from svdiff.errors import SvdiffError

API_URL = "http://127.0.0.1:4200/api"
MLFLOW_URL = "http://127.0.0.1:5000"
POOL = "local"
CHECKOUT = "PROJECT_ROOT"  # where the runs of a worker work; the deployments' pull step reads it


def settings(root: Path) -> dict[str, str]:
    """Environment of everything started here; what is set already stays."""
    ours = {"PREFECT_API_URL": API_URL, "PREFECT_HOME": str(root / ".prefect")}
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    return {name: os.environ.get(name, value) for name, value in ours.items()} | {CHECKOUT: str(root), "PATH": path}


def up(root: Path, worker_limit: int = 4, gpus: int | None = None, mlflow_ui: bool = False) -> Iterator[str]:
    """Start what is missing, in order, saying of each step what was done. Safe to repeat.

    Raises SvdiffError if `root` is no checkout, or a server does not answer.
    """
    if not (root / "prefect.yaml").is_file():
        raise SvdiffError(f"{root} has no prefect.yaml; run this in the root of a checkout")
    environment = settings(root)
    url, supervisor = environment["PREFECT_API_URL"], Supervisor(root)
    yield _server(url, supervisor, environment)

    if _prefect(environment, root, "work-pool", "inspect", POOL).returncode == 0:
        yield f"work pool '{POOL}' is there already"
    else:
        _check(_prefect(environment, root, "work-pool", "create", POOL, "--type", "process"))
        yield f"work pool '{POOL}' made"

    from flows.orchestration import automations

    yield from automations.install(gpus)
    # Where a run works is for its worker to say: without the variable the deployments keep its name.
    _check(_prefect({k: v for k, v in environment.items() if k != CHECKOUT}, root, "deploy", "--all"))
    yield "deployments of prefect.yaml brought up to date"

    if not worker_limit:
        yield "no worker here; `python -m flows worker` in a clone is one"
    else:
        command, name = worker_command(root, worker_limit)
        started = supervisor.start("worker", command, environment)
        what = f"'{name}' started in {root}, {worker_limit} flow runs at once" if started else "is running already"
        yield f"worker {what} (log: {supervisor.log('worker')})"
    if mlflow_ui:
        yield _mlflow(supervisor, environment, root)
    yield f"UI: {url.removesuffix('/api')}"
    yield "try: prefect deployment run train-concept/train-concept --param concept=NAME --watch"


def down(root: Path, remove: bool = False) -> Iterator[str]:
    """Stop what `up` started from this checkout: worker first, so that no run starts meanwhile.

    With `remove`, first take what `up` made away from the server: deployments, automations, limit and work pool.
    """
    if remove:
        from flows.orchestration import automations

        environment = settings(root)
        yield from automations.remove()
        for name in yaml.safe_load((root / "prefect.yaml").read_text())["deployments"]:
            gone = _prefect(environment, root, "deployment", "delete", f"{name['name']}/{name['name']}")
            yield f"deployment {name['name']} {'removed' if gone.returncode == 0 else 'was not there'}"
        gone = _prefect(environment, root, "work-pool", "delete", POOL)
        yield f"work pool '{POOL}' {'removed' if gone.returncode == 0 else 'was not there'}"
    supervisor = Supervisor(root)
    running = supervisor.running()
    supervisor.shut_down()
    for name in ("worker", "server", "mlflow"):
        yield f"{name} {'stopped' if name in running else 'was not running'}"


def worker_command(root: Path, limit: int) -> tuple[list[str], str]:
    """`python -m …` of a worker in the checkout `root`, and its name."""
    name = f"{socket.gethostname()}-{root.name}"
    return ["prefect", "worker", "start", "--pool", POOL, "--limit", str(limit), "--name", name], name


def worker(root: Path, limit: int) -> Iterator[str]:
    """Become a worker in a clone of its own, which shares stages with others through the DVC remote.

    Brings data and base first. Ends when it is asked to stop: a service manager can hold it.
    Raises SvdiffError if the server does not answer or the inputs cannot be had.
    """
    environment = settings(root) | {SHARE: "1"}
    url = environment["PREFECT_API_URL"]
    if not answers(f"{url}/health"):
        raise SvdiffError(f"no Prefect server answers at {url}; set PREFECT_API_URL to the team's")
    yield from sync(root, load_config(root / "params.yaml"))
    command, name = worker_command(root, limit)
    supervisor = Supervisor(root)
    yield f"worker '{name}' in {root}, {limit} flow runs at once; server {url}; log {supervisor.log('worker')}"
    supervisor.become("worker", command, environment)


def _server(url: str, supervisor: Supervisor, environment: dict[str, str]) -> str:
    if answers(f"{url}/health"):
        return f"Prefect server answers at {url}"
    where = urlsplit(url)
    if where.hostname not in ("127.0.0.1", "localhost"):
        raise SvdiffError(f"no Prefect server answers at PREFECT_API_URL={url}; start it there, or unset the variable")
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(where.port or 4200)]
    supervisor.start("server", command, environment)
    supervisor.wait_for("server", f"{url}/health")
    return f"Prefect server started at {url} (log: {supervisor.log('server')})"


def _mlflow(supervisor: Supervisor, environment: dict[str, str], root: Path) -> str:
    from flows.registry.tracking import connect
    from svdiff.config import load_config

    if answers(f"{MLFLOW_URL}/health"):
        return f"MLflow UI answers at {MLFLOW_URL}"
    store, where = connect(load_config(root / "params.yaml").tracking, root).uri, urlsplit(MLFLOW_URL)
    command = ["mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
    command += ["--host", str(where.hostname), "--port", str(where.port)]
    supervisor.start("mlflow", command, environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    supervisor.wait_for("mlflow", f"{MLFLOW_URL}/health")
    return f"MLflow UI started at {MLFLOW_URL} (log: {supervisor.log('mlflow')})"


def _prefect(environment: dict[str, str], root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        cwd=root,
        env={k: v for k, v in os.environ.items() if k != CHECKOUT} | environment,
        capture_output=True,
        text=True,
    )


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        command = " ".join(["prefect", *done.args[4:]])
        raise SvdiffError(f"`{command}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

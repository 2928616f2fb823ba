"""Brings up what the workflow runs on, and takes it down: Prefect's server, work pool, automations, deployments, worker.

State lies in .prefect/ of the checkout. A server that PREFECT_API_URL names is used as it is and never stopped; one that
happens to answer at the default address and was not started here is somebody else's, and nothing is done there.
The server that is started here keeps its records in SQLite, or where PREFECT_SERVER_DATABASE_CONNECTION_URL says
(postgresql+asyncpg://user:password@host/database).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from flows.pipeline.stages import SHARE
from flows.pipeline.sync import sync
from flows.services.supervision import Supervisor, answers
from svdiff.config import load_config
from svdiff.errors import SvdiffError
from svdiff.files import write_atomic
from svdiff.secrets import redacted

API_URL = "http://127.0.0.1:4200/api"
MLFLOW_PORT = 5000  # or another, where that is taken
POOL = "local"
CHECKOUT = "PROJECT_ROOT"  # where the runs of a worker work; the deployments' pull step reads it


def settings(root: Path) -> dict[str, str]:
    """Environment of everything started here; what is set already stays, and a profile of the user's does not count."""
    home = root / ".prefect"
    ours = {"PREFECT_API_URL": API_URL, "PREFECT_HOME": str(home)}
    profile = {"PREFECT_PROFILE": "ephemeral", "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    chosen = {name: os.environ.get(name, value) for name, value in ours.items()}
    return chosen | profile | {CHECKOUT: str(root), "PATH": path}


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

    from flows.orchestration import automations, schedules

    with automations.asking(url):
        yield from automations.install(gpus)
        values, kept = schedules.as_they_are(yaml.safe_load((root / "prefect.yaml").read_text()))
    file = root / ".prefect" / "prefect.yaml"
    write_atomic(file, yaml.safe_dump(values, sort_keys=False))
    # Where a run works is for its worker to say: without the variable the deployments keep its name.
    unplaced = {k: v for k, v in environment.items() if k != CHECKOUT}
    _check(_prefect(unplaced, root, "deploy", "--all", "--prefect-file", str(file)))
    yield "deployments of prefect.yaml brought up to date"
    yield from kept

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
    direct = "NO_PROXY=127.0.0.1,localhost " if urllib.request.getproxies().keys() & {"http", "https", "all"} else ""
    yield f"try: {direct}prefect deployment run train-concept/train-concept --param concept=NAME --watch"


def down(root: Path, remove: bool = False) -> Iterator[str]:
    """Stop what `up` started from this checkout: worker first, so that no run starts meanwhile.

    With `remove`, first take what `up` made away from the server: deployments, automations, limit and work pool.
    """
    if remove:
        from flows.orchestration import automations

        environment = settings(root)
        url = environment["PREFECT_API_URL"]
        if not _is_ours(url, Supervisor(root)):
            raise SvdiffError(f"no Prefect server of this checkout answers at {url}; `python -m flows up` starts it")
        with automations.asking(url):
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
    if not _is_ours(url, Supervisor(root)):
        raise SvdiffError(f"no Prefect server for this worker: set PREFECT_API_URL to the team's (tried {url})")
    yield from sync(root, load_config(root / "params.yaml"))
    command, name = worker_command(root, limit)
    supervisor = Supervisor(root)
    yield f"worker '{name}' in {root}, {limit} flow runs at once; server {url}; log {supervisor.log('worker')}"
    supervisor.become("worker", command, environment)


def _is_prefect(url: str) -> bool:
    return answers(f"{url}/health", "true")


def _is_ours(url: str, supervisor: Supervisor) -> bool:
    """Whether a Prefect server answers that PREFECT_API_URL names or that runs here; others may belong to anybody."""
    named = "PREFECT_API_URL" in os.environ or urlsplit(url).port in supervisor.ports("server")
    return named and _is_prefect(url)


def _server(url: str, supervisor: Supervisor, environment: dict[str, str]) -> str:
    if _is_ours(url, supervisor):
        return f"Prefect server answers at {url}"
    where = urlsplit(url)
    if where.hostname not in ("127.0.0.1", "localhost"):
        raise SvdiffError(f"no Prefect server answers at PREFECT_API_URL={url}; start it there, or unset the variable")
    port = where.port or 4200
    if _taken(port) and port not in supervisor.ports("server"):
        own = f"export PREFECT_API_URL=http://127.0.0.1:{_free_port()}/api for a server of this checkout's own"
        if _is_prefect(url):
            raise SvdiffError(
                f"the Prefect server at {url} is not this checkout's; export PREFECT_API_URL={url} to use it, or {own}"
            )
        raise SvdiffError(f"port {port} is taken by something that is no Prefect server; {own}")
    host = os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1")  # reached from this machine alone, unless asked for
    command = ["prefect", "server", "start", "--host", host, "--port", str(port)]
    supervisor.start("server", command, environment)
    supervisor.wait_for("server", f"{url}/health")
    return f"Prefect server started at {url} (log: {supervisor.log('server')})"


def _mlflow(supervisor: Supervisor, environment: dict[str, str], root: Path) -> str:
    from flows.registry.tracking import connect
    from svdiff.config import load_config

    for port in supervisor.ports("mlflow"):
        return f"MLflow UI answers at http://127.0.0.1:{port}"
    store = connect(load_config(root / "params.yaml").tracking, root).uri
    if urlsplit(store).scheme in ("http", "https"):
        return f"MLflow UI: {redacted(store)}"
    port = _free_port() if _taken(MLFLOW_PORT) else MLFLOW_PORT
    url = f"http://127.0.0.1:{port}"
    command = ["mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    # The store, with its password, stands in the environment: arguments are seen by everybody on the machine.
    own = {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    supervisor.start("mlflow", command, environment | own)
    supervisor.wait_for("mlflow", f"{url}/health")
    return f"MLflow UI started at {url} (log: {supervisor.log('mlflow')})"


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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

"""Prefect's server, work pool, automations, deployments and workers, brought up by one command and down by another.

State lies in .prefect/ of the checkout: Prefect's own files, and for each service that was started here a log and a note
of its process. A server elsewhere (PREFECT_API_URL) is used as it is and never started or stopped. The server that is
started here keeps its records in SQLite, or where PREFECT_SERVER_DATABASE_CONNECTION_URL says
(postgresql+asyncpg://user:password@host/database).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from flows.services.keeper import keep
from flows.services.processes import bearers, kill, marked, new_mark, wait_gone
from svdiff.errors import SvdiffError

API_URL = "http://127.0.0.1:4200/api"
MLFLOW_URL = "http://127.0.0.1:5000"
POOL = "local"
SHARE = (
    "SVDIFF_SHARE"  # a worker with a clone of its own: stages go through the DVC remote (flows/orchestration/tasks.py)
)
CHECKOUT = "PROJECT_ROOT"  # where the runs of a worker work; the deployments' pull step reads it
START_PATIENCE = 180.0  # seconds; a server's first start makes its database
STOP_PATIENCE = 30.0


@dataclass(frozen=True)
class Service:
    """A process that outlives the command that started it."""

    name: str
    home: Path

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.home / "services" / f"{self.name}.log"

    @property
    def _note(self) -> Path:
        return self.home / "services" / f"{self.name}.json"

    @property
    def mark(self) -> str | None:
        """Mark of its processes, if any of them lives."""
        if not self._note.is_file():
            return None
        mark = str(json.loads(self._note.read_text())["mark"])
        return mark if bearers(mark) else None

    def start(self, *command: str, environment: dict[str, str], cwd: Path) -> None:
        """Start `python -m command…` on its own, its output going to the log."""
        self._note.parent.mkdir(parents=True, exist_ok=True)
        mark = new_mark()
        self._note.write_text(json.dumps({"mark": mark, "command": list(command)}))
        with open(self.log, "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=cwd,
                env=os.environ | environment | marked(mark),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )

    def stop(self) -> bool:
        """Interrupt it, then kill what is left; whether there was anything to stop."""
        mark = self.mark
        if mark is not None:
            for process in sorted(bearers(mark), key=lambda p: p.create_time())[:1]:
                process.send_signal(signal.SIGINT)
            if not wait_gone(mark, STOP_PATIENCE):
                kill(mark)
        self._note.unlink(missing_ok=True)
        return mark is not None

    def wait_for(self, url: str) -> None:
        """Until `url` answers. Raises SvdiffError with the log's last lines if it dies or takes too long."""
        until = time.monotonic() + START_PATIENCE
        while not answers(url):
            if self.mark is None or time.monotonic() > until:
                tail = "\n  ".join(self.log.read_text(errors="replace").splitlines()[-15:])
                raise SvdiffError(f"{self.name} does not answer at {url}; its log {self.log} ends:\n  {tail}")
            time.sleep(0.5)


def _heed_interrupts() -> None:
    """A background job of a shell ignores SIGINT and would hand that down; SIGINT is how services are stopped."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def answers(url: str) -> bool:
    """Whether a GET of `url` succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


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
    url, home = environment["PREFECT_API_URL"], root / ".prefect"
    yield _server(url, home, environment, root)

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

    worker = Service("worker", home)
    if not worker_limit:
        yield "no worker here; `python -m flows worker` in a clone is one"
    elif worker.mark:
        yield f"worker is running already (log: {worker.log})"
    else:
        command, name = worker_command(root, worker_limit)
        worker.start("flows.services.keeper", *command, environment=environment, cwd=root)
        yield f"worker '{name}' started in {root}, {worker_limit} flow runs at once (log: {worker.log})"
    if mlflow_ui:
        yield _mlflow(home, environment, root)
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
    for name in ("worker", "server", "mlflow"):
        yield f"{name} {'stopped' if Service(name, root / '.prefect').stop() else 'was not running'}"


def worker_command(root: Path, limit: int) -> tuple[list[str], str]:
    """`python -m …` of a worker in the checkout `root`, and its name."""
    name = f"{socket.gethostname()}-{root.name}"
    return ["prefect", "worker", "start", "--pool", POOL, "--limit", str(limit), "--name", name], name


def worker(root: Path, limit: int) -> Iterator[str]:
    """Become a worker in a clone of its own, which shares stages with others through the DVC remote.

    Pulls data and base first. Returns when it is asked to stop: a service manager can hold it.
    Raises SvdiffError if the server does not answer or the inputs cannot be pulled.
    """
    environment = settings(root) | {SHARE: "1"}
    url = environment["PREFECT_API_URL"]
    if not answers(f"{url}/health"):
        raise SvdiffError(f"no Prefect server answers at {url}; set PREFECT_API_URL to the team's")
    if targets := inputs(root):
        yield f"pulling from the DVC remote: {', '.join(targets)}"
        pull = [sys.executable, "-m", "dvc", "--wait-for-lock", "pull", *targets]
        if subprocess.run(pull, cwd=root).returncode:
            raise SvdiffError("inputs cannot be pulled; see above, and `dvc remote list` for where they are sought")
    command, name = worker_command(root, limit)
    yield f"worker '{name}' in {root}, {limit} flow runs at once; server {url}"
    sys.stdout.flush()
    os.chdir(root)
    keep(command, environment)


def inputs(root: Path) -> list[str]:
    """What the default pipeline starts from: data under DVC, and frozen stages, which nobody reruns by the way."""
    stages = yaml.safe_load((root / "dvc.yaml").read_text())["stages"]
    frozen = [name for name, stage in stages.items() if stage.get("frozen")]
    return [*sorted(path.name for path in root.glob("*.dvc") if path.is_file()), *frozen]


def _server(url: str, home: Path, environment: dict[str, str], root: Path) -> str:
    if answers(f"{url}/health"):
        return f"Prefect server answers at {url}"
    where = urlsplit(url)
    if where.hostname not in ("127.0.0.1", "localhost"):
        raise SvdiffError(f"no Prefect server answers at PREFECT_API_URL={url}; start it there, or unset the variable")
    server = Service("server", home)
    if not server.mark:
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(where.port or 4200)]
        server.start(*command, environment=environment, cwd=root)
    server.wait_for(f"{url}/health")
    return f"Prefect server started at {url} (log: {server.log})"


def _mlflow(home: Path, environment: dict[str, str], root: Path) -> str:
    from flows.registry.store import connect
    from svdiff.config import load_config

    if answers(f"{MLFLOW_URL}/health"):
        return f"MLflow UI answers at {MLFLOW_URL}"
    store = connect(load_config(root / "params.yaml").tracking, root).uri
    service, where = Service("mlflow", home), urlsplit(MLFLOW_URL)
    service.start(
        *["mlflow", "server", "--backend-store-uri", store, "--workers", "1"],
        *["--host", str(where.hostname), "--port", str(where.port)],
        environment=environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        cwd=root,
    )
    service.wait_for(f"{MLFLOW_URL}/health")
    return f"MLflow UI started at {MLFLOW_URL} (log: {service.log})"


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

"""The local Prefect: server, work pool, deployments and worker, brought up by one command and taken down by another.

State lies in .prefect/ of the checkout: Prefect's own files, and for each service that was started here a log and a note
of its process. A server elsewhere (PREFECT_API_URL) is used as it is and never started or stopped.
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

from flows.processes import bearers, kill, marked, new_mark, wait_gone
from svdiff.errors import SvdiffError

API_URL = "http://127.0.0.1:4200/api"
MLFLOW_URL = "http://127.0.0.1:5000"
POOL = "local"
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
    ours = {"PREFECT_API_URL": API_URL, "PREFECT_HOME": str(root / ".prefect"), "PROJECT_ROOT": str(root)}
    folder = str(Path(sys.executable).parent)
    path = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
    return {name: os.environ.get(name, value) for name, value in ours.items()} | {"PATH": path}


def up(root: Path, worker_limit: int = 4, mlflow_ui: bool = False) -> Iterator[str]:
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
    _check(_prefect(environment, root, "deploy", "--all"))
    yield f"deployments of prefect.yaml brought up to date, working in {environment['PROJECT_ROOT']}"

    worker = Service("worker", home)
    if worker.mark:
        yield f"worker is running already (log: {worker.log})"
    else:
        name = f"{socket.gethostname()}-{root.name}"
        command = ["prefect", "worker", "start", "--pool", POOL, "--limit", str(worker_limit), "--name", name]
        worker.start(*command, environment=environment, cwd=root)
        yield f"worker '{name}' started, {worker_limit} flow runs at once (log: {worker.log})"
    if mlflow_ui:
        yield _mlflow(home, environment, root)
    yield f"UI: {url.removesuffix('/api')}"
    yield "try: prefect deployment run train-concept/train-concept --param concept=NAME --watch"


def down(root: Path) -> Iterator[str]:
    """Stop what `up` started from this checkout: worker first, so that no run starts meanwhile."""
    for name in ("worker", "server", "mlflow"):
        yield f"{name} {'stopped' if Service(name, root / '.prefect').stop() else 'was not running'}"


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
    from flows.tracking import connect
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
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def _check(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        command = " ".join(["prefect", *done.args[4:]])
        raise SvdiffError(f"`{command}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

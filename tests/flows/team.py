"""A team's servers for a test: Prefect on PostgreSQL, MLflow, and workers in clones of their own."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import flows
from flows.services.control import POOL
from flows.services.supervision import answers

UP = ["flows", "up", "--workers", "0", "--gpus", "2"]
REPOSITORY = Path(flows.__file__).parents[1]


def until(condition: Callable[[], Any], patience: float = 900, what: str = "waited in vain") -> Any:
    """The first true value of `condition`."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.5)
    return found


def bring_flows(root: Path) -> None:
    """This repository's flows and deployments into another project."""
    for name in ("prefect.yaml", "prefect.toml"):
        shutil.copy(REPOSITORY / name, root / name)
    shutil.copytree(REPOSITORY / "flows", root / "flows", ignore=shutil.ignore_patterns("__pycache__"))


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Process:
    """A process with all that it starts, its output in a file."""

    def __init__(self, log: Path, *command: str, cwd: Path, env: dict[str, str]) -> None:
        self.log, self.command, self.cwd, self.env = log, command, cwd, env
        self.start()

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = psutil.Popen(
                self.command,
                cwd=self.cwd,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def tree(self) -> list[psutil.Process]:
        """All its living processes."""
        return [p for p in (self.process, *self.process.children(recursive=True)) if alive(p)] if self.alive else []

    def kill(self) -> None:
        """kill -9 of the whole tree: stopped first, so that nobody can start or end anything meanwhile."""
        stopped: set[psutil.Process] = set()
        while fresh := set(self.tree()) - stopped:
            for process in fresh:
                process.suspend()
            stopped |= fresh
        for process in stopped:
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.alive:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    @property
    def alive(self) -> bool:
        return alive(self.process)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own on loopback; its address for Prefect. Skips where its programs are missing."""
    found = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (no initdb); `apt-get install postgresql`")
    programs = Path(found).resolve().parent
    as_user: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="svdiff-postgres-"))
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    port = free_port()
    data = folder / "data"
    init = [*as_user, str(programs / "initdb"), "-D", str(data), "-U", "svdiff", "--auth=trust", "--no-sync"]
    subprocess.run(init, cwd=folder, check=True, capture_output=True)
    server = subprocess.Popen(
        [*as_user, str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ready = [str(programs / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, what="PostgreSQL did not start")
        yield f"postgresql+asyncpg://svdiff@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


class Team:
    """The servers, and what a person would do with them."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.office = folder, folder / "office"
        self.office.mkdir()
        self.api = f"http://127.0.0.1:{free_port()}/api"
        self.tracking = f"http://127.0.0.1:{free_port()}"
        self.workers: list[Process] = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MLFLOW", "SVDIFF"))}
        self.env = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database,
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "OMP_NUM_THREADS": "1",  # small models, many processes: threads that wait for each other only cost
        }
        self.mlflow = Process(
            folder / "mlflow.log",
            *[sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"],
            *["--artifacts-destination", str(folder / "artifacts"), "--workers", "1"],
            *["--host", "127.0.0.1", "--port", self.tracking.rsplit(":", 1)[1]],
            cwd=folder,
            env=self.env,
        )
        until(lambda: answers(f"{self.tracking}/health"), 600, "the MLflow server did not start")

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.mlflow.stop()

    def run(self, root: Path, *command: str, **more: str) -> str:
        """What `python -m command…` says in `root`."""
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=root, env=self._in(root) | more, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def _in(self, root: Path) -> dict[str, str]:
        """The clone's own code comes first, as if it had an environment of its own."""
        return self.env | {"PYTHONPATH": str(root)}

    def clone(self, origin: Path, name: str) -> Path:
        root = self.folder / name
        subprocess.run(["git", "clone", "--quiet", str(origin), str(root)], check=True)
        return root

    def worker(self, root: Path, limit: int = 1) -> Process:
        """A team's worker in the clone `root`."""
        command = [sys.executable, "-m", "flows", "worker", "--limit", str(limit)]
        process = Process(self.folder / f"worker-{root.name}.log", *command, cwd=root, env=self._in(root))
        self.workers.append(process)
        return process

    @contextmanager
    def away(self) -> Iterator[None]:
        """The Prefect server is stopped; at the end it is there again."""
        self.run(self.office, "flows", "down")
        yield
        self.run(self.office, *UP)

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.api}{path}", json=body, timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    def get(self, path: str) -> Any:
        answer = httpx.get(f"{self.api}{path}", timeout=60)
        assert answer.is_success, answer.text
        return answer.json()

    def deployment(self, name: str) -> Any:
        return self.get(f"/deployments/name/{name}/{name}")

    def start(self, deployment: str, **parameters: Any) -> str:
        """Id of a new run of `deployment`, for any worker."""
        found = self.deployment(deployment)
        return str(self.post(f"/deployments/{found['id']}/create_flow_run", parameters=parameters)["id"])

    def state(self, flow_run: str) -> str:
        return str(self.get(f"/flow_runs/{flow_run}")["state"]["name"])

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """No worker takes a run, and none is in work."""
        busy = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
        self._pause(True)
        time.sleep(5)  # what a worker was just told to take is pending by then
        until(lambda: not self.post("/flow_runs/filter", **busy))
        yield
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        answer = httpx.patch(f"{self.api}/work_pools/{POOL}", json={"is_paused": paused}, timeout=60)
        assert answer.is_success, answer.text

    def completed(self, flow_run: str, patience: float = 1500) -> None:
        """Wait until the run is completed; show its log if it ends otherwise."""

        def ended() -> bool:
            assert self.state(flow_run) != "Failed", "\n".join(self.messages(flow_run))
            return self.state(flow_run) == "Completed"

        until(ended, patience, f"flow run is {self.state(flow_run)}: {self.messages(flow_run)[-20:]}")

    def states(self, flow_run: str) -> list[str]:
        """Names of all states that a run was in, in order."""
        found = self.get(f"/flow_run_states/?flow_run_id={flow_run}")
        return [state["name"] for state in sorted(found, key=lambda state: state["timestamp"])]

    def messages(self, flow_run: str) -> list[str]:
        """The run's log in the API."""
        wanted = {"logs": {"flow_run_id": {"any_": [flow_run]}}, "sort": "TIMESTAMP_ASC"}
        found: list[str] = []
        while page := self.post("/logs/filter", **wanted, offset=len(found)):
            found += [entry["message"] for entry in page]
        return found

    @property
    def client(self) -> Any:
        """The MLflow server's."""
        from mlflow import MlflowClient

        return MlflowClient(self.tracking, self.tracking)

    def registered(self, concept: str) -> list[Any]:
        return sorted(self.client.search_model_versions(f"name = '{concept}'"), key=lambda v: int(v.version))


def said(root: Path) -> list[dict[str, Any]]:
    """All lines of the structured logs of a clone."""
    files = sorted((root / ".svdiff/logs").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def ran(*roots: Path) -> list[str]:
    """Stages whose command was run in the clones, in order of each clone: a stage run twice is there twice."""
    begun = [line["message"] for root in roots for line in said(root) if line["message"].startswith("Running stage '")]
    return [message.split("'")[1] for message in begun]

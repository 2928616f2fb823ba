"""supervisord, one for each checkout: starts and restarts the processes that outlive a command, and stops them.

Its configuration, its log and a log for each program lie in .prefect/services/ of the checkout;
`supervisorctl -c .prefect/services/supervisord.conf status` shows what it runs.
"""

from __future__ import annotations

import configparser
import hashlib
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from xmlrpc.client import Fault, ServerProxy

import psutil

from flows.pipeline.process_tree import contained
from svdiff.errors import SvdiffError

START_PATIENCE = 180.0  # seconds; a server's first start makes its database
STOP_PATIENCE = 45  # seconds; after 30 the process tree is killed (flows/pipeline/process_tree.py)
OURS = ("PREFECT", "MLFLOW", "SVDIFF")  # variables that a program takes from the command that starts it
ALIVE = ("STARTING", "RUNNING", "BACKOFF")
PROGRAM = {
    "autorestart": "unexpected",  # whenever it ends by itself, but with status 0
    "startsecs": "30",  # ending sooner is a failed start: the next is tried later and later
    "startretries": "100000",
    "stopsignal": "INT",
    "stopwaitsecs": str(STOP_PATIENCE),
    "redirect_stderr": "true",
    "stdout_logfile_maxbytes": "10MB",
    "stdout_logfile_backups": "1",
}


class Supervisor:
    """supervisord of the checkout `root`."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / ".prefect" / "services"
        self.configuration = self.home / "supervisord.conf"
        self.socket = self.home / "supervisord.sock"
        if len(str(self.socket)) > 95:  # a socket's path has at most 107 characters, and supervisord appends its number
            self.socket = Path("/tmp") / f"svdiff-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.sock"

    def log(self, program: str) -> Path:
        """Where the output of a program goes."""
        return self.home / f"{program}.log"

    def running(self) -> dict[str, str]:
        """The programs that run, or are about to be tried again, and their states."""
        try:
            programs = self._call("getAllProcessInfo")
        except (OSError, SvdiffError):  # there is none, or it is ending
            return {}
        return {str(p["name"]): str(p["statename"]) for p in programs if p["statename"] in ALIVE}

    def ports(self, program: str) -> set[int]:
        """Where a program or a process that it started listens: these are this checkout's own servers."""
        try:
            parent = psutil.Process(int(self._call("getProcessInfo", program)["pid"]))
            tree = [parent, *parent.children(recursive=True)] if parent.pid else []
            found = [c for p in tree for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        except (OSError, SvdiffError, psutil.Error):  # it does not run, or ends
            return set()
        return {connection.laddr.port for connection in found}

    def start(self, program: str, command: Sequence[str], environment: Mapping[str, str]) -> bool:
        """Start `python -m command…` unless it runs; whether it was started."""
        if program in self.running():
            return False
        self._write({program: self._section(program, command, environment)})
        if not self._answers():
            subprocess.run(self._daemon(), cwd=self.root, env=_inherited(), check=True)
            _wait(self._answers, f"supervisord does not answer; its log is {self.home / 'supervisord.log'}")
        self._call("reloadConfig")
        if program in {p["name"] for p in self._call("getAllProcessInfo")}:  # ended, and perhaps configured otherwise
            self._call("removeProcessGroup", program)
        self._call("addProcessGroup", program)
        self._call("startProcess", program, False)
        return True

    def become(self, program: str, command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
        """Turn this process into supervisord of one program in the foreground."""
        if self._answers():
            raise SvdiffError(f"services of {self.root} run already; `python -m flows down` stops them")
        section = self._section(program, command, environment)
        self._write({program: section | {"autostart": "true"}}, alone=True)
        sys.stdout.flush()
        os.chdir(self.root)
        os.execve(sys.executable, [*self._daemon(), "--nodaemon"], _inherited())

    def wait_for(self, program: str, url: str) -> None:
        """Until `url` answers. Raises SvdiffError with the log's last lines if the program ends or takes too long."""
        until = time.monotonic() + START_PATIENCE
        while not answers(url):
            if self.running().get(program) not in ("STARTING", "RUNNING") or time.monotonic() > until:
                self._call("stopProcess", program)
                tail = "\n  ".join(self.log(program).read_text(errors="replace").splitlines()[-15:])
                raise SvdiffError(f"{program} does not answer at {url}; its log {self.log(program)} ends:\n  {tail}")
            time.sleep(0.5)

    def shut_down(self) -> None:
        """Stop all programs, the one of highest priority number first, and supervisord."""
        if self._answers():
            with suppress(SvdiffError):  # it is ending already
                self._call("shutdown")
            _wait(lambda: not self._answers(), f"supervisord of {self.root} does not end")

    def _section(self, program: str, command: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
        ours = {k: v for k, v in os.environ.items() if k.startswith(OURS)} | dict(environment)
        return PROGRAM | {
            "command": shlex.join(contained([sys.executable, "-m", *command])),
            "directory": str(self.root),
            "environment": ",".join(f"{name}={_quoted(value)}" for name, value in ours.items()),
            "stdout_logfile": str(self.log(program)),
            "autostart": "false",
            "priority": "2" if program == "worker" else "1",  # no run is to start while the server stops
        }

    def _write(self, programs: Mapping[str, Mapping[str, str]], alone: bool = False) -> None:
        """Put `programs` into the configuration, beside those that are there unless they are `alone`."""
        parser = configparser.RawConfigParser()
        if not alone:
            parser.read(self.configuration)
            for name in parser.sections():
                if name.startswith("program:"):  # that of `become` starts by itself, with another service's settings
                    parser[name]["autostart"] = "false"
        sections: dict[str, dict[str, str]] = {
            "supervisord": {"logfile": f"{self.home}/supervisord.log", "pidfile": f"{self.home}/supervisord.pid"},
            "unix_http_server": {"file": str(self.socket), "chmod": "0700"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
            },
            "supervisorctl": {"serverurl": f"unix://{self.socket}"},
            **{f"program:{name}": dict(section) for name, section in programs.items()},
        }
        for name, section in sections.items():
            parser[name] = {key: value.replace("%", "%%") for key, value in section.items()}
        self.home.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # may hold passwords
        with open(descriptor, "w") as stream:
            parser.write(stream)

    def _daemon(self) -> list[str]:
        return [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self.configuration)]

    def _call(self, method: str, *arguments: Any) -> Any:
        from supervisor.xmlrpc import SupervisorTransport

        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        try:
            with ServerProxy("http://supervisor", transport) as proxy:
                return getattr(proxy.supervisor, method)(*arguments)
        except Fault as error:
            raise SvdiffError(f"supervisord of {self.root} refuses {method}: {error.faultString}; try again") from None

    def _answers(self) -> bool:
        try:
            self._call("getState")
        except OSError:
            return False
        except SvdiffError:  # it answers that it is ending
            pass
        return True


def _inherited() -> dict[str, str]:
    """The environment of supervisord itself; what is `OURS` each program is given by its own start."""
    return {name: value for name, value in os.environ.items() if not name.startswith(OURS)}


def _quoted(value: str) -> str:
    mark = "'" if '"' in value else '"'
    return f"{mark}{value}{mark}"


def _wait(condition: Callable[[], bool], problem: str) -> None:
    until = time.monotonic() + 3 * STOP_PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise SvdiffError(problem)
        time.sleep(0.1)


def answers(url: str, text: str = "") -> bool:
    """Whether a GET of `url` succeeds with a body that begins with `text`."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200 and response.read(len(text)).decode(errors="replace") == text)
    except (OSError, HTTPException):  # nobody, or somebody who does not speak HTTP
        return False

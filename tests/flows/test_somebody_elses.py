"""Services beside what others run on the machine: their servers, proxies and profiles are neither used nor touched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from miniature import write_params
from team import bring_flows

from flows.services import control
from svdiff.errors import SvdiffError


@pytest.fixture
def serve() -> Iterator[Callable[[str], tuple[str, list[str]]]]:
    """Somebody's server that answers everything with one text; its API's address, and what it was asked for."""
    servers = []

    def start(text: str) -> tuple[str, list[str]]:
        asked: list[str] = []

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(f"{self.command} {self.path}")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/api", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    bring_flows(tmp_path)
    for name in [name for name in os.environ if name.startswith("PREFECT")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_another_checkouts_prefect_server_is_left_alone(root: Path, serve, monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = serve("true")
    monkeypatch.setattr(control, "API_URL", url)
    with pytest.raises(
        SvdiffError, match=r"is not this checkout's; export PREFECT_API_URL=http://127\.0\.0\.1:\d+/api"
    ):
        list(control.up(root))
    with pytest.raises(SvdiffError, match="no Prefect server of this checkout"):
        list(control.down(root, remove=True))
    with pytest.raises(SvdiffError, match="set PREFECT_API_URL"):
        list(control.worker(root, 1))
    assert all(line.startswith("mlflow was") or "was not running" in line for line in control.down(root))
    assert set(asked) == {"GET /api/health"}
    monkeypatch.setenv("PREFECT_API_URL", url)  # chosen, so used
    assert control._server(url, control.Supervisor(root), {}) == f"Prefect server answers at {url}"


@pytest.mark.parametrize("text", ["<html>", "OK", ""])
@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_prefect_server_is_named_with_its_port(
    root: Path, serve, monkeypatch: pytest.MonkeyPatch, text: str, named: bool
) -> None:
    url, asked = serve(text)
    monkeypatch.setattr(control, "API_URL", url)
    if named:
        monkeypatch.setenv("PREFECT_API_URL", url)
    port = url.split(":")[2].removesuffix("/api")
    with pytest.raises(SvdiffError, match=f"port {port} is taken by something that is no Prefect server; export"):
        list(control.up(root))
    assert set(asked) <= {"GET /api/health"}


def test_the_mlflow_ui_takes_another_port_where_its_own_is_taken(
    root: Path, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, asked = serve("OK")
    taken = int(url.split(":")[2].removesuffix("/api"))
    monkeypatch.setattr(control, "MLFLOW_PORT", taken)
    commands: list[list[str]] = []
    monkeypatch.setattr(control.Supervisor, "start", lambda self, name, command, _: commands.append(command))
    monkeypatch.setattr(control.Supervisor, "wait_for", lambda self, name, url: None)
    monkeypatch.setattr("flows.registry.tracking.connect", lambda *_: type("Store", (), {"uri": "sqlite:///x"}))
    write_params(root, "dog")
    said = control._mlflow(control.Supervisor(root), {}, root)
    port = int(commands[0][-1])
    assert port != taken
    assert f"http://127.0.0.1:{port}" in said
    assert asked == []


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
ASK = """
import flows, httpx, requests, sys
from flows.services.supervision import answers
assert answers(sys.argv[1], "true")
assert httpx.get(sys.argv[1]).text == requests.get(sys.argv[1]).text == "true"
"""


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"NO_PROXY": "example.org"}, marks=pytest.mark.slow),
        {"no_proxy": "example.org,localhost"},
    ],
)
def test_a_proxy_is_not_asked_for_what_runs_here(root: Path, serve, beside: dict[str, str]) -> None:
    url, asked = serve("true")
    proxy, through = serve("a proxy")
    others = {k: v for k, v in os.environ.items() if k.lower() != "no_proxy"}
    environment = others | {name: proxy.removesuffix("/api") for name in PROXIES} | beside
    subprocess.run([sys.executable, "-c", ASK, f"{url}/health"], env=environment, check=True)
    assert len(asked) == 3
    assert through == []


PROFILES = """
active = "work"
[profiles.work]
PREFECT_API_URL = "https://api.prefect.cloud/api/accounts/a/workspaces/b"
PREFECT_API_KEY = "pnu_secret"
PREFECT_SERVER_DATABASE_CONNECTION_URL = "sqlite+aiosqlite:////somebody/elses.db"
"""
TELL = """
from prefect.settings import get_current_settings
settings = get_current_settings()
print(settings.api.url, settings.api.key, settings.server.database.connection_url.get_secret_value())
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["HOME", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH"])
def test_an_active_cloud_profile_counts_for_nothing(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / ".prefect").mkdir()
    (home / ".prefect/profiles.toml").write_text(PROFILES)
    monkeypatch.setenv("HOME", str(home))
    if by != "HOME":
        monkeypatch.setenv(by, {"PREFECT_PROFILE": "work"}.get(by, str(home / ".prefect/profiles.toml")))
    environment = os.environ | control.settings(root)
    done = subprocess.run(
        [sys.executable, "-c", TELL], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    url, key, database = done.stdout.split()
    assert (url, key) == (control.API_URL, "None")
    assert str(root / ".prefect") in database
    version = subprocess.run(
        [sys.executable, "-m", "prefect", "config", "view"], cwd=root, env=environment, capture_output=True, text=True
    )
    assert version.returncode == 0, version.stdout + version.stderr
    assert "api.prefect.cloud" not in version.stdout

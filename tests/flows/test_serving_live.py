"""`svdiff serve` as people use it: OpenAI's client, a browser, Prometheus; in one process and on Ray's replicas."""

from __future__ import annotations

import base64
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from playwright.sync_api import sync_playwright
from served import Served, make_served, same
from team import Process, free_port, until

from flows.registry.overrides import promote_manually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, empty_store: bytes, tiny_base: Path) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        served = make_served(root, empty_store, tiny_base)
        assert [served.train("dog", 1), served.train("dog", 2, identity=0.3), served.train("dog2", 3)] == [1, 2, 1]
        yield served


def start(served: Served, *options: str) -> tuple[Process, str]:
    """The server and its address, once it answers."""
    port = str(free_port())
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "RAY"))}
    command = (sys.executable, "-m", "svdiff.cli", "serve", "--port", port, "--poll", "0.5", *options)
    server = Process(served.root / "server.log", *command, cwd=served.root, env=environment)
    url = f"http://127.0.0.1:{port}"
    until(lambda: answers(url) or not server.alive, what="the server does not answer")
    assert server.alive, server.log.read_text()
    return server, url


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def ask(url: str, model: str, seed: int) -> bytes:
    """One picture through OpenAI's client, which is not to try again by itself."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
    done = client.images.generate(
        model=model, prompt="a dog", n=1, size="16x16", response_format="b64_json", extra_body={"seed": seed}
    )
    return base64.b64decode(done.data[0].b64_json)


class Clients:
    """Threads that ask for pictures until they are told to stop."""

    def __init__(self, url: str, count: int) -> None:
        self.pictures: list[tuple[int, bytes]] = []
        self.failures: list[Exception] = []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[seed]) for seed in range(count)]

    def _run(self, seed: int) -> None:
        while not self._stop.is_set():
            try:
                self.pictures.append((seed, ask(self._url, "dog", seed)))
            except Exception as error:
                self.failures.append(error)

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_one_process_serves_openais_client_a_browser_and_a_new_champion(served: Served) -> None:
    server, url = start(served)
    try:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert {model.id for model in client.models.list()} >= {"base", "dog@champion", "dog2@champion"}
        with pytest.raises(openai.NotFoundError, match="no concept 'mouse'"):
            client.images.generate(model="mouse", prompt="a dog")
        with pytest.raises(openai.BadRequestError, match="draws pictures of 16x16"):
            client.images.generate(model="dog", prompt="a dog", size="1024x1024")
        mix = {"dog@1": 0.7, "dog2@1": 0.3}
        assert same(ask(url, "dog@1:0.7+dog2:0.3", 5), served.drawn("a dog", 5, mix))
        look_at_the_page(url)
        old, new = (served.drawn("a dog", 0, {f"dog@{number}": 1.0}) for number in (1, 2))
        with Clients(url, 3) as clients:
            until(lambda: len(clients.pictures) > 3)
            promote_manually(served.tracking, "dog", 2, "for the test")
            until(lambda: any(seed == 0 and same(png, new) for seed, png in list(clients.pictures)))
        assert not clients.failures
        assert all(same(png, old) or same(png, new) for seed, png in clients.pictures if seed == 0)
        server.stop()
    finally:
        server.kill() if server.alive else None


def look_at_the_page(url: str) -> None:
    """Choose a concept and a second with weights, draw, and read what stands there; then what an error looks like."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium; `apt-get install chromium`")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(300_000)
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".concept option", state="attached")
        page.click("#add")
        rows = page.locator(".concept")
        for place, (name, weight) in enumerate([("dog@champion", "0.7"), ("dog2@champion", "0.3")]):
            rows.nth(place).locator("select").select_option(name)
            rows.nth(place).locator("input").fill(weight)
        page.fill("#n", "2")
        page.fill("#seed", "5")
        page.click("#draw")
        page.wait_for_selector("figure img")
        assert page.locator("figcaption").all_inner_texts() == [f"dog@1:0.7+dog2@1:0.3, seed {seed}" for seed in (5, 6)]
        page.wait_for_function("[...document.images].every(image => image.naturalWidth === 16)")
        page.fill("#prompt", "a dog " * 20)
        page.click("#draw")
        page.wait_for_function("document.getElementById('error').textContent.includes('tokens long')")
        assert not wrong
        browser.close()


def test_replicas_of_ray_draw_the_same_and_one_that_is_killed_loses_no_request(served: Served) -> None:
    server, url = start(served, "--replicas", "2")
    try:
        with pytest.raises(openai.BadRequestError, match="tokens long"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="none").images.generate(model="dog", prompt="dog " * 30)
        wanted = served.drawn("a dog", 4, {"dog@1": 1.0})
        with Clients(url, 6) as clients:
            until(lambda: len(clients.pictures) > 12)
            replicas = replicas_of(server)
            assert len(replicas) == 2
            replicas[0].kill()
            seen = len(clients.pictures)
            until(lambda: len(clients.pictures) > seen + 24)
            until(lambda: len(replicas_of(server)) == 2, what="the killed replica does not come back")
        assert not clients.failures
        assert same(ask(url, "dog@1", 4), wanted)
        server.stop()
    finally:
        server.kill() if server.alive else None


def replicas_of(server: Process) -> list[psutil.Process]:
    """Processes that draw."""
    return [process for process in server.tree() if "ServeReplica:svdiff:Replica" in "".join(process.cmdline())]

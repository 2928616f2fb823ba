"""The server's parts, on a registry of real deltas: names, requests, batches, and what follows the registry."""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from served import Served, make_served, same

from flows.registry.overrides import promote_manually, retire, rollback
from flows.serving.api import make_app
from flows.serving.batches import Batcher, Order
from flows.serving.drawing import Drawn, Picture, Result
from flows.serving.models import Models, Refusal, ServedConcept, Version, Watch, written
from flows.serving.server import Settings, one_process
from svdiff.errors import SvdiffError

TEAPOT = {n: Version("teapot", n, f"delta-{n}", "sks teapot", 0) for n in (1, 2, 3)}
CAT = {1: Version("cat", 1, "delta-cat", "zwx cat", 0)}
MODELS = Models(
    {
        "teapot": ServedConcept({"champion": 2, "challenger": 3}, TEAPOT, {4: "rolled back (today: worse)"}),
        "cat": ServedConcept({"champion": 1}, CAT, {}),
        "dog": ServedConcept({"champion": 1}, {}, {1: "trained on the base aaa…, this server has bbb…"}),
    }
)


# -- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "meaning"),
    [
        ("teapot", "teapot@2"),
        ("teapot@champion", "teapot@2"),
        ("teapot@challenger", "teapot@3"),
        ("teapot@1", "teapot@1"),
        ("teapot:0.7+cat:0.3", "teapot@2:0.7+cat@1:0.3"),
        (" teapot@3:-0.5 + cat ", "teapot@3:-0.5+cat@1"),
        ("teapot@1+teapot@3:0.5", "teapot@1+teapot@3:0.5"),
        ("base", "base"),
    ],
)
def test_a_model_means_versions_and_weights(model: str, meaning: str) -> None:
    assert written(MODELS.mix(model)) == meaning
    assert MODELS.mix(meaning) == MODELS.mix(model)


@pytest.mark.parametrize(
    ("model", "status", "said"),
    [
        ("", 400, "expected CONCEPT"),
        ("teapot+", 400, "expected CONCEPT"),
        ("teapot@", 400, "expected CONCEPT"),
        ("teapot:", 400, "expected CONCEPT"),
        ("../teapot", 400, "expected CONCEPT"),
        ("teapot:much", 400, "'much' is not a number"),
        ("teapot:nan", 400, "'nan' is not a number"),
        ("teapot:1000", 400, "from -10 to 10"),
        ("teapot+teapot@champion:0.5", 400, "names one version twice"),
        ("taepot", 404, "no concept 'taepot' is registered.*teapot"),
        ("teapot@9", 404, "no version '9'; there are: challenger, champion, 1, 2, 3"),
        ("teapot@best", 404, "no version 'best'"),
        ("teapot@4", 404, "version 4 of 'teapot' is not served: rolled back .today: worse."),
        ("dog", 404, "trained on the base aaa"),
    ],
)
def test_a_model_that_is_not_there_is_refused_by_name(model: str, status: int, said: str) -> None:
    with pytest.raises(Refusal, match=said) as caught:
        MODELS.mix(model)
    assert (caught.value.status, caught.value.param) == (status, "model")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.status, again.code) == (str(caught.value), status, caught.value.code)


# -- batches ----------------------------------------------------------------------------------------------------


def order(seed: int, steps: int = 2) -> Order:
    return Order(Picture("a dog", seed, (), steps, 2.0), {})


class Recorder:
    """Draws nothing, after a while, and knows the seeds of every batch and how many were drawn at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[list[int]] = []
        self.drawing, self.most, self._seconds = 0, 0, seconds

    async def __call__(self, orders: list[Order]) -> list[Result]:
        self.batches.append([order.picture.seed for order in orders])
        self.drawing += 1
        self.most = max(self.most, self.drawing)
        await asyncio.sleep(self._seconds)
        self.drawing -= 1
        return [self.result(order.picture.seed, len(orders)) for order in orders]

    def result(self, seed: int, batch: int) -> Result:
        return Drawn(str(seed).encode(), batch)


def test_pictures_of_one_kind_share_batches_the_oldest_first_and_an_error_is_its_own() -> None:
    class OneFails(Recorder):
        def result(self, seed: int, batch: int) -> Result:
            return ValueError("13") if seed == 13 else super().result(seed, batch)

    draw = OneFails(0.05)

    async def ask():
        batcher = Batcher(draw, 3)
        asked = [order(0), order(10, steps=5), order(1), order(13), order(2), order(11, steps=5)]
        first = await asyncio.gather(*map(batcher, asked), return_exceptions=True)
        again = await batcher(order(20))
        return first, again

    first, again = asyncio.run(ask())
    assert draw.batches == [[0, 1, 13], [10, 11], [2], [20]]
    assert [getattr(one, "png", str(one)) for one in first] == [b"0", b"10", b"1", "13", b"2", b"11"]
    assert (first[1].batch, again) == (2, Drawn(b"20", 1))


@pytest.mark.parametrize(("at_once", "first"), [(1, [2, 4, 4]), (2, [1, 1, 2, 2, 2])])
def test_clients_that_ask_again_are_waited_for_and_share_batches_again(at_once: int, first: list[int]) -> None:
    draw = Recorder(0.5)

    async def client(batcher, number):
        await asyncio.sleep(0.1 * (number > 1))  # the second half comes while the first is drawn
        for _ in range(4):
            await batcher(order(number))
            await asyncio.sleep(0.03)  # longer than the shortest wait

    async def ask():
        batcher = Batcher(draw, 8, at_once)
        await asyncio.gather(*(client(batcher, number) for number in range(4)))

    asyncio.run(ask())
    assert [len(batch) for batch in draw.batches][: len(first)] == first


@pytest.mark.parametrize(("asked", "dealt"), [(3, [1, 1, 1]), (8, [3, 3, 2]), (12, [4, 4, 4]), (14, [4, 4, 4, 1, 1])])
def test_all_who_can_draw_share_what_waits(asked: int, dealt: list[int]) -> None:
    draw = Recorder(0.2)

    async def ask():
        batcher = Batcher(draw, 4, 3)
        return await asyncio.gather(*(batcher(order(seed)) for seed in range(asked)))

    drawn = asyncio.run(ask())
    assert [len(batch) for batch in draw.batches] == dealt
    assert draw.most == 3
    assert [one.png for one in drawn] == [str(seed).encode() for seed in range(asked)]


def test_a_batch_that_fails_is_told_to_all_and_does_not_end_the_queue() -> None:
    class FirstFails(Recorder):
        async def __call__(self, orders: list[Order]) -> list[Result]:
            results = await super().__call__(orders)
            if len(self.batches) == 1:
                raise MemoryError("too large")
            return results

    async def ask():
        batcher = Batcher(FirstFails(), 2)
        return await asyncio.gather(*(batcher(order(seed)) for seed in range(4)), return_exceptions=True)

    assert list(map(type, asyncio.run(ask()))) == [MemoryError, MemoryError, Drawn, Drawn]


def test_pictures_that_nobody_waits_for_any_more_are_not_drawn() -> None:
    draw = Recorder()

    async def ask():
        batcher = Batcher(draw, 2)
        tasks = [asyncio.create_task(batcher(order(seed))) for seed in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(ask())
    assert draw.batches == [[1, 2]]


def test_while_the_registry_cannot_be_read_what_was_known_stays() -> None:
    states: list[Models | Exception] = [MODELS, OSError("away"), Models({})]
    followed, all_read = [], threading.Event()

    def read() -> Models:
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, Exception):
            assert watch.models is MODELS
            raise state
        if not state.concepts:
            all_read.set()
        return state

    watch = Watch(read, 0.01, followed.append).start()
    assert all_read.wait(10)
    until(lambda: not watch.models.concepts)
    watch.stop()
    assert followed[0] is MODELS


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


# -- the whole, on the tiny base ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, empty_store: bytes, tiny_base: Path) -> Iterator[Served]:
    """Two concepts, `dog` with two versions of which the second is champion."""
    root = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        served = make_served(root, empty_store, tiny_base)
        assert [served.train("dog", 1), served.train("dog", 2, identity=0.7), served.train("dog2", 3)] == [1, 2, 1]
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    settings = Settings(served.root / "params.yaml", batch_size=4, queue=12, max_steps=5, poll=0.1)
    server = one_process(settings)
    with TestClient(make_app(server, settings), raise_server_exceptions=False) as client:
        yield client
    server.stop()


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


def generate(client: TestClient, **wanted) -> list[dict]:
    answer = client.post("/v1/images/generations", json={"prompt": "a dog", "model": "dog", "seed": 0} | wanted)
    assert answer.status_code == 200, answer.text
    return [one | {"png": base64.b64decode(one["b64_json"])} for one in answer.json()["data"]]


def refused(client: TestClient, **wanted) -> dict:
    answer = client.post("/v1/images/generations", json={"prompt": "a dog", "model": "dog"} | wanted)
    assert answer.status_code >= 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return {"status": answer.status_code} | error


def test_pictures_are_those_of_the_library_whatever_is_drawn_beside_them(served: Served, client: TestClient) -> None:
    asked = {
        "dog": {"dog@2": 1.0},
        "dog@1": {"dog@1": 1.0},
        "dog2@champion": {"dog2@1": 1.0},
        "dog:0.7+dog2:0.3": {"dog@2": 0.7, "dog2@1": 0.3},
        "base": {},
    }
    answers: dict[str, list[dict]] = {}
    threads = [
        threading.Thread(target=lambda m=model: answers.update({m: generate(client, model=m, n=2)})) for model in asked
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {model: [served.drawn("a dog", seed, mix) for seed in (0, 1)] for model, mix in asked.items()}
    for model, pictures in answers.items():
        assert [one["seed"] for one in pictures] == [0, 1]
        assert all(same(one["png"], right) for one, right in zip(pictures, wanted[model], strict=True)), model
    assert answers["dog:0.7+dog2:0.3"][0]["model"] == "dog@2:0.7+dog2@1:0.3"
    assert not same(answers["dog"][0]["png"], wanted["dog@1"][0])
    alone = metric(client, 'svdiff_batch_pictures_bucket{le="1.0"}')
    assert metric(client, "svdiff_pictures_total") == 10
    assert alone < 10, "no two pictures were drawn together"
    assert metric(client, "svdiff_waiting_pictures") == 0
    assert metric(client, 'svdiff_requests_total{path="/v1/images/generations",status="200"}') == 5


def test_the_answer_says_what_draws_the_picture_again(served: Served, client: TestClient) -> None:
    (first,) = generate(client, seed=None, prompt="a {subject}", steps=3, guidance=1.0)
    again = generate(client, seed=first["seed"], model=first["model"], prompt="a sks dog", steps=3, guidance=1.0)
    assert first["png"] == again[0]["png"]
    assert same(first["png"], served.drawn("a sks dog", first["seed"], {"dog@2": 1.0}, 3, 1.0))


WRONG = [
    ({"model": "mouse"}, 404, "model", "no concept 'mouse'"),
    ({"model": "dog:x"}, 400, "model", "'x' is not a number"),
    ({"prompt": ""}, 400, "prompt", "at least 1 character"),
    ({"prompt": "dog " * 30}, 400, "prompt", "32 tokens long; the text encoder reads 16"),
    ({"prompt": "a {subject}", "model": "base"}, 400, "prompt", "the base alone has none"),
    ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ({"n": 11}, 400, "n", "less than or equal to 10"),
    ({"size": "1024x1024"}, 400, "size", "draws pictures of 16x16"),
    ({"steps": 6}, 400, "steps", "at most 5"),
    ({"guidance": -1}, 400, "guidance", "greater than or equal to 1"),
    ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
    ({"seed": 2**63}, 400, "seed", "less than or equal to"),
    ({"response_format": "url"}, 400, "response_format", "b64_json"),
    ({"quality": "hd"}, 400, "quality", "not known here; there are: prompt, model"),
    ({"prompt": "x" * 200_000}, 413, None, "larger than 100000 bytes"),
]


def test_what_is_wrong_is_refused_in_openais_form_before_work(client: TestClient) -> None:
    before = metric(client, "svdiff_pictures_total")
    for wanted, status, param, said in WRONG:
        error = refused(client, **wanted)
        assert (error["status"], error["param"]) == (status, param), error
        assert said in error["message"], error
    assert client.post("/v1/images/generations", content="{").json()["error"]["message"]
    assert client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/images/generations").status_code == 405
    assert metric(client, "svdiff_pictures_total") == before


def test_a_picture_that_spoils_its_batch_fails_alone(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import svdiff.sampling

    original, batches = svdiff.sampling.sample_images, []

    def spoiled(pipe, jobs, **settings):
        batches.append(len(jobs))
        if any(job.seed == 13 for job in jobs):
            raise SvdiffError("the network drew pixels that are not finite numbers")
        return original(pipe, jobs, **settings)

    monkeypatch.setattr(svdiff.sampling, "sample_images", spoiled)
    with ThreadPoolExecutor() as pool:
        bad, good = pool.submit(refused, client, seed=13), pool.submit(generate, client, seed=21, n=3)
    assert (bad.result()["status"], bad.result()["param"]) == (400, "model")
    assert "not finite" in bad.result()["message"]
    assert len(good.result()) == 3
    assert max(batches) > 1, "they were never in one batch"


def test_a_failure_of_the_server_is_counted(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import svdiff.sampling

    name = 'svdiff_requests_total{path="/v1/images/generations",status="500"}'
    before = metric(client, name)
    monkeypatch.setattr(svdiff.sampling, "sample_images", lambda *_, **__: 1 / 0)
    assert refused(client)["status"] == 500
    assert metric(client, name) == before + 1


@pytest.mark.slow
def test_a_full_queue_is_told_and_empties(client: TestClient) -> None:
    statuses = []

    def ask() -> None:
        body = {"prompt": "a dog", "model": "dog", "n": 5}
        statuses.append(client.post("/v1/images/generations", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert len(generate(client, n=10)) == 10


def test_models_and_health(client: TestClient) -> None:
    listed = {one["id"]: one["version"] for one in client.get("/v1/models").json()["data"]}
    assert listed == {"base": None, "dog@champion": 2, "dog2@champion": 1}
    assert client.get("/v1/models/dog@1").json()["subject"] == "sks dog"
    assert client.get("/v1/models/mouse").status_code == 404
    health = client.get("/health").json()
    assert (health["status"], health["models"]) == ("ok", 2)
    assert "<form" in client.get("/").text


@pytest.mark.slow
def test_a_new_champion_is_drawn_and_one_that_is_rolled_back_or_retired_is_gone(
    served: Served, client: TestClient
) -> None:
    def champion() -> int:
        return client.get("/v1/models/dog@champion").json()["version"]

    failures, running = [], [True]

    def keep_asking() -> None:
        while running:
            answer = client.post("/v1/images/generations", json={"prompt": "a dog", "model": "dog", "seed": 7})
            if answer.status_code != 200:
                failures.append(answer.text)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        new = served.train("dog", 5, identity=0.9)
        until(lambda: champion() == new)
        (drawn,) = generate(client, seed=7)
        rollback(served.tracking, "dog", "worse")
        until(lambda: champion() == 2)
        (before,) = generate(client, seed=7)
    finally:
        running.clear()
        thread.join()
    assert not failures
    assert same(drawn["png"], served.drawn("a dog", 7, {f"dog@{new}": 1.0}))
    assert same(before["png"], served.drawn("a dog", 7, {"dog@2": 1.0}))
    assert "rolled back" in refused(client, model=f"dog@{new}")["message"]
    promote_manually(served.tracking, "dog", new, "it was better after all")
    until(lambda: champion() == new)
    retire(served.tracking, "dog2", None, "out of fashion")
    until(lambda: client.get("/v1/models/dog2").status_code == 404)
    assert "retired" in refused(client, model="dog2@1")["message"]


@pytest.mark.slow
def test_a_version_whose_file_is_broken_fails_alone(served: Served, client: TestClient) -> None:
    bad = served.train("dog", 8, identity=0.1)
    number = served.train("dog", 6)
    until(lambda: client.get(f"/v1/models/dog@{number}").status_code == 200)
    store = served.root / "mlruns" / "artifacts"
    newest = max(store.rglob("delta.safetensors"), key=lambda path: path.stat().st_mtime)
    newest.write_bytes(newest.read_bytes()[:-1])
    error = refused(client, model=f"dog@{number}")
    assert (error["status"], error["code"]) == (503, "model_unavailable")
    assert "the file was changed" in error["message"]
    generate(client, model="dog@1")
    assert "not better than the untrained base" in refused(client, model=f"dog@{bad}")["message"]

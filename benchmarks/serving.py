"""`svdiff serve` under load: many concepts asked for at random by several clients, against the pipeline in a loop.

    python -m benchmarks.serving --json         # 50 concepts, 8 clients that ask for 4 pictures, 2 minutes, 2 replicas of Ray Serve
    python -m benchmarks.serving --concepts 4 --clients 2 --pictures 1 --seconds 10 --replicas 0

The embedded base with random shifts as concepts, through the real registration into a registry of its own.

- `served_over_loop`: pictures a second of the server over those that the pipeline draws in a loop. Of the loop, the best way is looked
  for first (`loops`): any batch size, in one process with all processors and in as many processes as there are replicas. Then this
  loop and the server, which idles meanwhile, take turns, so that both meet the same machine: `rounds` has the pictures a second
  of either, the ratio is that of the sums;
- `p50_s`, `p99_s`: from a request to its pictures;
- then, for half as long, with a new champion and a killed replica (kill -9, where there are several) in the middle: `errors` counts
  requests of both times without pictures, `wrong` pictures that are not the library's own of that version and seed, drawn in
  batches of one concept. `largest_difference` is of all pictures to the library's, in values of 255; `nearest_other` of the
  library's pictures of one seed to those of the nearest other concept: only where it is far larger does equality tell concepts apart.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.common import machine, table

SEEDS = 4
TOLERANCE = 2  # of 255: sums of batches of other sizes round otherwise
PROMPT = "a {subject} on a blue background"
BATCHES = (1, 2, 4, 8, 16)
ROUNDS = 3  # of the loop and the server in turn
PATIENCE = 600.0  # seconds for a server to answer


def make_registry(root: Path, model: str, concepts: int) -> list[str]:
    """A project with `concepts` champions, and a challenger of the first; their names."""
    from benchmarks.registry import stages
    from flows.pipeline.results import read_results
    from flows.registry.register import register
    from flows.registry.tracking import connect
    from svdiff.config import load_config

    names = [f"concept-{number:04d}" for number in range(concepts)]
    sample = load_config().sample.model_dump(mode="json") | {"prompts": [PROMPT]}
    values: dict[str, Any] = {
        "base": {"model": str(Path(model).resolve())},
        "classes": ["cat"],
        "concepts": {name: {"class_word": "cat", "token": "sks"} for name in names},
        "sample": sample,
        "rank": {"concepts": names[:1]},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    for name in names:
        (root / "data/concepts" / name).mkdir(parents=True)
        shutil.copy(next(Path("data/concepts").glob("*/00.png")), root / "data/concepts" / name / "00.png")
    os.chdir(root)
    config = load_config()
    tracking = connect(config.tracking, root)
    pipe = open_pipeline(config)
    # Second versions have lower scores, and do not become champions by themselves.
    for seed, (name, version) in enumerate([*((name, 1) for name in names), (names[0], 2)]):
        stages(root, name, version)
        shifts_of(pipe, seed).save(root / f"out/train/{name}/delta.safetensors")
        register(tracking, config, read_results(config, name, root))
    return names


def open_pipeline(config: Any) -> Any:
    """The base of `config`."""
    from svdiff.models import load_pipeline

    return load_pipeline(config.base)


def shifts_of(pipe: Any, seed: int) -> Any:
    """A delta of random shifts, strong enough that concepts are told apart in every picture."""
    import torch

    from svdiff.models import scratch
    from svdiff.spectral import attach, load_basis

    shifts = attach(pipe.unet, load_basis(pipe.unet, scratch() / "bases", progress=False))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shifts.parameters_spectral():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    delta = shifts.delta(class_word="cat", token="sks")
    shifts.detach()
    return delta


class Library:
    """The registered deltas on a pipeline in this process, as `out/` and the registry never touch them."""

    def __init__(self, root: Path, names: list[str]) -> None:
        from svdiff.config import load_config
        from svdiff.models import scratch
        from svdiff.spectral import SpectralPipeline

        os.chdir(root)
        self.config = load_config()
        pipe = open_pipeline(self.config)
        deltas = {f"{name}@1": shifts_of(pipe, seed) for seed, name in enumerate(names)}
        deltas[f"{names[0]}@2"] = shifts_of(pipe, len(names))
        self.personal = SpectralPipeline(pipe, cache=scratch() / "bases", progress=False)
        for name, delta in deltas.items():
            self.personal.load_delta(delta, name)

    def draw(self, versions: list[str], seeds: list[int]) -> list[np.ndarray]:
        """A batch, each picture of a version and a seed of its own."""
        from svdiff.sampling import Job, sample_images

        sample, prompt = self.config.sample, PROMPT.format(subject="sks cat")
        with self.personal.concepts(versions) as pipe:
            images = sample_images(
                pipe,
                [Job(prompt, seed) for seed in seeds],
                steps=sample.steps,
                guidance=sample.guidance,
                eta=sample.eta,
                batch_size=len(seeds),
            )
        return [np.asarray(image, dtype=int) for image in images]


def loop(root: str, names: list[str], sizes: list[int], seconds: float) -> dict[str, float]:
    """Pictures a second of the pipeline in a loop in this process, by batch size; each picture of a concept at random."""
    library, chance, rates = Library(Path(root), names), random.Random(0), dict[str, float]()
    for size in sizes:
        done, start = -1, 0.0
        while done < 1 or time.perf_counter() - start < seconds / len(sizes):
            library.draw([f"{chance.choice(names)}@1" for _ in range(size)], list(range(size)))
            done += 1
            if done == 0:  # the first does not count
                start = time.perf_counter()
        rates[str(size)] = size * done / (time.perf_counter() - start)
    return rates


def loops(root: Path, names: list[str], processes: int, sizes: list[int], seconds: float) -> dict[str, float]:
    """Pictures a second, by batch size, of so many processes at once, that share the processors."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    command = [sys.executable, "-m", "benchmarks.serving", "--loop", json.dumps([str(root), names, sizes, seconds])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(processes)]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("the pipeline in a loop failed; see above")
    rates = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {size: sum(rate[size] for rate in rates) for size in rates[0]}


@dataclass(frozen=True)
class Answer:
    """One request: when it was made, how long it took, and what came back."""

    at: float
    seconds: float
    concept: str
    seed: int
    model: str = ""
    pictures: tuple[np.ndarray, ...] = ()  # of this seed and those after it
    error: str = ""


class Clients:
    """Threads that ask for so many pictures of a concept at random, one request after the other."""

    def __init__(self, url: str, names: list[str], count: int, pictures: int) -> None:
        self.answers: list[Answer] = []
        self._url, self._names, self._pictures, self._stop = url, names, pictures, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=[number]) for number in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        import httpx

        chance = random.Random(number)
        with httpx.Client(timeout=PATIENCE) as client:
            while not self._stop.is_set():
                self.answers.append(self._ask(client, chance.choice(self._names), chance.randrange(SEEDS)))

    def _ask(self, client: Any, concept: str, seed: int) -> Answer:
        from PIL import Image

        body = {"model": f"{concept}@champion", "prompt": PROMPT, "seed": seed, "n": self._pictures}
        start = time.perf_counter()
        try:
            response = client.post(f"{self._url}/v1/images/generations", json=body)
            took = time.perf_counter() - start
            if response.status_code != 200:
                return Answer(start, took, concept, seed, error=f"{response.status_code} {response.text[:200]}")
            drawn = response.json()["data"]
            files = [io.BytesIO(base64.b64decode(one["b64_json"])) for one in drawn]
            pictures = tuple(np.asarray(Image.open(file).convert("RGB"), dtype=int) for file in files)
            return Answer(start, took, concept, seed, drawn[0]["model"], pictures)
        except Exception as error:
            return Answer(start, time.perf_counter() - start, concept, seed, error=f"{type(error).__name__}: {error}")


def start_server(root: Path, replicas: int, batch_size: int, repository: Path) -> tuple[subprocess.Popen[bytes], str]:
    """`svdiff serve` on a free port, once it answers."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "svdiff.cli", "serve", "--port", str(port), "--replicas", str(replicas)]
    command += ["--batch-size", str(batch_size)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_TRACKING", "RAY"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(repository), environment.get("PYTHONPATH")]))
    with open(root / "server.log", "wb") as log:
        server = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=log, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=10).status_code == 200:
                return server, url
        except httpx.TransportError:
            time.sleep(0.2)
    stop(server)
    raise SystemExit(f"the server does not answer:\n{(root / 'server.log').read_text()[-3000:]}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and what it started."""
    import psutil

    tree = psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []
    server.terminate()
    _, left = psutil.wait_procs(tree, timeout=30)
    for process in left:
        process.kill()
    server.wait()


def replicas_of(server: subprocess.Popen[bytes]) -> list[Any]:
    """The server's processes that draw."""
    import psutil

    tree = psutil.Process(server.pid).children(recursive=True)
    return [process for process in tree if "ServeReplica:svdiff:Replica" in "".join(process.cmdline())]


def served(clients: Clients, seconds: float) -> float:
    """Pictures a second that come back, once batches follow each other."""
    with clients:
        time.sleep(min(20.0, seconds))
        start = time.perf_counter()
        time.sleep(seconds)
        end = time.perf_counter()
    return sum(len(a.pictures) for a in clients.answers if start <= a.at + a.seconds <= end) / (end - start)


def disturb(server: subprocess.Popen[bytes], url: str, name: str, seconds: float, root: Path) -> tuple[float, int]:
    """Promote a challenger after a third of the time and kill a replica after two: how long until the server has it, and how
    many were killed."""
    import httpx

    from flows.registry.overrides import promote_manually
    from flows.registry.tracking import connect
    from svdiff.config import load_config

    time.sleep(seconds / 3)
    promote_manually(connect(load_config().tracking, root), name, 2, "benchmark")
    promoted = time.perf_counter()
    while httpx.get(f"{url}/v1/models/{name}@champion", timeout=PATIENCE).json()["version"] != 2:
        time.sleep(0.1)
    served = time.perf_counter()
    time.sleep(max(0.0, seconds / 3 - (served - promoted)))
    found = replicas_of(server)
    if len(found) > 1:
        found[0].kill()
    time.sleep(seconds / 3)
    return served - promoted, int(len(found) > 1)


def compare(answers: list[Answer], library: Library, pictures: int) -> dict[str, Any]:
    """Pictures that are not the library's, of those that came."""
    drawn = [(answer, i, picture) for answer in answers for i, picture in enumerate(answer.pictures)]
    seeds = SEEDS + pictures - 1
    wanted = {
        model: library.draw([model] * seeds, list(range(seeds)))
        for model in sorted({answer.model for answer, _, _ in drawn} & set(library.personal.deltas))
    }
    differences = [
        int(np.abs(picture - wanted[answer.model][answer.seed + i]).max())
        if answer.model.startswith(f"{answer.concept}@") and answer.model in wanted
        else 255
        for answer, i, picture in drawn
    ]
    others = [
        int(np.abs(a[seed] - b[seed]).max())
        for one, a in wanted.items()
        for other, b in wanted.items()
        if one < other
        for seed in range(seeds)
    ]
    return {
        "wrong": sum(difference > TOLERANCE for difference in differences),
        "largest_difference": max(differences, default=None),
        "nearest_other": min(others, default=None),
        "versions_seen": len(wanted),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    repository = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="svdiff-serving-") as folder:
        root = Path(folder)
        names = make_registry(root, options.model, options.concepts)
        os.chdir(repository)
        counts = sorted({1, max(1, options.replicas)})
        found = {count: loops(root, names, count, list(BATCHES), options.loop_seconds) for count in counts}
        count, size = max(((c, s) for c in counts for s in BATCHES), key=lambda way: found[way[0]][str(way[1])])
        server, url = start_server(root, options.replicas, options.batch_size, repository)
        steady, rounds = list[Answer](), list[tuple[float, float]]()
        try:
            for _ in range(ROUNDS):
                os.chdir(repository)
                looped = loops(root, names, count, [size], options.loop_seconds / 2)[str(size)]
                os.chdir(root)
                clients = Clients(url, names, options.clients, options.pictures)
                rounds.append((served(clients, options.seconds / ROUNDS), looped))
                steady += clients.answers
            with Clients(url, names, options.clients, options.pictures) as disturbed:
                after, killed = disturb(server, url, names[0], options.seconds / 2, root)
        finally:
            stop(server)
            os.chdir(repository)
        everything = [*steady, *disturbed.answers]
        compared = compare(everything, Library(root, names), options.pictures)
        os.chdir(repository)
    times = [answer.seconds for answer in steady] or [float("nan")]
    errors = [answer.error for answer in everything if answer.error]
    served_per_s, loop_per_s = (statistics.mean(rates) for rates in zip(*rounds, strict=True))
    return {
        "concepts": options.concepts,
        "clients": options.clients,
        "pictures": options.pictures,
        "batch_size": options.batch_size,
        "replicas": options.replicas,
        "seconds": options.seconds,
        "served_over_loop": served_per_s / loop_per_s,
        "served_per_s": served_per_s,
        "loop_per_s": loop_per_s,
        "rounds": rounds,
        "loop": f"{count} processes, batches of {size}",
        "loops": {f"{count} processes": rates for count, rates in found.items()},
        "p50_s": float(np.quantile(times, 0.5)),
        "p99_s": float(np.quantile(times, 0.99)),
        "requests": len(everything),
        "errors": len(errors),
        "first_errors": sorted(set(errors))[:3],
        **compared,
        "new_champion_after_s": after,
        "replicas_killed": killed,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/base", help="a diffusers folder")
    parser.add_argument("--concepts", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=4, help="that a request asks for")
    parser.add_argument(
        "--seconds", type=float, default=120, help="of load, in rounds; half as long again with disturbances"
    )
    parser.add_argument(
        "--loop-seconds", type=float, default=60, help="of looking for the best loop; half as long in each round"
    )
    parser.add_argument("--replicas", type=int, default=2, help="as of `svdiff serve`; 0: one process")
    parser.add_argument("--batch-size", type=int, default=16, help="as of `svdiff serve`")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--loop", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(json.dumps(loop(*options.loop)))
        return
    result = run(options)
    if options.json:
        print(json.dumps({**machine(), **result}, indent=1))
        return
    rows = [[name, f"{v:.3f}" if isinstance(v, float) else str(v)] for name, v in result.items()]
    print(table(["measure", "value"], rows))


if __name__ == "__main__":
    main()

"""What orchestration costs: a training stage bare, under DVC and under Prefect; DVC on many concepts that are up to date.

    python -m benchmarks.workflow                              # a table; trains the first concept of params.yaml
    python -m benchmarks.workflow --json --concepts 5 20 50 --repeats 5

Everything happens in a clone of this checkout in a temporary folder. `svdiff train` is the measure of the first part, and
each run of it starts from nothing; Prefect's share is told apart: its task, and the whole run from request to end (which
waits for the worker's next look at the queue). The second part has the stages of dvc.yaml with commands that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import machine, median, seconds, table

ROOT = Path(__file__).parent.parent
STUB = """
import sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    path = path if path.suffix else path / "content.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{"value": 1}' if path.suffix == ".json" else "a,b\\n1,2\\n")
"""


def clone(folder: Path) -> Path:
    """This checkout as it is, uncommitted changes included, without results."""
    root = folder / "svdiff"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    for name in ("svdiff", "flows"):
        shutil.copytree(ROOT / name, root / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "params.yaml", "prefect.yaml", "prefect.toml"):
        shutil.copy2(ROOT / name, root / name)
    return root


def run(root: Path, *command: str) -> str:
    """Run a command of this environment in `root`, whose code comes first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


# ---- a training stage, bare and orchestrated ---------------------------------------------------------------------------


def orchestration(folder: Path, repeats: int, steps: int | None) -> dict[str, list[float]]:
    """Seconds of one concept's training: `bare`, by `dvc`, as a Prefect `task`, and the whole Prefect `run`."""
    root = clone(folder)
    values = yaml.safe_load((root / "params.yaml").read_text())
    if steps is not None:
        values["train"] |= {"steps": steps, "validate_every": steps}
    values["tracking"] = {"uri": "sqlite:///mlruns/mlflow.db", "live": "none"}
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    concept, entry = next(iter(values["concepts"].items()))
    run(root, "python", "-m", "flows", "sync")
    run(root, "dvc", "repro", "--single-item", f"prior@{entry['class_word']}")

    def afresh() -> None:
        for path in (root / ".svdiff/state", root / "out/train", root / ".dvc/cache/runs"):
            shutil.rmtree(path, ignore_errors=True)
        (root / "dvc.lock").unlink(missing_ok=True)  # else DVC takes the outputs that it names from the cache

    def bare() -> None:
        afresh()
        run(root, "svdiff", "train", concept)

    def dvc() -> None:
        afresh()
        run(root, "dvc", "repro", "--single-item", "--force", f"train@{concept}")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{free.getsockname()[1]}/api"
    times: dict[str, list[float]] = {"bare": [], "dvc": [], "task": [], "run": []}
    try:
        run(root, sys.executable, "-m", "flows", "up", "--workers", "1")
        bare()  # fills the caches that all of them share
        for _ in range(repeats):  # in turn, so that a drift of the machine falls on all alike
            times["bare"] += seconds(bare, 1, warmup=0)
            times["dvc"] += seconds(dvc, 1, warmup=0)
            afresh()
            task, whole = _flow(concept)
            times["task"].append(task)
            times["run"].append(whole)
    finally:
        run(root, sys.executable, "-m", "flows", "down")
    return times


def _flow(concept: str) -> tuple[float, float]:
    """Run `train-concept` until its training is done: seconds of that task, and since it was asked for."""
    start = time.perf_counter()
    found = _api("GET", "/deployments/name/train-concept/train-concept")
    asked = {"parameters": {"concept": concept, "prior": False}}
    flow_run = _api("POST", f"/deployments/{found['id']}/create_flow_run", asked)["id"]
    wanted = {"flow_runs": {"id": {"any_": [flow_run]}}, "task_runs": {"name": {"any_": [f"train@{concept}"]}}}
    while True:
        tasks = _api("POST", "/task_runs/filter", wanted)
        if tasks and tasks[0]["state"]["type"] == "COMPLETED":
            whole = time.perf_counter() - start
            _api("POST", f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
            while _api("GET", f"/flow_runs/{flow_run}")["state"]["type"] == "CANCELLING":
                time.sleep(0.5)
            return tasks[0]["total_run_time"], whole
        if _api("GET", f"/flow_runs/{flow_run}")["state"]["type"] in ("FAILED", "CRASHED"):
            raise SystemExit("the flow run failed; `prefect flow-run logs` says why")
        time.sleep(0.2)


def _api(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["PREFECT_API_URL"] + path, data, method=method)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# ---- DVC on concepts that are up to date -------------------------------------------------------------------------------


def catalogue(folder: Path, concepts: int) -> Path:
    """A clone whose dvc.yaml has its own stages for `concepts` concepts, with commands that only write their outputs."""
    root = clone(folder)
    (root / "stub.py").write_text(STUB)
    names = [f"concept-{number:03d}" for number in range(concepts)]
    values = yaml.safe_load((root / "params.yaml").read_text())
    values |= {"classes": ["dog"], "concepts": {name: {"class_word": "dog", "token": "sks"} for name in names}}
    values |= {"pairs": {}, "edits": {}}
    values["rank"]["concepts"] = names[:1]
    (root / "params.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    for name in names:
        (root / "data/concepts" / name).mkdir(parents=True)
        for number in range(4):
            (root / "data/concepts" / name / f"{number}.png").write_bytes(f"{name} {number}".encode() * 1000)
    for pinned in [root / "data.dvc", *(root / "data/concepts").glob("*.dvc")]:
        pinned.unlink()
    run(root, "dvc", "add", "--quiet", *(f"data/concepts/{name}" for name in names))
    for name in ("base", "clip", "lpips"):
        (root / "models" / name).mkdir(parents=True, exist_ok=True)
        (root / "models" / name / "weights").write_text(name)
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    pipeline["stages"] = {
        k: v
        for k, v in pipeline["stages"].items()
        if not v.get("frozen") and v.get("foreach") not in ("${pairs}", "${edits}")
    }
    for stage in pipeline["stages"].values():
        body = stage.get("do", stage)
        outs = [out for key in ("outs", "metrics", "plots") for out in body.get(key, [])]
        paths = [next(iter(out)) if isinstance(out, dict) else out for out in outs]
        body["cmd"] = " ".join(["python stub.py", *paths])
        body["deps"] = [dep for dep in body["deps"] if (root / dep).exists() or dep.startswith(("out/", "data/"))]
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    (root / "dvc.lock").unlink()
    run(root, "dvc", "repro", "--quiet")
    return root


def idle(folder: Path, concepts: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of `dvc repro` and `dvc status` that find nothing to do."""
    root = catalogue(folder, concepts)
    done = {"repro": seconds(lambda: run(root, "dvc", "repro"), repeats)}
    return done | {"status": seconds(lambda: run(root, "dvc", "status"), repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="*", default=[5, 20, 50], help="sizes of the idle catalogue")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="training steps; default as params.yaml says")
    parser.add_argument("--only", choices=["orchestration", "idle"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "idle":
            result["orchestration"] = orchestration(Path(folder), arguments.repeats, arguments.steps)
        if arguments.only != "orchestration":
            sizes = {str(size): Path(folder) / str(size) for size in arguments.concepts}
            result["idle"] = {size: idle(path, int(size), arguments.repeats) for size, path in sizes.items()}
    if arguments.json:
        print(json.dumps(result))
        return
    if "orchestration" in result:
        bare = median(result["orchestration"]["bare"])
        rows = [[k, f"{median(v):.1f} s", f"{median(v) / bare:.3f}"] for k, v in result["orchestration"].items()]
        print(table(["training", "median", "ratio"], rows) + "\n")
    if "idle" in result:
        rows = [[k, *(f"{median(v[key]):.1f} s" for key in ("repro", "status"))] for k, v in result["idle"].items()]
        print(table(["concepts", "dvc repro", "dvc status"], rows))


if __name__ == "__main__":
    main()

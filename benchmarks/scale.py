"""How what looks at all concepts grows with their number, by simulation: slope of time and memory on a log plot.

    python -m benchmarks.scale --json                                       # 100, 1,000 and 10,000 concepts with ten versions each
    python -m benchmarks.scale --sizes 10 30 100 --dvc-sizes 5 10 --only list report

One concept goes through the real registration; its rows in MLflow's registry are then multiplied, through MLflow's own tables, to ten
versions of every concept, of which the last is champion of every tenth concept and the one before it challenger. Runs are not
multiplied: none of these operations searches them. Of the report all concepts share one folder of outputs. `dvc status` reads what
`benchmarks.workflow` makes: real outputs of every concept, at smaller sizes.

Each operation runs in a process of its own, which has loaded what it needs and done it once on the smallest size; `mb` is what its
peak memory grew by. A slope of 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import in_child, machine, memory_gb, reset_peak_memory, table

VERSIONS = 10
CHAMPIONS = 10  # one of so many concepts has a champion
TEMPLATE = "concept-0000"
REGISTRY = ("list", "plan", "promotion", "models")
OPERATIONS = (*REGISTRY, "report", "dvc status")


def named(number: int) -> str:
    return f"concept-{number:05d}"


def make_template(root: Path) -> None:
    """A registry of one concept with a champion that was re-evaluated, through the real registration."""
    from benchmarks.registry import build, night, project
    from flows.registry.tracking import connect

    config = project(root, 1)
    tracking = connect(config.tracking, root)
    build(tracking, config, root, 1)
    night(tracking)
    trained = root / "out/train" / TEMPLATE / "train.json"  # what the report says of a training
    settings = config.train_config(TEMPLATE).model_dump(mode="json")
    trained.write_text(json.dumps(json.loads(trained.read_text()) | {"config": settings}))


def multiply(database: Path, concepts: int) -> None:
    """Copy the template's rows to `concepts` concepts with VERSIONS versions each, and delete the template."""
    from mlflow.store.model_registry.dbmodels import models
    from sqlalchemy import Integer, create_engine, func, insert, literal, select

    numbers = select(literal(0, Integer).label("i")).cte("numbers", recursive=True)
    numbers = numbers.union_all(select(numbers.c.i + 1).where(numbers.c.i < concepts - 1))
    versions = select(literal(1, Integer).label("v")).cte("versions", recursive=True)
    versions = versions.union_all(select(versions.c.v + 1).where(versions.c.v < VERSIONS))
    name, every = func.printf("concept-%05d", numbers.c.i), numbers.c.i % CHAMPIONS == 0
    with create_engine(f"sqlite:///{database}").begin() as connection:

        def copy(model: Any, changes: dict[str, Any], source: Any, *where: Any) -> None:
            rows, columns = model.__table__, model.__table__.columns
            values = [changes.get(column.name, column).label(column.name) for column in columns]
            found = select(*values).select_from(rows.join(source, literal(True))).where(rows.c.name == TEMPLATE, *where)
            connection.execute(insert(rows).from_select([column.name for column in columns], found))

        both = numbers.join(versions, literal(True))
        copy(models.SqlRegisteredModel, {"name": name}, numbers)
        copy(models.SqlModelVersion, {"name": name, "version": versions.c.v}, both)
        copy(models.SqlModelVersionTag, {"name": name, "version": versions.c.v}, both)
        for alias, version in {"champion": VERSIONS, "challenger": VERSIONS - 1}.items():
            changes = {"name": name, "alias": literal(alias), "version": literal(version, Integer)}
            copy(models.SqlRegisteredModelAlias, changes, numbers, every)
        for model in (
            models.SqlRegisteredModelAlias,
            models.SqlModelVersionTag,
            models.SqlModelVersion,
            models.SqlRegisteredModel,
        ):
            connection.execute(model.__table__.delete().where(model.__table__.c.name == TEMPLATE))


def make_catalogue(template: Path, root: Path, concepts: int) -> None:
    """A checkout of `concepts` concepts: registry, params.yaml, and outputs and pictures that all of them share."""
    shutil.copytree(template / "mlruns", root / "mlruns")
    for suffix in ("-wal", "-shm"):  # merged when the template was closed
        (root / f"mlruns/mlflow.db{suffix}").unlink(missing_ok=True)
    values = yaml.safe_load((template / "params.yaml").read_text())
    [entry] = values["concepts"].values()
    values["concepts"] = {named(number): entry for number in range(concepts)}
    values["rank"]["concepts"] = [named(0)]
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    for folder in ("data/concepts", "out/train", "out/sample", "out/score"):
        (root / folder).mkdir(parents=True)
        for number in range(concepts):
            (root / folder / named(number)).symlink_to(template / folder / TEMPLATE)
    multiply(root / "mlruns/mlflow.db", concepts)


def operation(which: str, root: Path) -> Callable[[], object]:
    """What is timed, on the checkout `root`."""
    from svdiff.config import load_config

    os.chdir(root)
    if which == "report":
        from svdiff.report.page import report

        return lambda: report(load_config())
    if which == "dvc status":
        from dvc.repo import Repo

        def status() -> None:
            with Repo(str(root)) as repo:
                found = repo.status()
            assert not found, found

        return status
    from flows.monitoring.round import Round
    from flows.registry.concepts import list_concepts
    from flows.registry.promotion import decide_again
    from flows.registry.tracking import connect
    from flows.serving.models import read_models

    config = load_config()
    tracking = connect(config.tracking, root)
    return {
        "list": lambda: list_concepts(tracking),
        "plan": lambda: Round(tracking, config, root).plan(),
        "promotion": lambda: decide_again(tracking, config, named(0)),
        "models": lambda: read_models(tracking, "b" * 64).named,
    }[which]


def child(which: str, small: str, root: str) -> dict[str, float]:
    """Seconds of one operation and the megabytes that its peak memory grew by, after it was done once on `small`."""
    if which == "template":
        make_template(Path(root))
        return {}
    operation(which, Path(small))()
    run = operation(which, Path(root))
    reset_peak_memory()
    before, start = memory_gb("VmRSS"), time.perf_counter()
    run()
    took = time.perf_counter() - start
    return {"s": took, "mb": max(0.0, 1e3 * (memory_gb() - before))}


def slope(points: dict[int, float]) -> float | None:
    """Least squares through the logarithms; None for a measure that is 0 somewhere."""
    if len(points) < 2 or min(points.values()) <= 0:
        return None
    x, y = [math.log(size) for size in points], [math.log(value) for value in points.values()]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def measure(which: str, roots: dict[int, Path]) -> dict[str, Any]:
    """An operation at all sizes: seconds, megabytes, slopes."""
    smallest, found = str(roots[min(roots)]), dict[int, dict[str, float]]()
    for size, root in roots.items():
        print(f"{which}, {size} concepts", file=sys.stderr)
        result = in_child("benchmarks.scale", which=which, small=smallest, root=str(root))
        if "error" in result:
            raise SystemExit(f"{which} of {size} concepts: {result['error']}")
        found[size] = result
    slopes = {f"slope_{key}": slope({size: result[key] for size, result in found.items()}) for key in ("s", "mb")}
    return {"sizes": found} | slopes


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000], help="numbers of concepts")
    parser.add_argument("--dvc-sizes", type=int, nargs="+", default=[5, 10, 30], help="those of `dvc status`")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    if options.child:
        print(json.dumps(child(**options.child)))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="svdiff-scale-") as folder:
        if set(options.only) - {"dvc status"}:
            template = Path(folder) / "template"
            in_template = in_child("benchmarks.scale", which="template", small="", root=str(template))
            if "error" in in_template:
                raise SystemExit(f"the template: {in_template['error']}")
            roots = {size: Path(folder) / f"catalogue-{size}" for size in sorted(options.sizes)}
            for size, root in roots.items():
                make_catalogue(template, root, size)
            for which in OPERATIONS[:-1]:
                if which in options.only:
                    results[which] = measure(which, roots)
                    print(json.dumps({which: results[which]}), file=sys.stderr, flush=True)
        if "dvc status" in options.only:
            from benchmarks.workflow import catalogue

            roots = {size: catalogue(Path(folder) / f"dvc-{size}", size) for size in sorted(options.dvc_sizes)}
            results["dvc status"] = measure("dvc status", roots)
    if options.json:
        print(json.dumps({**machine(), "versions": VERSIONS, "operations": results}, indent=1))
        return

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        [which, str(size), shown(values["s"]), shown(values["mb"]), shown(found["slope_s"]), shown(found["slope_mb"])]
        for which, found in results.items()
        for size, values in found["sizes"].items()
    ]
    print(table(["operation", "concepts", "s", "MB", "slope of s", "slope of MB"], rows))


if __name__ == "__main__":
    main()

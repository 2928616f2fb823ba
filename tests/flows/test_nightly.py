"""The nightly re-evaluation as a team has it: a cron that fires, a worker that measures, a verdict for each champion."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from champions import Champions, disturb_autoencoder, write_evaluators
from team import Team, bring_flows, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
NAMES = ("corrupt", "drifts", "sound")
UNCHANGED, CHANGED, DRIFT, BROKEN = "unchanged", "evaluator or prompts changed", "drift", "broken artifact"


@pytest.fixture
def champions(
    team: Team, tmp_path: Path, tiny_base: Path, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Champions]:
    """A worker's checkout with registered champions, `drifts` on a base of its own, and the cron at every minute."""
    root = tmp_path / "one"
    root.mkdir()
    monkeypatch.chdir(root)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    bring_flows(root)
    (root / "dvc.yaml").write_text("stages: {}\n")
    deployments = (root / "prefect.yaml").read_text()
    (root / "prefect.yaml").write_text(deployments.replace('cron: "0 3 * * *"', 'cron: "* * * * *"'))

    champions = Champions(
        root, tiny_base, *NAMES, evaluators=write_evaluators(root, 0), reevaluate={"fresh_hours": 0.0}
    )
    for seed, name in enumerate(NAMES):
        if name == "drifts":
            shutil.copytree(champions.base, root / "models" / "other")
            champions.change(base={"model": "models/other"})
        champions.train(tiny_pipe, name, seed=seed)
        champions.change()
    team.run(root, "flows", "up", "--workers", "0")
    yield champions
    deployment = team.deployment("reevaluate")
    assert httpx.delete(f"{team.api}/deployments/{deployment['id']}", timeout=60).is_success


def next_round(team: Team) -> dict[str, str]:
    """Verdicts of the first run that the cron makes begin from now on."""
    wanted = {
        "deployments": {"name": {"any_": ["reevaluate"]}},
        "flow_runs": {
            "start_time": {"after_": datetime.now(UTC).isoformat()},
            "state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}},
        },
        "sort": "START_TIME_ASC",
    }
    run = until(lambda: team.post("/flow_runs/filter", **wanted))[0]
    assert run["state_name"] == "Completed", "\n".join(team.messages(run["id"]))
    assert run["auto_scheduled"]
    assert datetime.fromisoformat(run["expected_start_time"]).second == 0
    found = team.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run["id"]]}})
    (table,) = [artifact["data"] for artifact in found if artifact["key"] == "reevaluation"]
    return {row["concept"]: row["verdict"] for row in (json.loads(table) if isinstance(table, str) else table)}


def alarms(team: Team) -> set[tuple[str, str]]:
    """Concepts and events of all alarms so far."""
    found = team.post("/events/filter", filter={"event": {"prefix": ["svdiff.champion"]}})["events"]
    return {(event["resource"]["svdiff.concept"], event["event"]) for event in found}


def test_a_cron_fires_and_tells_what_became_of_each_champion(team: Team, champions: Champions) -> None:
    team.worker(champions.root)
    # Registered by this process, measured by another: the same pictures.
    assert next_round(team) == dict.fromkeys(NAMES, UNCHANGED)
    assert alarms(team) == set()

    with team.quiet():
        delta = champions.delta_file("corrupt")
        delta.write_bytes(delta.read_bytes()[:-7] + b"garbage")
        disturb_autoencoder(champions.root / "models" / "other")
    assert next_round(team) == {"corrupt": BROKEN, "drifts": DRIFT, "sound": UNCHANGED}
    expected = {("corrupt", "svdiff.champion.broken"), ("drifts", "svdiff.champion.drifted")}
    until(lambda: alarms(team) == expected, what="events did not arrive")
    tags = champions.version("drifts").tags
    assert tags["reevaluation"] == DRIFT
    assert "image alignment changed by" in tags["reevaluation_reason"]

    with team.quiet():
        write_evaluators(champions.root, 1)
    assert next_round(team) == {"corrupt": BROKEN, "drifts": CHANGED, "sound": CHANGED}
    assert next_round(team) == {"corrupt": BROKEN, "drifts": UNCHANGED, "sound": UNCHANGED}
    assert alarms(team) == expected

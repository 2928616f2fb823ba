"""The flow `reevaluate` on a real Prefect server: alarms as events, failures named, the others finished."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from champions import Champions, disturb_autoencoder
from prefect.client.orchestration import get_client

from flows.monitoring.round import REEVALUATES
from flows.orchestration.reevaluate import reevaluate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]


def events(count: int) -> dict[str, str]:
    """Concept and name of the events of champions, once there are `count`: they travel on their own."""
    found: dict[str, str] = {}
    until = time.monotonic() + 120
    while len(found) < count and time.monotonic() < until:
        with get_client(sync_client=True) as client:
            answer = client.request("POST", "/events/filter", json={"filter": {"event": {"prefix": ["svdiff."]}}})
        found = {event["resource"]["svdiff.concept"]: event["event"] for event in answer.json()["events"]}
        time.sleep(1)
    return found


def test_alarms_are_raised_failures_named_and_the_others_finished(
    project, tiny_base: Path, tiny_pipe, tiny_evaluators: None
) -> None:
    champions = Champions(project.root, tiny_base, "broken", "drifts", "failing", "sound")
    for seed, name in enumerate(champions.concepts):
        if name == "drifts":
            shutil.copytree(champions.base, champions.root / "models" / "other")
            champions.change(base={"model": "models/other"})
        champions.train(tiny_pipe, name, seed=seed)
        champions.change()
    champions.delta_file("broken").write_bytes(b"nothing")
    disturb_autoencoder(champions.root / "models" / "other")
    shutil.rmtree(champions.root / "data/concepts/failing")

    with pytest.raises(RuntimeError, match="failing could not be measured") as caught:
        reevaluate()
    assert "sound" not in str(caught.value)
    assert events(2) == {"broken": "svdiff.champion.broken", "drifts": "svdiff.champion.drifted"}
    tags = {name: champions.version(name).tags.get("reevaluation") for name in champions.concepts}
    assert tags == {"broken": "broken artifact", "drifts": "drift", "failing": None, "sound": "unchanged"}
    client = champions.tracking.client
    [run] = client.search_runs([champions.tracking.experiment_id], f"tags.`{REEVALUATES}` = 'sound/1'")
    with get_client(sync_client=True) as prefect:
        assert prefect.read_flow_run(run.data.tags["prefect.flow_run_id"]).name == "reevaluate"
        [artifact] = [a for a in prefect.read_artifacts() if a.key == "reevaluation"]
    assert "1 failed (failing)" in artifact.description
    rows = json.loads(artifact.data) if isinstance(artifact.data, str) else artifact.data
    assert [row["verdict"] for row in rows][:3] == ["broken artifact", "drift", "failed"]

"""What prefect.yaml promises: flows that exist, parameters that the UI can show and check, stages that dvc.yaml has."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from miniature import write_params
from prefect.utilities.callables import parameter_schema

import flows
from flows.orchestration.artifacts import PERCENT
from flows.orchestration.automations import ATTEMPTS, automations
from flows.orchestration.logs import StageLog
from flows.orchestration.train import train_all, train_concept
from flows.pipeline.order import analysis_stages, own_stages, shared_stages
from svdiff.config import load_config

ROOT = Path(flows.__file__).parents[1]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_has_its_flow_with_described_parameters(deployment: dict[str, Any]) -> None:
    file, _, function = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), function)
    assert flow.name == deployment["name"]
    schema = parameter_schema(flow.fn)
    assert schema.properties
    assert [name for name, field in schema.properties.items() if not field.get("description")] == []


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (train_concept, {"concept": "../etc"}),
        (train_concept, {"concept": "dog", "timeout_minutes": 0}),
        (train_concept, {}),
        (train_all, {"where": "there"}),
        (train_all, {"limit": 0}),
        (train_all, {"names": ["dog", ""]}),
    ],
)
def test_impossible_parameters_are_refused_before_a_run_is_made(flow: Any, parameters: dict[str, Any]) -> None:
    """By the schema, which the server and its UI apply."""
    schema = parameter_schema(flow.fn).model_dump()
    jsonschema.validate({"concept": "dog"} if flow is train_concept else {}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parameters, schema)


def test_chains_are_stages_of_the_pipeline() -> None:
    config = load_config(ROOT / "params.yaml")
    for name in [*config.concepts, *config.pairs, *config.edits]:
        stages = [*shared_stages(config, name), *own_stages(config, name)]
        assert {stage.partition("@")[0] for stage in stages} <= STAGES.keys()
    assert {stage.partition("@")[0] for stage in analysis_stages(config)} <= STAGES.keys()


def test_a_crashed_run_is_tried_again_so_often_and_only_if_it_had_begun() -> None:
    silent, crashed, _ = automations()
    assert crashed.trigger.match.root["prefect.run-count"] == [str(count) for count in range(1, ATTEMPTS)]
    heartbeat = 30  # prefect.toml
    assert f"heartbeat_frequency = {heartbeat}" in (ROOT / "prefect.toml").read_text()
    assert silent.trigger.within.total_seconds() % (3 * heartbeat) == 0


def test_structured_log_says_where_a_line_comes_from(tmp_path: Path) -> None:
    write_params(tmp_path, "dog")
    log = StageLog("train@dog", tmp_path)
    log.write("step 1\twith “quotes”")
    (line,) = (tmp_path / ".svdiff/logs/none.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["stage"], record["concept"], record["message"]) == ("train", "dog", "step 1\twith “quotes”")


def test_bars_of_tqdm_have_a_percentage() -> None:
    found = PERCENT.search("train dog:  42%|████▏     | 168/400 [00:21<00:29,  7.9step/s, loss=0.0312]")
    assert found is not None
    assert found[1] == "42"

"""dvc.yaml agrees with the code: what a stage depends on exists, and what it calls can be called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from svdiff.config import Config

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def bodies() -> list[Any]:
    return [pytest.param(stage.get("do", stage), id=name) for name, stage in STAGES.items()]


@pytest.mark.parametrize("body", bodies())
def test_code_dependencies_exist(body: Any) -> None:
    code = [dep for dep in body.get("deps", []) if dep.startswith(("svdiff/", "flows/"))]
    assert code, "a stage that does not depend on its code is never rerun when the code changes"
    assert [dep for dep in code if not (ROOT / dep).exists()] == []


@pytest.mark.parametrize("body", bodies())
def test_parameters_are_keys_of_the_model(body: Any) -> None:
    for parameter in body.get("params", []):
        assert parameter.split(".")[0] in Config.model_fields


@pytest.mark.parametrize("body", bodies())
def test_commands_exist(body: Any) -> None:
    from flows.__main__ import app as flows_app
    from svdiff.cli import COMMANDS

    def names(app: Any) -> set[str]:
        return {c.name or c.callback.__name__ for c in app.registered_commands}

    found = re.match(r"(svdiff|python -m flows) ([a-z-]+)", body["cmd"])
    assert found is not None
    known = names(flows_app) if "flows" in found[1] else COMMANDS.keys()
    assert found[2] in known

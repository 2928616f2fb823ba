"""`svdiff registry …` as a person calls it, each command to its end."""

from __future__ import annotations

import json
import os
from pathlib import Path

from miniature import Project
from typer.testing import CliRunner

from flows.registry.commands import app
from flows.registry.promotion import aliases_of


def run(*words: str, status: int = 0, answer: str | None = None) -> str:
    done = CliRunner().invoke(app, words, input=answer, catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def test_the_life_of_a_concept(project: Project) -> None:
    assert "experiment 'svdiff'" in run("init")
    project.results(value=1, identity=0.5)
    assert "dog: version 1 registered, champion" in run("register", "dog")
    assert "dog: version 1 was registered already" in run("register", "dog")
    project.results(value=2, identity=0.4)
    assert "dog: version 2 registered, challenger" in run("register", "dog")
    record = json.loads(Path("out/register/dog.json").read_text())
    assert (record["version"], record["role"]) == (2, "challenger")
    assert "models:/dog/2" in run("lineage", "dog@2")
    assert json.loads(run("lineage", "dog", "--json"))["delta_sha256"] != record["delta_sha256"]

    assert run("promote", "dog", "-m", "looks better") == "dog: champion is version 2 now\n"
    [row] = json.loads(run("list", "--json"))
    assert (row["concept"], row["champion"], row["versions"]) == ("dog", 2, 2)
    assert "looks better" in run("list")
    assert run("rollback", "dog", "-m", "smears") == "dog: champion was version 2, is version 1 now\n"

    assert "aliases removed: champion" in run("retire", "dog", "-m", "no longer sold")
    assert json.loads(run("list", "--json")) == []
    assert "no longer sold" in run("list", "--retired")
    assert "dog is in use again" in run("retire", "dog", "--undo")
    assert aliases_of(project.tracking, "dog")["champion"] == 1
    assert "dog version 2 is retired" in run("retire", "dog", "--version", "2", "-m", "licence")
    assert "dog version 2 is in use again" in run("retire", "dog", "--version", "2", "--undo")


def test_storage_and_pruning(project: Project) -> None:
    project.register()
    usage = json.loads(run("storage", "--json"))
    assert sum(one["bytes"] for one in usage) > 0
    assert run("storage").splitlines()[-1].endswith("together")

    clone = project.root / ".svdiff/reproduce/dog-1"  # of a reproduction that was killed long ago
    clone.mkdir(parents=True)
    (clone / "params.yaml").write_text("concepts: {}")
    os.utime(clone, (0, 0))
    said = run("prune", "--dry-run", "--details")
    assert "reproductions: 1 to remove, 12 B" in said
    assert "dog-1" in said
    assert "nothing was removed" in said
    assert "remove all of it" in run("prune", status=1, answer="n\n")
    assert clone.exists()
    assert "removed 12 B" in run("prune", "--yes")
    assert not clone.exists()
    assert json.loads(run("list", "--json"))[0]["versions"] == 1

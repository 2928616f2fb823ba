"""Champions measured again: each verdict on a real registry, with real deltas on tiny bases."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
from champions import EVALUATORS, SAMPLE, Champions, disturb_autoencoder
from miniature import Project, write_params
from mlflow.entities.model_registry import ModelVersion
from typer.testing import CliRunner

from flows.monitoring import round as module
from flows.monitoring.commands import app
from flows.monitoring.round import REEVALUATES, VERDICT, WHEN, Round
from flows.monitoring.rule import Verdict, compare
from flows.registry.concepts import model_id
from flows.registry.overrides import promote_manually, retire
from flows.registry.promotion import aliases_of, champion_of
from svdiff.config import ReevaluateConfig
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file

RULE = ReevaluateConfig(image_tolerance=1 / 64, text_tolerance=1 / 64)


def scores(image: list[float], text: float = 0.5) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples([("p", seed) for seed in range(len(image))], names=["prompt", "seed"])
    return pd.DataFrame({"image_alignment": image, "text_alignment": text}, index=index)


@pytest.mark.parametrize(
    ("image", "text", "verdict"),
    [
        ([0.5, 0.5], 0.5, Verdict.UNCHANGED),
        ([0.5 + 1 / 64, 0.5 - 1 / 64], 0.5, Verdict.UNCHANGED),  # just what is tolerated
        ([0.6, 0.4], 0.5, Verdict.DRIFT),  # the mean is the same, the pictures are not
        ([0.75, 0.75], 0.5, Verdict.DRIFT),  # better is drift as well
        ([0.5, 0.5], 0.4, Verdict.DRIFT),
        ([0.5, float("nan")], 0.5, Verdict.DRIFT),
    ],
)
def test_the_rule(image: list[float], text: float, verdict: Verdict) -> None:
    assert compare(scores(image, text), scores([0.5, 0.5]), RULE).verdict is verdict


@pytest.fixture
def champions(project, tiny_base: Path, tiny_evaluators: None) -> Champions:
    """A checkout with concepts `dog`, `dog2` and `dog3`, none registered yet."""
    return Champions(project.root, tiny_base, "dog", "dog2", "dog3")


def reevaluate(champions: Champions, *names: str, **options: bool) -> dict[str, module.Result]:
    round_ = Round(champions.tracking, champions.config, champions.root, **options)
    planned = round_.plan(names or None)
    return {p.concept: round_.reevaluate(p.concept) for p in planned}


@pytest.mark.slow
def test_each_verdict_in_one_round_and_what_follows(champions: Champions, tiny_pipe) -> None:
    """One delta corrupted, one base disturbed behind its delta's back, one sound; then other evaluators."""
    champions.train(tiny_pipe, "dog")
    champions.train(tiny_pipe, "dog2", seed=2)
    shutil.copytree(champions.base, champions.root / "models" / "other")
    champions.change(base={"model": "models/other"})
    champions.train(tiny_pipe, "dog3", seed=3)
    before = {name: dict(champions.version(name).tags) for name in champions.concepts}

    champions.change()
    corrupt = champions.delta_file("dog")
    corrupt.write_bytes(corrupt.read_bytes()[:-7] + b"garbage")
    disturb_autoencoder(champions.root / "models" / "other")
    results = reevaluate(champions)

    assert {name: result.verdict for name, result in results.items()} == {
        "dog": Verdict.BROKEN,
        "dog2": Verdict.UNCHANGED,
        "dog3": Verdict.DRIFT,
    }
    assert "was registered: the file was changed" in results["dog"].reason
    # Same seeds, same base, same machine: equal to the last decimal that is kept.
    assert "image alignment changed by 0.000000" in results["dog2"].reason
    client = champions.tracking.client
    for name, result in results.items():
        tags = champions.version(name).tags
        assert tags[VERDICT] == result.verdict
        assert {"baseline", "baseline_run"} <= tags.keys()
        assert tags["baseline"] == before[name]["baseline"]
    [run] = client.search_runs([champions.tracking.experiment_id], f"tags.`{REEVALUATES}` = 'dog3/1'")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["image_change"] > 0.001
    assert run.data.tags["svdiff.conditions.evaluators"]
    assert {f.path for f in client.list_artifacts(run.info.run_id, "drift-0000")} >= {"drift-0000/samples.png"}
    metrics = client.get_logged_model(model_id(champions.version("dog3"))).metrics
    assert any(m.run_id == run.info.run_id for m in metrics)

    champions.change(evaluators=EVALUATORS | {"clip_pretrained": "another"})
    after = reevaluate(champions)
    assert after["dog"].verdict is Verdict.BROKEN
    for name in ("dog2", "dog3"):  # new baselines, no alarm, also where there was drift
        assert after[name].verdict is Verdict.NEW_BASELINE
        assert after[name].reason.startswith("evaluators changed")
        assert champions.version(name).tags["baseline"] != before[name]["baseline"]
    again = reevaluate(champions, force=True)
    assert {again[name].verdict for name in ("dog2", "dog3")} == {Verdict.UNCHANGED}
    runs = client.search_runs([champions.tracking.experiment_id], f"tags.`{REEVALUATES}` = 'dog2/1'")
    assert len(runs) == 2  # one a baseline
    assert sorted(len(client.get_metric_history(r.info.run_id, "image_alignment")) for r in runs) == [1, 2]


@pytest.mark.slow
def test_a_killed_round_goes_on_and_nothing_is_measured_twice(
    champions: Champions, tiny_pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die after the first concept is done and while the second is written down; run again."""
    champions.train(tiny_pipe, "dog")
    champions.train(tiny_pipe, "dog2", seed=2)
    champions.change(sample=SAMPLE | {"seeds": [0, 1, 2]})
    real = module.set_baseline

    def dies(tracking, version, *rest) -> None:
        if version.name == "dog2":
            raise KeyboardInterrupt
        real(tracking, version, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "set_baseline", dies)
        with pytest.raises(KeyboardInterrupt):
            reevaluate(champions)
    assert WHEN in champions.version("dog").tags
    assert WHEN not in champions.version("dog2").tags

    round_ = Round(champions.tracking, champions.config, champions.root)
    assert [(p.concept, p.due) for p in round_.plan()] == [("dog", False), ("dog2", True)]
    results = {name: round_.reevaluate(name) for name in ("dog", "dog2")}
    assert results["dog"].fresh
    assert not results["dog2"].fresh
    assert {r.verdict for r in results.values()} == {Verdict.NEW_BASELINE}
    assert all(round_.scorer.peaks.bytes[phase] for phase in ("loading", "decomposition", "sampling", "scoring"))
    client = champions.tracking.client
    for name in ("dog", "dog2"):
        runs = client.search_runs([champions.tracking.experiment_id], f"tags.`{REEVALUATES}` = '{name}/1'")
        assert [run.info.status for run in runs] == ["FINISHED"]
    assert [p.due for p in Round(champions.tracking, champions.config, champions.root, force=True).plan()] == [
        True,
        True,
    ]


def test_a_champion_that_came_while_the_last_was_measured_stays(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project.root, "dog", "dog2", reevaluate={"rollback": True})
    project = Project(project.root)
    for value in (1, 2):
        project.register(value=value, identity=0.4 + value / 10)

    def measure(self: Round, version: ModelVersion) -> module.Result:
        number = int(version.version)
        if number == 1:
            promote_manually(project.tracking, "dog", 1, "meanwhile")
        return module.Result("dog", number, Verdict.BROKEN if number == 2 else Verdict.UNCHANGED, "as the test says")

    monkeypatch.setattr(Round, "_reevaluate", measure)
    result = Round(project.tracking, project.config, project.root).reevaluate("dog")
    assert "not rolled back: 'dog' has champion version 1 with predecessor 2 by now; expected 2 with 1" in result.reason
    assert champion_of(project.tracking, "dog") == 1


@pytest.mark.slow
def test_a_broken_champion_makes_way_for_a_sound_predecessor(champions: Champions, tiny_pipe) -> None:
    champions.train(tiny_pipe, "dog", seed=1)
    champions.train(tiny_pipe, "dog", seed=2)
    if champion_of(champions.tracking, "dog") == 1:
        promote_manually(champions.tracking, "dog", 2, "for the test")
    corrupt = champions.delta_file("dog", 2)
    corrupt.write_bytes(b"nothing")
    assert reevaluate(champions)["dog"].verdict is Verdict.BROKEN
    assert champion_of(champions.tracking, "dog") == 2  # the rule does not move aliases unless it is told to

    champions.change(reevaluate={"rollback": True})
    result = reevaluate(champions)["dog"]
    assert "rolled back to version 1 (unchanged)" in result.reason
    assert champion_of(champions.tracking, "dog") == 1
    assert "re-evaluation: broken artifact" in champions.version("dog", 2).tags["rolled_back"]

    # What moves all versions of a base is no reason to put another one forward.
    promote_manually(champions.tracking, "dog", 2, "mended")
    corrupt.write_bytes((champions.root / "out/train/dog/delta.safetensors").read_bytes())
    assert sha256_file(corrupt) == champions.version("dog", 2).tags["delta_sha256"]
    disturb_autoencoder(champions.base)
    result = reevaluate(champions, force=True)["dog"]
    assert result.verdict is Verdict.DRIFT
    assert "not rolled back: version 1 is no better off (drift" in result.reason
    assert champion_of(champions.tracking, "dog") == 2

    accepted = reevaluate(champions, accept=True)["dog"]
    assert accepted.verdict is Verdict.NEW_BASELINE
    assert "accepted by hand" in accepted.reason
    assert reevaluate(champions, force=True)["dog"].verdict is Verdict.UNCHANGED


@pytest.mark.slow
def test_what_cannot_be_measured_is_no_verdict(champions: Champions, tiny_pipe) -> None:
    """Pictures or base that are not here say nothing about the version; another base says that it is broken."""
    champions.train(tiny_pipe, "dog")
    round_ = Round(champions.tracking, champions.config, champions.root)
    with pytest.raises(SvdiffError, match="no concept 'cow'"):
        round_.plan(["cow"])
    shutil.move(champions.root / "data/concepts/dog", champions.root / "away")
    with pytest.raises(SvdiffError, match="data/concepts/dog"):
        round_.reevaluate("dog")
    shutil.move(champions.root / "away", champions.root / "data/concepts/dog")
    assert VERDICT not in champions.version("dog").tags

    with_another = champions.base / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    weights = load_file(with_another)
    weights["conv_in.bias"] += 1e-3
    save_file(weights, with_another, metadata={"format": "pt"})
    told = CliRunner().invoke(app, ["--params", str(champions.root / "params.yaml")])
    assert "dog version 1: broken artifact: it was trained on a base with weights" in told.stdout
    assert "most memory of the " in told.stderr
    assert champions.version("dog").tags[VERDICT] == Verdict.BROKEN

    retire(champions.tracking, "dog", None, "no longer sold")
    assert Round(champions.tracking, champions.config, champions.root).plan() == []
    told = CliRunner().invoke(app, ["--params", str(champions.root / "params.yaml")])
    assert (told.exit_code, told.stdout.partition(",")[0]) == (0, "no concept has a champion")
    with pytest.raises(SvdiffError, match="retired"):
        reevaluate(champions, "dog")
    assert aliases_of(champions.tracking, "dog") == {}

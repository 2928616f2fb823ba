"""The written rule of promotion, and what people may do beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import Project

from flows.pipeline.results import Scores
from flows.registry import promotion
from flows.registry.overrides import promote_manually, rollback
from flows.registry.promotion import aliases_of, champion_of, decide_again, judge, judge_against_base
from flows.registry.tracking import locked
from svdiff.config import PromoteConfig, ScoreConfig
from svdiff.errors import SvdiffError

RULE = PromoteConfig(identity_margin=1 / 64, text_margin=1 / 32, drift_margin=1 / 32, pictures=3)  # exact in binary
BOOTSTRAP = ScoreConfig(bootstrap=100)


def scores(
    identity: list[float],
    text: list[float] | float = 0.5,
    drift: list[float] | None = None,
    *,
    evaluators: str = '{"clip": 1}',
    first_seed: int = 0,
) -> Scores:
    texts = [text] * len(identity) if isinstance(text, float) else text
    rows = [f"p,{first_seed + i},trained,{a!r},{b!r}" for i, (a, b) in enumerate(zip(identity, texts, strict=True))]
    rows.append("p,0,base,0.9,0.9")  # the untrained base never takes part
    of_class = [f"a dog,{seed},trained,{value!r}" for seed, value in enumerate(drift or [])]
    return Scores.parse(
        "\n".join(["prompt,seed,model,identity,text_alignment", *rows]),
        "\n".join(["prompt,seed,model,identity", *of_class]) if drift else None,
        evaluators,
    )


@pytest.mark.parametrize(
    ("identity", "text", "drift", "promoted"),
    [
        (2 / 64, 0, 0, True),  # identity is better by more than the margin
        (1 / 64, 0, 0, False),  # exactly the margin is not more than it
        (2 / 64, -1 / 32, 0, True),  # text worse by just what is tolerated
        (2 / 64, -2 / 32, 0, False),  # text is worse
        (2 / 64, 0, 2 / 32, False),  # the class word has moved towards the concept
        (0, 2 / 32, 0, True),  # text alone is better
        (0, 0, -2 / 32, True),  # drift alone is better
        (-2 / 64, 0.25, 0, False),  # identity is worse, however much better the text is
    ],
)
def test_a_challenger_wins_if_it_is_better_in_one_measure_and_worse_in_none(
    identity: float, text: float, drift: float, promoted: bool
) -> None:
    values, texts, of_class = np.array([0.5, 0.25, 0.75]), np.array([0.25, 0.5, 0.25]), np.array([0.25, 0.125, 0.5])
    champion = scores(values.tolist(), texts.tolist(), of_class.tolist())
    challenger = scores((values + identity).tolist(), (texts + text).tolist(), (of_class + drift).tolist())
    decision = judge(challenger, champion, RULE, BOOTSTRAP)
    assert decision.promoted == promoted, decision.reason
    assert "3 pictures" in decision.reason


def test_a_mean_that_luck_explains_does_not_win() -> None:
    """Better in the mean by ten margins, by two pictures of sixteen."""
    champion = scores([0.5] * 16)
    lucky = scores([0.5] * 6 + [0.4] * 8 + [1.0, 2.9])
    decision = judge(lucky, champion, RULE, BOOTSTRAP)
    assert "identity +0.1313 [-0.0658, +0.5134]: no difference" in decision.reason
    assert not decision.promoted


def test_few_pictures_decide_nothing() -> None:
    decision = judge(scores([0.9, 0.9]), scores([0.1, 0.1]), RULE, BOOTSTRAP)
    assert decision.reason == "not comparable: 2 prompts and seeds in common with the champion, expected 3"


def test_only_pictures_in_common_count() -> None:
    """The challenger's extra, easy seeds must not carry it over the champion."""
    champion = scores([0.5, 0.5, 0.5])
    challenger = scores([0.4, 0.4, 0.4, 0.9, 0.9, 0.9])
    assert not judge(challenger, champion, RULE, BOOTSTRAP).promoted
    assert "0 prompts" in judge(scores([0.9] * 3, first_seed=7), champion, RULE, BOOTSTRAP).reason


def test_other_evaluators_are_not_compared() -> None:
    decision = judge(scores([0.9] * 3, evaluators='{"clip": 2}'), scores([0.1] * 3), RULE, BOOTSTRAP)
    assert not decision.promoted
    assert "other evaluators" in decision.reason


def test_drift_that_only_one_version_has_is_not_compared() -> None:
    decision = judge(scores([0.9] * 3), scores([0.1] * 3, drift=[0.5, 0.5]), RULE, BOOTSTRAP)
    assert decision.reason == "not comparable: drift was measured for one of them only"


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(*[st.floats(0, 1, allow_nan=False)] * 6), min_size=3, max_size=8))
def test_two_versions_never_both_beat_each_other(rows: list[tuple[float, ...]]) -> None:
    """Promotion cannot go round in circles between two versions, whatever their scores."""
    a, b = (scores(*[[row[n + k] for row in rows] for n in (0, 2, 4)]) for k in (0, 1))
    assert not (judge(a, b, RULE, BOOTSTRAP).promoted and judge(b, a, RULE, BOOTSTRAP).promoted)


def gains(identity: float = 0.2, text: float = 0.0, drift: float = 0.0, *, width: float = 0.05) -> dict[str, float]:
    means = {"identity": identity, "text": text, "drift": drift}
    ends = {"gain": 0.0, "gain_low": -width, "gain_high": width}
    return {f"{m}_{end}": mean + by for m, mean in means.items() for end, by in ends.items()} | {"pairs": 32.0}


@pytest.mark.parametrize(
    ("metrics", "better"),
    [
        (gains(), True),
        (gains(identity=0.04), False),  # the interval contains 0: luck
        (gains(identity=-0.2, text=0.3), False),  # it does not draw the concept
        (gains(text=-0.1), True),  # the interval reaches into what is tolerated
        (gains(text=-0.2), False),
        (gains(drift=0.2), False),  # every dog is this dog now
        (gains(drift=-0.2), True),
        (gains() | {"pairs": 7.0}, False),
    ],
)
def test_better_than_the_untrained_base(metrics: dict[str, float], better: bool) -> None:
    decision = judge_against_base(metrics, PromoteConfig())
    assert decision.promoted == better, decision.reason
    assert decision.barred != better


def test_scores_without_intervals_serve_nothing() -> None:
    decision = judge_against_base({"text_alignment": 0.5, "pairs": 32.0}, PromoteConfig())
    assert "score it again" in decision.reason
    assert decision.barred


def test_missing_column_is_named() -> None:
    with pytest.raises(SvdiffError, match="text_alignment"):
        Scores.parse("prompt,seed,identity\np,0,0.5")


@pytest.mark.parametrize("value", ["nan", "", "inf", "good"])
def test_a_score_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(SvdiffError, match=r"identity of 'p' at seed 0 is not a finite number"):
        Scores.parse(f"prompt,seed,identity,text_alignment\np,0,{value},0.5")


def test_not_better_than_the_base_is_registered_and_not_served(project: Project) -> None:
    """Neither the first version nor a later one; a champion that is scored again loses its place, unless it was chosen."""
    first = project.register(value=1, identity=0.2)
    assert first.role == "not better than the base"
    assert first.decision.reason.startswith("not better than the base: identity +0.0000")
    assert aliases_of(project.tracking, "dog") == {}
    assert project.tracking.client.get_model_version("dog", "1").tags["better_than_base"] == "false"

    assert project.register(value=2, identity=0.6).role == "champion"
    assert project.register(value=3, identity=0.9, drift=0.6).role == "not better than the base"
    assert aliases_of(project.tracking, "dog") == {"champion": 2}

    again = project.register(value=2, identity=0.1)
    assert again.role == "not better than the base"
    assert aliases_of(project.tracking, "dog") == {}

    promote_manually(project.tracking, "dog", 2, "the evaluator is wrong")
    assert project.register(value=2, identity=0.05).role == "champion"


def test_champions_challengers_and_the_way_back(project: Project) -> None:
    """First, worse, better, rolled back, scored anew, promoted by hand."""
    tags = lambda number: project.tracking.client.get_model_version("dog", str(number)).tags  # noqa: E731
    project.register(value=1, identity=0.5)
    worse = project.register(value=2, identity=0.4)
    assert not worse.decision.promoted
    assert worse.role == "challenger"
    assert aliases_of(project.tracking, "dog") == {"champion": 1, "challenger": 2}
    assert "identity -0.1000 [-0.1000, -0.1000]: worse" in tags(2)["promotion_reason"]

    better = project.register(value=3, identity=0.6)
    assert better.decision.promoted
    assert aliases_of(project.tracking, "dog") == {"champion": 3, "challenger": 2}
    assert tags(3)["previous_champion"] == "1"
    assert "+0.1000 [+0.1000, +0.1000]: better" in tags(3)["promotion_reason"]

    assert rollback(project.tracking, "dog", "smears on red") == (3, 1)
    assert champion_of(project.tracking, "dog") == 1
    assert "smears on red" in tags(3)["rolled_back"]
    repeated = project.register(value=3, identity=0.6)
    assert repeated.role == "neither champion nor challenger"
    assert repeated.decision.reason == "rolled back to version 1: smears on red"
    again = project.register(value=3, identity=0.7)
    assert not again.decision.promoted
    assert "rolled back" in again.decision.reason
    assert champion_of(project.tracking, "dog") == 1

    assert promote_manually(project.tracking, "dog", 3, "was the scanner") == 3
    assert champion_of(project.tracking, "dog") == 3
    assert "rolled_back" not in tags(3)
    assert tags(3)["promotion_reason"] == "by hand: was the scanner"
    assert aliases_of(project.tracking, "dog") == {"champion": 3, "challenger": 2}


def test_a_challenger_is_judged_again_as_it_is_once_nobody_else_is_at_work(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody promotes it while `decide_again` waits for the lock: there is no challenger any more."""
    project.register(value=1, identity=0.5)
    project.register(value=2, identity=0.4)

    @contextmanager
    def waits(lock: Path) -> Iterator[None]:
        promote_manually(project.tracking, "dog", 2, "meanwhile")
        with locked(lock):
            yield

    monkeypatch.setattr(promotion, "locked", waits)
    assert decide_again(project.tracking, project.config, "dog") is None
    assert champion_of(project.tracking, "dog") == 2


def test_people_are_told_what_cannot_be(project: Project) -> None:
    project.register()
    for action, message in [
        (lambda: rollback(project.tracking, "dog", "x"), "no predecessor"),
        (lambda: promote_manually(project.tracking, "dog", None, "x"), "no challenger"),
        (lambda: promote_manually(project.tracking, "dog", 7, "x"), "no version 7"),
        (lambda: promote_manually(project.tracking, "dog", 1, "x"), "champion already"),
        (lambda: rollback(project.tracking, "cow", "x"), "no concept 'cow'"),
    ]:
        with pytest.raises(SvdiffError, match=message):
            action()
    assert aliases_of(project.tracking, "dog") == {"champion": 1}


@pytest.mark.slow
def test_a_deleted_predecessor_cannot_come_back(project: Project) -> None:
    project.register(value=1, identity=0.5)
    project.register(value=2, identity=0.6)
    project.tracking.client.delete_model_version("dog", "1")
    with pytest.raises(SvdiffError, match="no version 1"):
        rollback(project.tracking, "dog", "x")
    assert champion_of(project.tracking, "dog") == 2


@pytest.mark.slow
def test_a_champion_whose_scores_are_lost_does_not_stop_a_registration(project: Project) -> None:
    first = project.register(value=1, identity=0.5)
    for file in (project.root / "mlruns").rglob(f"{first.run_id}/artifacts/scores/*"):
        file.unlink()
    second = project.register(value=2, identity=0.6)
    assert not second.decision.promoted
    assert "cannot be read" in second.decision.reason

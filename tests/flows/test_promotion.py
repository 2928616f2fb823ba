"""The written rule, and what hands may do beside it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniature import Project

from flows.pipeline.results import Scores
from flows.registry.overrides import promote_manually, rollback
from flows.registry.promotion import aliases_of, champion_of, judge
from svdiff.config import PromoteConfig
from svdiff.errors import SvdiffError

RULE = PromoteConfig(image_margin=1 / 64, text_margin=1 / 32)  # exact in binary


def scores(image: list[float], text: list[float], *, evaluators: str = '{"clip": 1}', first_seed: int = 0) -> Scores:
    rows = [f"p,{first_seed + i},trained,{a},{b}" for i, (a, b) in enumerate(zip(image, text, strict=True))]
    rows.append("p,0,base,0.9,0.9")  # the untrained base never takes part
    return Scores.parse("\n".join(["prompt,seed,model,image_alignment,text_alignment", *rows]), evaluators)


@pytest.mark.parametrize(
    ("image", "text", "promoted"),
    [
        (2 / 64, 0, True),  # better by more than the margin
        (0.5 / 64, 0, False),  # better, but not by the margin
        (1 / 64, 0, False),  # exactly the margin is not more than it
        (2 / 64, -1 / 32, True),  # text worse by just what is tolerated
        (2 / 64, -1.5 / 32, False),  # text too much worse
        (-2 / 64, 0.5, False),  # text alone does not promote
    ],
)
def test_margins(image: float, text: float, promoted: bool) -> None:
    champion = scores([0.5, 0.25, 0.75], [0.25, 0.5, 0.25])
    challenger = scores([0.5 + image, 0.25 + image, 0.75 + image], [0.25 + text, 0.5 + text, 0.25 + text])
    decision = judge(challenger, champion, RULE)
    assert decision.promoted == promoted, decision.reason
    assert "3 pictures" in decision.reason


def test_only_pictures_in_common_count() -> None:
    """The challenger's extra, easy seeds must not carry it over the champion."""
    champion = scores([0.5, 0.5], [0.3, 0.3])
    challenger = scores([0.4, 0.4, 0.9, 0.9, 0.9], [0.3] * 5)
    assert not judge(challenger, champion, RULE).promoted
    assert judge(scores([0.9], [0.3], first_seed=7), champion, RULE).reason.startswith("not comparable: no prompt")


def test_other_evaluators_are_not_compared() -> None:
    decision = judge(scores([0.9], [0.9], evaluators='{"clip": 2}'), scores([0.1], [0.1]), RULE)
    assert not decision.promoted
    assert "other evaluators" in decision.reason


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1, allow_nan=False)] * 4), min_size=1, max_size=8))
def test_two_versions_never_both_beat_each_other(rows: list[tuple[float, float, float, float]]) -> None:
    """Promotion cannot go round in circles between two versions, whatever their scores."""
    a = scores([row[0] for row in rows], [row[1] for row in rows])
    b = scores([row[2] for row in rows], [row[3] for row in rows])
    assert not (judge(a, b, RULE).promoted and judge(b, a, RULE).promoted)


def test_missing_column_is_named() -> None:
    with pytest.raises(SvdiffError, match="text_alignment"):
        Scores.parse("prompt,seed,image_alignment\np,0,0.5")


def test_champions_challengers_and_the_way_back(project: Project) -> None:
    """A concept's life: first, worse, better, rolled back, scored anew, promoted by hand."""
    tags = lambda number: project.tracking.client.get_model_version("dog", str(number)).tags  # noqa: E731
    project.register(value=1, image=0.5)
    worse = project.register(value=2, image=0.4)
    assert not worse.decision.promoted
    assert worse.role == "challenger"
    assert aliases_of(project.tracking, "dog") == {"champion": 1, "challenger": 2}
    assert "image alignment -0.1000 (not above" in tags(2)["promotion_reason"]

    better = project.register(value=3, image=0.6)
    assert better.decision.promoted
    assert aliases_of(project.tracking, "dog") == {"champion": 3, "challenger": 2}
    assert tags(3)["previous_champion"] == "1"
    assert "+0.1000 (above" in tags(3)["promotion_reason"]

    assert rollback(project.tracking, "dog", "smears on red") == (3, 1)
    assert champion_of(project.tracking, "dog") == 1
    assert "smears on red" in tags(3)["rolled_back"]
    repeated = project.register(value=3, image=0.6)
    assert repeated.role == "neither champion nor challenger"
    assert repeated.decision.reason == "rolled back to version 1: smears on red"
    again = project.register(value=3, image=0.7)
    assert not again.decision.promoted
    assert "rolled back" in again.decision.reason
    assert champion_of(project.tracking, "dog") == 1

    assert promote_manually(project.tracking, "dog", 3, "was the scanner") == 3
    assert champion_of(project.tracking, "dog") == 3
    assert "rolled_back" not in tags(3)
    assert tags(3)["promotion_reason"] == "by hand: was the scanner"
    assert aliases_of(project.tracking, "dog") == {"champion": 3, "challenger": 2}


def test_hands_are_told_what_cannot_be(project: Project) -> None:
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


def test_a_deleted_predecessor_cannot_come_back(project: Project) -> None:
    project.register(value=1, image=0.5)
    project.register(value=2, image=0.6)
    project.tracking.client.delete_model_version("dog", "1")
    with pytest.raises(SvdiffError, match="no version 1"):
        rollback(project.tracking, "dog", "x")
    assert champion_of(project.tracking, "dog") == 2


def test_a_champion_whose_scores_are_lost_does_not_stop_a_registration(project: Project) -> None:
    first = project.register(value=1, image=0.5)
    for file in (project.root / "mlruns").rglob(f"{first.run_id}/artifacts/scores/*"):
        file.unlink()
    second = project.register(value=2, image=0.6)
    assert not second.decision.promoted
    assert "cannot be read" in second.decision.reason

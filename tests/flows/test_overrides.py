"""Retired and back: no alias, not listed, never promoted by the rule meanwhile, and everything as it was after the undo."""

from __future__ import annotations

import pytest
from miniature import Project

from flows.registry.concepts import find, list_concepts, read_concept
from flows.registry.overrides import promote_manually, reinstate, retire, rollback
from flows.registry.promotion import aliases_of, champion_of
from svdiff.errors import SvdiffError


def test_a_retired_concept_comes_back_as_it_was(project: Project) -> None:
    project.register(value=1, identity=0.5)
    project.register(value=2, identity=0.4)
    project.register("dog2")
    assert retire(project.tracking, "dog", None, "no longer sold") == ["challenger", "champion"]
    assert aliases_of(project.tracking, "dog") == {}
    assert [e.concept for e in list_concepts(project.tracking)] == ["dog2"]
    [entry, _] = list_concepts(project.tracking, retired=True)
    assert "no longer sold" in entry.retired

    again = project.register(value=3, identity=0.9)  # better than everything, and still out of use
    assert not again.decision.promoted
    assert "retired" in again.decision.reason
    assert aliases_of(project.tracking, "dog") == {}
    with pytest.raises(SvdiffError, match="'dog' is retired"):
        promote_manually(project.tracking, "dog", 3, "x")
    with pytest.raises(SvdiffError, match="'dog' is retired"):
        retire(project.tracking, "dog", None, "x")

    assert reinstate(project.tracking, "dog", None) == ["challenger", "champion"]
    assert aliases_of(project.tracking, "dog") == {"champion": 1, "challenger": 2}
    assert read_concept(project.tracking, "dog").tags == {}
    with pytest.raises(SvdiffError, match="'dog' is not retired"):
        reinstate(project.tracking, "dog", None)


@pytest.mark.slow
def test_a_retired_version_is_passed_by(project: Project) -> None:
    for value in (1, 2, 3):
        assert project.register(value=value, identity=0.3 + 0.1 * value).decision.promoted
    assert retire(project.tracking, "dog", 2, "licence of a picture") == []
    assert rollback(project.tracking, "dog", "smears") == (3, 1)  # 2 was next, but is out of use
    assert project.tracking.client.get_model_version("dog", "1").tags["promotion_reason"].endswith("smears")
    with pytest.raises(SvdiffError, match="version 2 of 'dog' is retired"):
        promote_manually(project.tracking, "dog", 2, "x")

    assert retire(project.tracking, "dog", 1, "too") == ["champion"]
    assert champion_of(project.tracking, "dog") is None
    assert project.register(value=4, identity=0.4).decision.promoted  # there is no champion to compare with
    assert reinstate(project.tracking, "dog", 1) == []  # the alias is somebody else's by now
    assert champion_of(project.tracking, "dog") == 4


def test_versions_by_name_number_and_alias(project: Project) -> None:
    project.register(value=1, identity=0.5)
    project.register(value=2, identity=0.4)
    found = [find(project.tracking, which).version for which in ("dog", "dog@2", "dog@challenger")]
    assert [int(number) for number in found] == [1, 2, 2]
    with pytest.raises(SvdiffError, match="has no version '7'; there are: 1, 2, challenger, champion"):
        find(project.tracking, "dog@7")


@pytest.mark.slow
def test_scores_against_other_pictures_are_not_compared(project: Project) -> None:
    """Image alignment with five pictures says nothing about image alignment with four others."""
    project.register(value=1, identity=0.5)
    folder = project.root / "data/concepts/dog"
    folder.mkdir(parents=True)
    (folder / "new.png").write_bytes(b"another picture")
    done = project.register(value=2, identity=0.9)
    assert not done.decision.promoted
    assert "scored with other pictures" in done.decision.reason

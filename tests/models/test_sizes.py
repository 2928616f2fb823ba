"""Real sizes on the meta device: parameters as published, shifts as the documentation lists them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from svdiff.cli.spectral import app
from svdiff.errors import SvdiffError
from svdiff.models.sizes import build, known_sizes
from svdiff.spectral import select
from svdiff.spectral.subsets import ROLES, subset_sizes, subsets_of

PARAMETERS = {  # as published, in millions
    "sd15": 859.5,
    "sdxl": 2567.5,
    "sd3.5-medium": 2243.2,
    "sd3.5-large": 8056.6,
    "flux": 11901.4,
}
DOCS = Path(__file__).parents[2] / "docs/models.md"


def slowly(bases: Iterable[str]) -> list[Any]:
    """A UNet and a transformer are fast."""
    return [pytest.param(base, marks=() if base in ("sd15", "flux") else pytest.mark.slow) for base in bases]


@pytest.mark.parametrize("base", slowly(PARAMETERS))
def test_parameters_are_those_published(base: str) -> None:
    counted = sum(p.numel() for p in build(base).parameters()) / 1e6
    assert counted == pytest.approx(PARAMETERS[base], rel=2e-3)


def rows(base: str) -> list[dict]:
    done = CliRunner().invoke(app, ["subsets", "--base", base, "--text-encoder", "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.parametrize("base", slowly(known_sizes()))
def test_subsets_of_a_well_known_base_as_the_documentation_lists_them(base: str) -> None:
    """The whole network first, each subset a part of it."""
    found = rows(base)
    assert found[0]["name"] == ("UNet" if base in ("sd15", "sdxl") else "all")
    assert all(0 < row["shifts"] < found[0]["shifts"] for row in found[1:] if not row["name"].startswith("text"))
    listed = re.search(rf"^\| {re.escape(base)} \|(.*)\|$", DOCS.read_text(), re.M)
    assert listed, f"{base} is not in {DOCS.name}"
    assert f"| {found[0]['tensors']:,} | {found[0]['shifts']:,} |" in listed[0]
    for row in found[1:]:
        assert f"{row['name']} {row['shifts']:,}" in DOCS.read_text(), (base, row)


@pytest.mark.parametrize("base", slowly(["sd15", "sdxl", "sd3.5-large", "flux", "flux2"]))
def test_roles_divide_a_network(base: str) -> None:
    """Depths are disjoint and hold nearly everything; attention and feed-forward do not overlap."""
    network = build(base)
    chosen = {role: set(select(network, role)) for role in ROLES}
    assert chosen["all"] == set(select(network, "UNet"))
    assert not chosen["attention"] & chosen["feed-forward"]
    depths = [chosen[role] for role in ("early", "middle", "late")]
    assert all(depths)
    assert sum(map(len, depths)) == len(set().union(*depths)) > 0.9 * len(chosen["all"]) - 20
    assert subsets_of(network)[0] == ("UNet" if "sd15" in base or "xl" in base else "all")


def test_a_subset_by_role_of_a_transformer_counts_its_shifts() -> None:
    network = build("flux")
    assert subset_sizes(network, "norms", prefix="transformer").shifts == (19 * 4 + 38 * 2) * 128
    with pytest.raises(SvdiffError, match="Use one of all, attention"):
        select(network, "UNet-4D")


def test_a_name_that_is_no_base_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        SvdiffError, match=r"'sd3\.5' is no folder here and no Hub id, .* sd3\.5-medium, sd3\.5-large, flux"
    ):
        build("sd3.5")


def test_a_part_that_is_not_there_is_refused() -> None:
    with pytest.raises(SvdiffError, match="no size of 'text_encoder' is known for flux2"):
        build("flux2", "text_encoder")

"""Keeping two identities apart: pictures composed of real concepts whose answer is known, and the stage's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_parts import PLAIN, SEEDS, drawing
from PIL import Image, ImageDraw

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation.pairs import Nearness, likeness, reference, score_regions, separation
from svdiff.evaluation.regions import cut_out, find_two, foreground
from svdiff.evaluation.score import score

ROOT = Path(__file__).parents[2]
SIDE = 64


def beside(left: Image.Image, right: Image.Image, background: str = "white", gap: int = 2) -> Image.Image:
    """Two cut-outs side by side on a plain background, as the base draws pairs."""
    picture = Image.new("RGB", (SIDE, SIDE), background)
    for thing, x in ((left, 0), (right, SIDE // 2 + gap // 2)):
        side = SIDE // 2 - gap // 2
        small = thing.resize((side, side), Image.Resampling.LANCZOS)
        mask = Image.fromarray(np.asarray(small).min(axis=2) < 235)  # cut-outs are on white
        picture.paste(small, (x, SIDE // 4), mask)
    return picture


@pytest.fixture(params=["drawn", "real"])
def subjects(request: pytest.FixtureRequest) -> tuple[list[Image.Image], list[Image.Image]]:
    """Five pictures each of two individuals by different artists, or of two drawings."""
    if request.param == "drawn":
        return [drawing("crimson", seed=i) for i in range(5)], [drawing("seagreen", seed=i) for i in range(5)]
    folders = [ROOT / "data/concepts" / name for name in ("green-cat", "bearded-man")]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("needs `dvc pull data.dvc`")
    first, second = ([Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))] for folder in folders)
    return first, second


def test_two_true_subjects_are_apart_and_twins_and_blends_are_not(subjects) -> None:
    first, second = subjects
    a, b = [cut_out(p) for p in first], [cut_out(p) for p in second]
    blend = [Image.blend(x, y, 0.5) for x, y in zip(a, b, strict=True)]
    references = reference(first, PLAIN, SIDE), reference(second, PLAIN, SIDE)
    true = [beside(x, y, colour) for x, y, colour in zip(a, b, ("white", "pink", "lightblue"), strict=False)]
    true += [beside(y, x, "khaki") for x, y in zip(a[3:], b[3:], strict=True)]  # the other way round
    scores = score_regions(true, references, PLAIN)
    assert (scores["regions"] == 2).all()
    assert (scores["both_identified"] == 1).all()
    assert scores["separation"].min() > 0.4
    assert (scores["likeness_first"].iloc[:3] > 0).all()
    assert (scores["likeness_first"].iloc[3:] < 0).all()

    twins = score_regions([beside(x, x) for x in a] + [beside(y, y) for y in b], references, PLAIN)
    assert (twins["regions"] == 2).all()
    assert (twins["both_identified"] == 0).all()
    assert twins["separation"].max() < -0.4
    blended = score_regions([beside(x, x) for x in blend], references, PLAIN)
    assert blended["separation"].abs().max() < 0.5 * scores["separation"].min()
    assert blended["separation"].mean() < scores["separation"].min()
    # The identity of each is seen as well: a subject that is not there lowers its alignment.
    assert (scores["image_alignment_second"].mean() - twins["image_alignment_second"].iloc[:5].mean()) > 0
    assert scores["identity_second"].min() > twins["identity_second"].iloc[:5].max()
    assert scores["clip_i"].mean() > twins["clip_i"].mean()
    assert scores["image_alignment"].mean() > blended["image_alignment"].mean()


def test_one_subject_is_not_two(subjects) -> None:
    first, second = subjects
    references = reference(first, PLAIN, SIDE), reference(second, PLAIN, SIDE)
    alone = [picture.resize((SIDE, SIDE)) for picture in (*first, *second)]
    scores = score_regions(alone, references, PLAIN)
    assert (scores["regions"] == 1).all()
    assert (scores["separation"] <= 0).all()
    assert (scores["both_identified"] == 0).all()
    empty = score_regions([Image.new("RGB", (SIDE, SIDE), "pink")], references, PLAIN)
    assert (empty["regions"].item(), empty["both_identified"].item()) == (1, 0)


def disc(picture: Image.Image, x: int, y: int, r: int, colour: str) -> None:
    ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=colour)


def two_discs(dx: int, dy: int, background: str = "white") -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), background)
    disc(picture, 32 - dx, 32 - dy, 14, "crimson")
    disc(picture, 32 + dx, 32 + dy, 14, "navy")
    return picture


@pytest.mark.parametrize(("dx", "dy"), [(16, 0), (14, 3), (0, 16), (13, 8), (8, 14)])
def test_two_regions_are_found_side_by_side_above_each_other_and_touching(dx: int, dy: int) -> None:
    regions = find_two(two_discs(dx, dy))
    assert regions.found == 2
    for thing, colour in ((regions.first, "crimson"), (regions.second, "navy")):
        seen = np.asarray(thing)[28:36, 28:36].reshape(-1, 3).mean(axis=0)
        expected = np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]
        assert np.abs(seen - expected).max() < 30


def test_soft_noisy_and_stitched_backgrounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = two_discs(16, 0, "pink")
    noisy = np.asarray(clean, np.int16) + np.random.default_rng(0).integers(-15, 16, (SIDE, SIDE, 3))
    noisy_picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    difference = foreground(clean) ^ foreground(noisy_picture)
    assert difference.mean() < 0.02
    assert find_two(noisy_picture).found == 2
    stitched = two_discs(16, 0, "pink")
    right = two_discs(16, 0, "khaki").crop((32, 0, 64, 64))
    stitched.paste(right, (32, 0))
    assert (foreground(stitched) ^ foreground(two_discs(16, 0))).mean() < 0.02
    assert find_two(stitched).found == 2


def test_likeness_is_one_for_the_real_subject_on_average_and_minus_one_for_the_other() -> None:
    random = np.random.default_rng(1)

    def cloud(centre: np.ndarray, count: int) -> np.ndarray:
        points = centre + 0.3 * random.standard_normal((count, 8))
        return points / np.linalg.norm(points, axis=1, keepdims=True)

    centres = random.standard_normal((2, 8))

    def like(things: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return likeness(Nearness(*(a @ b.T for a, b in (
            (things, first), (things, second), (first, first), (second, second), (first, second)
        ))))  # fmt: skip

    first, second = cloud(centres[0], 400), cloud(centres[1], 300)
    more = cloud(centres[0], 400), cloud(centres[1], 400)
    assert like(more[0], first, second).mean() == pytest.approx(1, abs=0.05)
    assert like(more[1], first, second).mean() == pytest.approx(-1, abs=0.05)
    np.testing.assert_allclose(like(more[0], first, second), -like(more[0], second, first), atol=1e-12)
    with pytest.raises(SvdiffError, match="cannot be measured"):
        like(more[0], first[:1], first[:1])


def test_separation_is_of_the_less_distinct_thing_in_the_better_assignment() -> None:
    assert separation((1.0, -1.0)) == separation((-1.0, 1.0)) == 1.0
    assert separation((0.9, -0.2)) == pytest.approx(0.2)
    assert separation((0.9, 0.4)) == pytest.approx(-0.4)
    assert separation((-0.3, -0.8)) == pytest.approx(-0.3)
    assert separation((0.0, 0.0)) == 0.0


def test_scores_of_the_stage(checkout: Path, config: Config) -> None:
    pair = Config.model_validate(config.model_dump() | {"pairs": {"both": {"concepts": ["red-dog", "green-cat"]}}})
    draw: dict[str, Callable[[int], Image.Image]] = {
        "trained": lambda seed: beside(drawing("crimson", seed=seed), drawing("seagreen", seed=seed), "lightblue"),
        "base": lambda seed: beside(drawing("goldenrod", seed=seed), drawing("goldenrod", seed=seed), "lightblue"),
    }
    rows = []
    for model, picture in draw.items():
        (checkout / "out/sample/both" / model).mkdir(parents=True)
        for index, prompt in enumerate(pair.sample_prompts("both")):
            for seed in SEEDS:
                file = f"{model}/p{index:02d}-s{seed:04d}.png"
                picture(seed).save(checkout / "out/sample/both" / file)
                rows.append({"file": file, "model": model, "prompt": prompt, "prompt_index": index, "seed": seed})
    pd.DataFrame(rows).to_csv(checkout / "out/sample/both/images.csv", index=False)
    folder = score(pair, "both", evaluators=PLAIN)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["both_identified"] == 1
    assert metrics["base_both_identified"] < 1
    assert metrics["separation_gain"] > metrics["separation_gain_low"] > 0
    assert metrics["image_gain"] > 0
    halves = metrics["image_alignment_first"], metrics["image_alignment_second"]
    assert metrics["image_alignment"] == pytest.approx(sum(halves) / 2, abs=1e-5)
    table = pd.read_csv(folder / "images.csv")
    assert {"image_alignment", "text_alignment", "image_alignment_first", "separation"} <= set(table.columns)
    assert set(table["first"]) == {"red-dog"}
    assert (folder / "evaluators.json").is_file()
    samples = pd.read_csv(checkout / "out/sample/both/images.csv")
    samples["prompt"] = "a sks cat"
    samples.to_csv(checkout / "out/sample/both/images.csv", index=False)
    with pytest.raises(SvdiffError, match="names 1 subjects"):
        score(pair, "both", evaluators=PLAIN)

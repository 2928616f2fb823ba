"""The rule of the re-evaluation: what a champion's scores of today say, compared with its baseline.

In the order in which it is asked:

1. The delta is not in the registry, cannot be read, is not the one that was registered (SHA-256), or the base at hand
   is not the one that it was trained on: **broken artifact**.
2. The conditions (evaluators, prompts and seeds, sampler, the concept's pictures: `flows.registry.conditions`) are not those
   of the baseline, or there is no baseline, or a person accepts today's scores: **evaluator or prompts changed**. The scores
   of today become the baseline; nothing is alarming about it.
3. Image or text alignment changed by more than `image_tolerance` or `text_tolerance` (`reevaluate` in params.yaml), in
   the mean of |change| over pictures paired by prompt and seed: **drift**. Better scores are drift as well: with nothing
   changed that should change them, they say that something else did, such as a library, a part of the base that
   deltas do not name (autoencoder, text encoder, scheduler), or the machine.
4. Otherwise: **unchanged**.

Seeds fix the noise and DDIM adds none, so on one machine with the same libraries the change is zero, but for the six
decimals that scores are stored with. The baseline stays until the conditions change, so that slow drift adds up instead of
hiding in a chain of small steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from svdiff.config import ReevaluateConfig

if TYPE_CHECKING:
    import pandas as pd


class Verdict(StrEnum):
    """What became of a champion."""

    UNCHANGED = "unchanged"
    NEW_BASELINE = "evaluator or prompts changed"
    DRIFT = "drift"
    BROKEN = "broken artifact"

    @property
    def alarming(self) -> bool:
        """Whether somebody should look."""
        return self in (Verdict.DRIFT, Verdict.BROKEN)


@dataclass(frozen=True)
class Judgement:
    """A verdict in words, and the changes that it rests on: means of |change| a picture, None without a comparison."""

    verdict: Verdict
    reason: str
    image_change: float | None = None
    text_change: float | None = None


def compare(today: pd.DataFrame, baseline: pd.DataFrame, rule: ReevaluateConfig) -> Judgement:
    """Parts 3 and 4: scores by (prompt, seed) with columns `image_alignment` and `text_alignment`, under the same conditions."""
    change = (today - baseline.reindex(today.index)).abs().mean(skipna=False)
    image, text = float(change["image_alignment"]), float(change["text_alignment"])
    # Written so that a score which is no number is no "unchanged".
    unchanged = image <= rule.image_tolerance and text <= rule.text_tolerance
    return Judgement(
        Verdict.UNCHANGED if unchanged else Verdict.DRIFT,
        f"image alignment changed by {image:.6f} (tolerance {rule.image_tolerance:g}), text alignment by {text:.6f} "
        f"(tolerance {rule.text_tolerance:g}), in the mean over {len(today)} pictures",
        image,
        text,
    )


def new_baseline(parts: Sequence[str] | None, *, accepted: bool = False) -> Judgement:
    """Part 2: `parts` of the conditions that changed, None if there was no baseline at all."""
    if accepted:
        why = "accepted by hand"
    elif parts is None:
        why = "no baseline was on record"
    else:
        why = f"{' and '.join(parts)} changed"
    return Judgement(Verdict.NEW_BASELINE, f"{why}; these scores are the baseline now")

"""Which delta of a training is kept, and when it stops early: rules on the losses of its validations.

The loss is Eq. 1 on the validation pictures at fixed noise that training never sees, see `Trainer.fixed_noise_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping


def best_step(losses: Mapping[int, float]) -> int:
    """The validated step with the lowest loss, the earliest of equal ones; step 0, the base, is no training."""
    return min((step for step in losses if step > 0), key=lambda step: (losses[step], step))


def is_over(losses: Mapping[int, float], patience: int | None) -> bool:
    """Whether the last `patience` validations were all no better than the best before them."""
    steps = sorted(step for step in losses if step > 0)
    if patience is None or len(steps) <= patience:
        return False
    return best_step(losses) not in steps[-patience:]


def kept_steps(losses: Mapping[int, float], last: int) -> set[int]:
    """Steps whose deltas are kept: the best and the last ones."""
    steps = sorted(step for step in losses if step > 0)
    return {best_step(losses), *steps[-last:]} if steps else set()

"""How many threads the library computes with on a CPU."""

from __future__ import annotations

import os
import sys


def use_threads(count: int | None) -> None:
    """Compute with `count` threads, however many cores there are; None leaves it to torch and the environment.

    The order in which threads add up decides the last digits of a sum, and so of every figure. Before torch is imported this
    does without it.
    """
    if count is None:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    os.environ["MKL_DYNAMIC"] = "FALSE"  # MKL uses fewer where it finds fewer cores
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)

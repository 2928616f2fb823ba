"""Identity of work that is kept in the scratch folder, so that what is kept is never taken for something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdiff.config import Config
from svdiff.files import sha256_file, sha256_tree

PACKAGE = Path(__file__).parents[1]


def key(config: Config, code: Sequence[str] = ("**/*.py",), **parts: Any) -> str:
    """Hash of the base, the evaluators, the code, and `parts` (what JSON can say): everything that results depend on.

    `code` names the files of this package that count, as patterns; default all.
    """
    base = Path(config.base.model)
    weights = (config.evaluators.clip_model.removeprefix("local-dir:"), config.evaluators.lpips_weights)
    everything = parts | {
        "base": sha256_tree(base) if base.is_dir() else config.base.model_dump(),
        "evaluators": config.evaluators.model_dump(mode="json"),
        "evaluator_weights": [sha256_tree(path) for path in weights if path and Path(path).exists()],
        "code": [sha256_file(path) for pattern in code for path in sorted(PACKAGE.glob(pattern))],
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

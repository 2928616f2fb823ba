"""Which stages of dvc.yaml lead from pictures to a registered version, in order: `--single-item` looks at none upstream."""

from __future__ import annotations

from svdiff.config import Config


def prior_stages(config: Config, name: str) -> list[str]:
    """Prior images of the classes that a concept or pair needs; other names may share them."""
    words = dict.fromkeys(concept.class_word for concept in config.entry(name).concepts.values())
    return [f"prior@{word}" for word in words]


def own_stages(config: Config, name: str) -> list[str]:
    """Stages of one concept or pair alone, after its prior images. Raises SvdiffError for an unknown name."""
    if config.entry(name).kind == "pair":
        kinds = ["mix", "train-pair", "sample-pair", "score-pair", "register-pair"]
    else:
        kinds = ["train", "sample", "score", "register"]
    return [f"{kind}@{name}" for kind in kinds]


def analysis_stages(config: Config) -> list[str]:
    """Stages that look at everything together."""
    return ["correlate", *(f"rank@{concept}" for concept in config.rank.concepts), "report"]

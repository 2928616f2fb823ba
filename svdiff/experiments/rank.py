"""Stage `rank`: what a concept keeps when its shifts are limited to rank k *during training* (Fig. 25).

For each rank, and for the full rank, the concept is trained anew and samples its training prompt
("reconstruction") and an edited one ("edit") at fixed seeds. The paper's finding: rank 1 still reconstructs,
details of edits need more.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from PIL import Image

from svdiff.config import Config
from svdiff.data.concepts import concept_folder, load_concept_images, to_square
from svdiff.evaluation import plots
from svdiff.evaluation.alignment import MEASURES
from svdiff.experiments.cells import Cell, Runner
from svdiff.files import atomic_dir
from svdiff.sampling.images import Job

RANKS = Path("out/rank")
STRIP_SEEDS = 2  # pictures a prompt and rank in the strip; all are scored


def rank(config: Config, concept: str, output: Path | None = None) -> Path:
    """Train, sample and score each of `rank.ranks` and the full rank.

    Args:
        config: params.yaml; section `rank` says which ranks, steps, prompts and seeds.
        concept: any concept of it.
        output: gets ranks.csv (a row a rank and kind of prompt: rank, prompt_kind, means of the scores over `rank.seeds`),
            strip.png with the pictures and curve.png with the numbers. Default: out/rank/<concept> for `rank.concepts`, which
            the pipeline reports; pictures/rank-<concept> for others.

    Raises:
        SvdiffError: as training, sampling and scoring do.
    """
    stage = concept in config.rank.concepts
    output = output or (RANKS / concept if stage else Path("pictures") / f"rank-{concept}")
    table = Runner(config).run(cells(config, concept))
    subject = config.concept(concept).subject
    kinds = {text.format(subject=subject): kind for kind, text in config.rank.prompts.items()}
    table["prompt_kind"] = table["prompt"].map(kinds)
    means = table.groupby(["rank", "prompt_kind"], sort=False)[list(MEASURES)].mean().reset_index()
    with atomic_dir(output) as folder:
        means.to_csv(folder / "ranks.csv", index=False, float_format="%.6f")
        plots.save(plots.rank_curve(means), folder / "curve.png")
        plots.save(_strip(config, concept, table), folder / "strip.png")
    return output


def cells(config: Config, concept: str) -> list[Cell]:
    """A cell a rank, with the pictures of all prompts."""
    subject, settings = config.concept(concept).subject, config.rank
    limits = {str(limit): limit for limit in sorted(set(settings.ranks))} | {"full": None}
    jobs = [Job(text.format(subject=subject), seed) for text in settings.prompts.values() for seed in settings.seeds]
    trained = {"method": "svdiff", "steps": settings.steps}
    return [Cell({"rank": label}, config, concept, trained | {"rank": limit}, jobs) for label, limit in limits.items()]


def _strip(config: Config, concept: str, table: pd.DataFrame) -> plots.Figure:
    """Fig. 25: a column a rank, training pictures before them; a row a prompt and seed."""
    training = load_concept_images(concept_folder(concept))
    shown = table[table["seed"].isin(config.rank.seeds[:STRIP_SEEDS])]
    rows: list[list[Image.Image]] = []
    labels = []
    for (kind, seed), cells_of_row in shown.groupby(["prompt_kind", "seed"], sort=False):
        pictures = [Image.open(path).convert("RGB") for path in cells_of_row["path"]]
        rows.append([to_square(training[len(rows) % len(training)].image, pictures[0].width), *pictures])
        labels.append(f"{kind}, seed {seed}")
    ranks = [label if label == "full" else f"rank {label}" for label in table["rank"].unique()]
    return plots.captioned_grid(rows, labels, ["training picture", *ranks], cell=1.1)

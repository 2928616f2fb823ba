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
from svdiff.data.prior import prior_folder
from svdiff.evaluation import plots
from svdiff.evaluation.alignment import align, without_token
from svdiff.evaluation.evaluators import load_evaluators
from svdiff.evaluation.kept import key
from svdiff.files import atomic_dir, sha256_tree
from svdiff.models import load_pipeline, scratch

RANKS = Path("out/rank")
STRIP_SEEDS = 2  # pictures a prompt and rank in the strip; all are scored


def rank(config: Config, concept: str) -> Path:
    """Train, sample and score each of `rank.ranks` and the full rank into out/rank/<concept>.

    ranks.csv has one row a rank and kind of prompt: rank, prompt_kind, text_alignment, image_alignment,
    clip_i (means over `rank.seeds`); strip.png shows the pictures, curve.png the numbers. A finished rank is
    kept in the scratch folder and not made again after a kill.

    Raises:
        SvdiffError: as training, sampling and scoring do.
    """
    training = load_concept_images(concept_folder(concept))
    work = scratch() / "rank" / f"{concept}-{_key(config, concept)[:16]}"
    limits = [*sorted(set(config.rank.ranks)), None]
    finished = {_label(limit): _one_rank(config, concept, limit, work) for limit in limits}
    table = pd.concat([pd.read_csv(folder / "scores.csv", dtype={"rank": str}) for folder in finished.values()])
    means = table.groupby(["rank", "prompt_kind"], sort=False)[["text_alignment", "image_alignment", "clip_i"]].mean()
    means = means.reset_index()
    with atomic_dir(RANKS / concept) as folder:
        means.to_csv(folder / "ranks.csv", index=False, float_format="%.6f")
        plots.save(plots.rank_curve(means), folder / "curve.png")
        plots.save(_strip(config, [picture.image for picture in training], finished), folder / "strip.png")
    return RANKS / concept


def _label(limit: int | None) -> str:
    return "full" if limit is None else str(limit)


def _one_rank(config: Config, concept: str, limit: int | None, work: Path) -> Path:
    """The finished folder of one rank (pictures and scores.csv), made unless it is there."""
    final = work / f"rank-{_label(limit)}"
    if final.is_dir():
        return final
    from svdiff.sampling import Job, sample_images
    from svdiff.spectral import SpectralPipeline
    from svdiff.training import train

    settings = config.rank
    # An analysis is not a training that anybody follows: no live curve, pictures only at its ends.
    quiet = config.model_copy(update={"tracking": config.tracking.model_copy(update={"live": "none"})})
    overrides = {"method": "svdiff", "rank": limit, "steps": settings.steps, "validate_every": settings.steps}
    delta = train(quiet, concept, out_dir=work / f"train-{_label(limit)}", overrides=overrides)

    personal = SpectralPipeline(load_pipeline(config.base), cache=scratch() / "bases")
    personal.load_delta(delta, concept)
    personal.set_deltas({concept: 1.0})
    subject = config.concept(concept)
    rows = pd.DataFrame(
        [
            {
                "rank": _label(limit),
                "prompt_kind": kind,
                "prompt": text.format(subject=subject.subject),
                "seed": seed,
            }
            for kind, text in settings.prompts.items()
            for seed in settings.seeds
        ]
    )
    pictures = sample_images(
        personal.pipe,
        [Job(prompt, seed) for prompt, seed in zip(rows["prompt"], rows["seed"], strict=True)],
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        eta=config.sample.eta,
        batch_size=config.sample.batch_size,
        progress=f"sample {concept} (rank {_label(limit)})",
    )
    scores = align(
        pictures,
        [without_token(prompt, subject.token) for prompt in rows["prompt"]],
        [picture.image for picture in load_concept_images(concept_folder(concept))],
        load_evaluators(config.evaluators),
    )
    with atomic_dir(final) as folder:
        pd.concat([rows, scores], axis=1).to_csv(folder / "scores.csv", index=False)
        for picture, kind, seed in zip(pictures, rows["prompt_kind"], rows["seed"], strict=True):
            picture.save(folder / _file(kind, seed))
    return final


def _file(kind: str, seed: int) -> str:
    return f"{kind}-s{seed:04d}.png"


def _strip(config: Config, training: list[Image.Image], finished: dict[str, Path]) -> plots.Figure:
    """Fig. 25: a column a rank, training pictures before them; a row a prompt and seed."""
    rows: list[list[Image.Image]] = []
    labels = []
    for kind in config.rank.prompts:
        for seed in config.rank.seeds[:STRIP_SEEDS]:
            pictures = [Image.open(folder / _file(kind, seed)).convert("RGB") for folder in finished.values()]
            rows.append([to_square(training[len(rows) % len(training)], pictures[0].width), *pictures])
            labels.append(f"{kind}, seed {seed}")
    columns = [
        "training picture",
        *(f"rank {label}" if label != "full" else "full rank" for label in finished),
    ]
    return plots.captioned_grid(rows, labels, columns, cell=1.1)


def _key(config: Config, concept: str) -> str:
    """Hash of all that a finished rank depends on."""
    prior = prior_folder(config.concept(concept).class_word)
    return key(
        config,
        train=config.train_config(concept).model_dump(mode="json"),
        subject=config.concept(concept).model_dump(mode="json", exclude={"train"}),
        prior=[config.prior.model_dump(mode="json"), sha256_tree(prior) if prior.is_dir() else None],
        sample=config.sample.model_dump(mode="json", exclude={"prompts", "seeds", "batch_size"}),
        rank=config.rank.model_dump(mode="json", exclude={"concepts", "ranks"}),
        pictures=sha256_tree(concept_folder(concept)),
    )

"""Stage `score`: how well pictures agree with their prompts and with the concept (Fig. 9b).

The evaluators do not know the special token: the text that a picture is held against is its prompt without it
(`a sks dog on a red background` is scored as `a dog on a red background`), for the trained model and for the
untrained base alike. Scores of different evaluators cannot be compared, so `evaluators.json` beside every
score says which model, weights and transform made it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from svdiff.config import Config, EvaluatorsConfig
from svdiff.data.concepts import concept_folder, load_concept_images
from svdiff.errors import SvdiffError
from svdiff.evaluation.alignment import MEASURES, align, load_evaluators, paired_gain, without_token
from svdiff.evaluation.evaluators import lpips_side
from svdiff.files import atomic_dir, sha256_file

SAMPLES = Path("out/sample")
SCORES = Path("out/score")
PAIR = ["prompt_index", "seed"]
TRANSFORM = "RGB, {side} × {side} (Lanczos), in [-1, 1]"


def score(config: Config, concept: str) -> Path:
    """Score `out/sample/<concept>` into `out/score/<concept>`: metrics.json, images.csv and evaluators.json.

    metrics.json holds the means of the trained model (`image_alignment`, `text_alignment`, `clip_i`), those
    of the base on the same prompts and seeds (`base_…`), and the paired gains with their 95 % intervals
    (`image_gain`, `image_gain_low`, `image_gain_high`, likewise `text_gain…` and `clip_i_gain…`).

    Raises:
        SvdiffError: no samples, a picture missing, or pictures of the two models that are not pairs.
    """
    training = [picture.image for picture in load_concept_images(concept_folder(concept))]
    samples = read_samples(SAMPLES / concept)
    token = config.concept(concept).token
    pictures = [Image.open(SAMPLES / concept / file) for file in samples["file"]]
    texts = [without_token(prompt, token) for prompt in samples["prompt"]]
    evaluators = load_evaluators(config.evaluators)
    scored = pd.concat([samples, align(pictures, texts, training, evaluators)], axis=1)
    metrics = summarise(scored, resamples=config.score.bootstrap, seed=config.score.seed)
    with atomic_dir(SCORES / concept) as folder:
        scored.to_csv(folder / "images.csv", index=False, float_format="%.6f")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "evaluators.json").write_text(json.dumps(describe_evaluators(config.evaluators), indent=2) + "\n")
    return SCORES / concept


def read_samples(folder: Path) -> pd.DataFrame:
    """`images.csv` of a sample folder, checked: every picture is there, from the trained model and the base."""
    table = folder / "images.csv"
    if not table.is_file():
        raise SvdiffError(f"{table} not found; sample the concept first: `dvc repro sample@{folder.name}`")
    samples = pd.read_csv(table, dtype={"file": str, "model": str, "prompt": str})
    missing = [file for file in samples["file"] if not (folder / file).is_file()]
    if missing:
        raise SvdiffError(f"{table} names {len(missing)} pictures that are not there, e.g. {missing[0]}; sample again")
    keys = {model: set(rows[PAIR].itertuples(index=False, name=None)) for model, rows in samples.groupby("model")}
    paired = set(keys) == {"trained", "base"} and keys["trained"] == keys["base"]
    if not paired or samples.duplicated(["model", *PAIR]).any():
        raise SvdiffError(
            f"{table}: expected one picture of 'trained' and one of 'base' for each prompt and seed; sample again"
        )
    return samples


def summarise(
    scored: pd.DataFrame, *, resamples: int, seed: int, measures: Sequence[str] = MEASURES
) -> dict[str, float]:
    """Flat numbers of metrics.json from the scored pictures of both models."""
    trained, base = (scored[scored["model"] == model].set_index(PAIR).sort_index() for model in ("trained", "base"))
    metrics: dict[str, float] = {measure: trained[measure].mean() for measure in measures}
    metrics |= {f"base_{measure}": base[measure].mean() for measure in measures}
    for measure in measures:
        name = f"{measure.removesuffix('_alignment')}_gain"
        gain = paired_gain(trained[measure], base[measure], resamples=resamples, seed=seed)
        metrics |= {name: gain.mean, f"{name}_low": gain.low, f"{name}_high": gain.high}
    return {name: round(float(value), 6) for name, value in metrics.items()} | {"pairs": len(trained)}


def describe_evaluators(config: EvaluatorsConfig) -> dict[str, dict[str, Any]]:
    """What must be equal for two scores to be comparable: networks, weights (hash, or the hub's tag), transforms, scale."""
    clip: dict[str, Any] = {"score": "cosine, not scaled"}
    folder = Path(config.clip_model.removeprefix("local-dir:"))
    if folder.is_dir():
        described = json.loads((folder / "open_clip_config.json").read_text())
        weights = sorted(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin", ".pt"})
        clip |= {
            "model": described.get("model_cfg"),
            "weights_sha256": {path.name: sha256_file(path) for path in weights},
            "transform": described.get("preprocess_cfg"),
        }
    else:
        clip |= {
            "model": config.clip_model,
            "weights": config.clip_pretrained,
            "transform": "open_clip's for this model",
        }
    lpips: dict[str, Any] = {"score": "1 − distance, mean over the training pictures", "net": config.lpips_net}
    if config.lpips_weights:
        lpips |= {"weights_sha256": sha256_file(config.lpips_weights), "heads": "none: 1 − cosine, mean over layers"}
    else:
        lpips |= {"weights": "of the lpips package", "heads": "learned"}
    return {"clip": clip, "lpips": lpips | {"transform": TRANSFORM.format(side=lpips_side(config))}}

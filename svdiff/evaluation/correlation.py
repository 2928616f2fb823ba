"""Stage `correlate`: how alike the spectral shifts of different concepts are (Fig. 9a, Fig. 15).

An entry is the cosine of two concepts' shifts in each layer, averaged over the layers. A concept with itself
would always be 1; the paper's diagonal compares two runs of the concept instead, with learning rates of the
1-D weights of 1e-3 and 1e-6. The stage `second-run` makes the second run of `correlate.second_runs`, with
`correlate.lr_1d`; for other concepts the diagonal is blank.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from svdiff.config import Config
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.files import atomic_dir
from svdiff.spectral import SpectralDelta, cosine_similarity
from svdiff.spectral.delta import metadata_key

TRAINED = Path("out/train")
CORRELATION = Path("out/correlate")


def correlate(config: Config) -> Path:
    """Correlate all trained concepts of the configuration into out/correlate: matrix.csv, heatmap.png,
    summary.json.

    Of no concept the matrix is empty, of one it has its diagonal alone. Raises SvdiffError if shifts are not of one base.
    """
    spectral = [name for name in config.concepts if config.train_config(name).method == "svdiff"]
    deltas = {name: SpectralDelta.load(path) for name in spectral if (path := delta_path(name)).is_file()}
    seconds = {name: SpectralDelta.load(path) for name in deltas if (path := second_run_path(name)).is_file()}
    matrix = correlation_matrix(deltas, seconds)
    with atomic_dir(CORRELATION) as folder:
        matrix.to_csv(folder / "matrix.csv", index_label="concept", float_format="%.6f")
        (folder / "summary.json").write_text(json.dumps(summarise(matrix), indent=2) + "\n")
        plots.save(plots.heat_map(matrix, "mean cosine over layers"), folder / "heatmap.png")
    return CORRELATION


def delta_path(concept: str) -> Path:
    """The concept's delta."""
    return TRAINED / concept / "delta.safetensors"


def second_run_path(concept: str) -> Path:
    """The delta of the concept's second run; no entry can have this name."""
    return TRAINED / f"{concept}@second-run" / "delta.safetensors"


def train_second_run(config: Config, concept: str) -> Path:
    """Stage `second-run`: train the concept once more, with another learning rate of the 1-D weights."""
    from svdiff.training import train

    config.concept(concept)
    overrides = {"method": "svdiff", "lr_1d": config.correlate.lr_1d}
    quiet = config.model_copy(update={"tracking": config.tracking.model_copy(update={"live": "none"})})
    return train(quiet, concept, out_dir=second_run_path(concept).parent, overrides=overrides)


def correlation_matrix(
    deltas: dict[str, SpectralDelta], second_runs: dict[str, SpectralDelta] | None = None
) -> pd.DataFrame:
    """Mean layer cosines, rows and columns in the order of `deltas`; the diagonal from `second_runs`, else NaN.

    Concepts whose subsets have no layer in common have NaN as well.
    """
    names, second_runs = list(deltas), second_runs or {}
    matrix = pd.DataFrame(np.nan, index=names, columns=names)
    for row, first in enumerate(names):
        if first in second_runs:
            matrix.loc[first, first] = mean_cosine(deltas[first], second_runs[first], f"two runs of {first}")
        for second in names[row + 1 :]:
            if not share_layers(deltas[first], deltas[second]):
                continue
            cosine = mean_cosine(deltas[first], deltas[second], f"{first} and {second}")
            matrix.loc[first, second] = matrix.loc[second, first] = cosine
    return matrix


def share_layers(a: SpectralDelta, b: SpectralDelta) -> bool:
    """Whether some layer is shifted by both."""
    return bool(a.tensors.keys() & b.tensors.keys())


def mean_cosine(a: SpectralDelta, b: SpectralDelta, pair: str = "the deltas") -> float:
    """Cosine of the two shifts in each layer that both have, averaged over these layers with equal weight.

    Raises:
        SvdiffError: the deltas were trained on different bases, or share no layer.
    """
    for prefix in set(a.prefixes()) & set(b.prefixes()):
        key = metadata_key(prefix, "base_hash")
        left, right = a.metadata.get(key), b.metadata.get(key)
        if left != right:
            raise SvdiffError(
                f"{pair} were trained on different bases ({key} {str(left)[:16]} and {str(right)[:16]}): their "
                "shifts belong to different directions. Fix: train both on one base"
            )
    cosines = cosine_similarity(a, b)
    if not cosines:
        raise SvdiffError(f"{pair} shift no layer in common: train them with subsets that overlap")
    return float(np.mean(list(cosines.values())))


def summarise(matrix: pd.DataFrame) -> dict[str, float | str]:
    """Flat facts of summary.json: the mean between different concepts, the most and least similar pair."""
    rows, columns = np.triu_indices(len(matrix), k=1)
    values = matrix.to_numpy()[rows, columns]
    if np.isnan(values).all():
        return {"concepts": len(matrix), **_two_runs(matrix)}
    most, least = int(np.nanargmax(values)), int(np.nanargmin(values))
    names = matrix.index.astype(str).tolist()
    pairs = [f"{names[row]} and {names[column]}" for row, column in zip(rows, columns, strict=True)]
    summary: dict[str, float | str] = {
        "concepts": len(matrix),
        "mean": round(float(np.nanmean(values)), 6),
        "most_similar": pairs[most],
        "most_similar_cosine": round(float(values[most]), 6),
        "least_similar": pairs[least],
        "least_similar_cosine": round(float(values[least]), 6),
    }
    return {**summary, **_two_runs(matrix)}


def _two_runs(matrix: pd.DataFrame) -> dict[str, float]:
    diagonal = np.diag(matrix.to_numpy())
    return {"two_runs_mean": round(float(np.nanmean(diagonal)), 6)} if np.isfinite(diagonal).any() else {}

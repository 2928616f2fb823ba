"""The MLflow model (pyfunc) that serves a registered concept: prompts in, pictures out. MLflow stores this file, no pickle.

The base model is not part of it: it is read from the folder or Hub id recorded at registration, or from the
environment variable SVDIFF_BASE_MODEL, and refused unless its weights are those that the delta was trained on.
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from mlflow.pyfunc.model import PythonModelContext
    from PIL.Image import Image

BASE_VARIABLE = "SVDIFF_BASE_MODEL"


class ConceptModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """One concept's delta on its base.

    Input: prompts, as a list of strings or the first column of a DataFrame; `{subject}` stands for
    "<token> <class word>".
    Output: DataFrame with `prompt`, `seed` and `image` (PNG bytes), one row a prompt, in order.
    Params: `seed` (picture i uses seed + i), or `seeds` (one a prompt); `steps`, `guidance` (s of Eq. 9),
    `scale` (strength of the shifts, Fig. 26; 0 is the base).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base and put the delta on it. Raises SvdiffError for a missing or another base."""
        from svdiff.config import BaseModelConfig
        from svdiff.models import load_pipeline, scratch
        from svdiff.spectral import SpectralPipeline

        config: dict[str, Any] = json.loads(Path(context.artifacts["concept"]).read_text())
        self.concept, self.subject = str(config["concept"]), str(config["subject"])
        base = os.environ.get(BASE_VARIABLE) or config["base_model"]
        fix = f"set {BASE_VARIABLE} to the folder of the base with hash {config['base_hash'][:12]}…"
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise SvdiffError(f"registered concept '{self.concept}': its base model is not at {base}; {fix}")
        recorded = Path(config["bases"])
        cache = scratch() / "bases" if "SVDIFF_HOME" in os.environ or not recorded.is_dir() else recorded
        revision = None if BASE_VARIABLE in os.environ else config["base_revision"]
        settings = config.get("base_settings", {})  # precision, resolution and the like
        pipe = load_pipeline(BaseModelConfig(model=base, revision=revision, **settings))
        self.personal = SpectralPipeline(pipe, cache=cache)
        try:
            self.personal.load_delta(context.artifacts["delta"], self.concept)
        except SvdiffError as error:
            raise SvdiffError(
                f"registered concept '{self.concept}' does not fit the base model at {base}: {error}; {fix}"
            ) from error
        self.defaults = config["sample"]

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Pictures for prompts; each depends on its own prompt and seed only."""
        from svdiff.sampling import Job, sample_images

        given = self.defaults | {key: value for key, value in (params or {}).items() if value is not None}
        # Whatever was passed, MLflow makes it the one column of the signature.
        prompts = [str(prompt).replace("{subject}", self.subject) for prompt in model_input.iloc[:, 0]]
        seeds = [int(seed) for seed in given.get("seeds", [])]
        if len(seeds) == 0:
            seeds = [int(given.get("seed", 0)) + index for index in range(len(prompts))]
        elif len(seeds) != len(prompts):
            raise SvdiffError(f"params.seeds has {len(seeds)} seeds for {len(prompts)} prompts; expected one each")
        self.personal.set_deltas({self.concept: float(given.get("scale", 1.0))})
        images = sample_images(
            self.personal.pipe,
            [Job(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)],
            steps=int(given["steps"]),
            guidance=float(given["guidance"]),
            eta=float(given["eta"]),
            batch_size=int(given["batch_size"]),
        )
        return pd.DataFrame({"prompt": prompts, "seed": seeds, "image": [_png(image) for image in images]})


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


mlflow.models.set_model(ConceptModel())

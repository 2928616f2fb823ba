"""The MLflow model (pyfunc) that serves a registered concept: prompts in, pictures out. MLflow stores this file, no pickle.

The base model is not part of it. It is looked for where SVDIFF_BASE_MODEL says, else in the checkout that the model's files lie in, in the
working directory, and where it was at registration; and refused unless its weights are those that the delta was trained on.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd

from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from mlflow.pyfunc.model import PythonModelContext
    from PIL.Image import Image

    from svdiff.config import SampleConfig

BASE_VARIABLE = "SVDIFF_BASE_MODEL"
SETTINGS = ("steps", "guidance", "eta", "beta", "batch_size")  # of `sample` in params.yaml
PARAMETERS = ("seed", "seeds", "scale", *SETTINGS)


class ConceptModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """One concept's delta, of whatever method, on its base.

    Input: prompts, as a DataFrame with a column `prompt`, a list of texts or of dictionaries with `prompt`, a dictionary of lists,
    or one text; `{subject}` stands for "<token> <class word>". A column `seed` says the seed of each picture.
    Output: DataFrame with `prompt`, `seed` and `image` (PNG bytes), one row a prompt, in order.
    Params: `seed` (picture i uses seed + i), or `seeds` (one a prompt); `scale` (strength of the delta, Fig. 26; 0 is the base);
    `steps`, `guidance` (s of Eq. 9), `eta`, `beta` (Eq. 10) and `batch_size`, which are otherwise those of the evaluation pictures.
    Whatever else is sent is refused with SvdiffError.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base and put the delta on it. Raises SvdiffError for a missing or another base."""
        from svdiff.config import BaseModelConfig
        from svdiff.models import load_pipeline

        config: dict[str, Any] = json.loads(Path(context.artifacts["concept"]).read_text())
        self.concept, self.subject = str(config["concept"]), str(config["subject"])
        self.defaults, self.negatives = config["sample"], config["negatives"]
        delta = Path(context.artifacts["delta"])
        fix = f"set {BASE_VARIABLE} to the folder of the base with hash {config['base_hash'][:12]}…"
        base, cache = find_base(config, delta)
        if Path(base["model"]).is_absolute() and not Path(base["model"]).exists():
            raise SvdiffError(f"registered concept '{self.concept}': its base model is not at {base['model']}; {fix}")
        self.pipe, self.at_work = load_pipeline(BaseModelConfig(**base)), threading.Lock()
        try:
            self.set_scale = put_on(self.pipe, delta, cache)
        except SvdiffError as error:
            raise SvdiffError(
                f"registered concept '{self.concept}' does not fit the base model at {base['model']}: {error}; {fix}"
            ) from error

    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Pictures for prompts; each depends on its own prompt and seed only. MLflow would take hints for a signature.

        MLflow's server asks by several threads: they draw one after the other, each at its own strength.
        """
        from svdiff.sampling import Job
        from svdiff.sampling.stage import draw_pictures

        given = {key: value for key, value in (params or {}).items() if value is not None}
        refuse_unknown({**given, **asked()})
        prompts, seeds = read_input(model_input)
        prompts = [prompt.replace("{subject}", self.subject) for prompt in prompts]
        seeds = read_seeds(given, len(prompts), seeds)
        settings = read_settings(self.defaults, given)
        scale, jobs = read_scale(given), [Job(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        with self.at_work:
            self.set_scale(scale)
            images = draw_pictures(self.pipe, jobs, settings, self.negatives)
        return pd.DataFrame({"prompt": prompts, "seed": seeds, "image": [_png(image) for image in images]})


def find_base(config: Mapping[str, Any], delta: Path) -> tuple[dict[str, Any], Path]:
    """Settings of the base with the place where it is, and the folder for its decomposition.

    A folder inside the checkout is recorded relative to it, so that a moved or copied checkout uses its own.
    """
    from svdiff.models import scratch

    base, named = dict(config["base"]), os.environ.get(BASE_VARIABLE)
    cache = scratch() / "bases"
    if named:
        return base | {"model": named, "revision": None}, cache
    if config["checkout"] is None:  # a Hub id, or a folder outside of the checkout
        return base, cache
    for folder in [*delta.resolve().parents, Path.cwd()]:
        if (folder / base["model"]).exists():
            own = cache if "SVDIFF_HOME" in os.environ else folder / ".svdiff" / "bases"
            return base | {"model": str(folder / base["model"])}, own
    return base | {"model": str(Path(config["checkout"]) / base["model"])}, cache


def put_on(pipe: Any, delta: Path, cache: Path) -> Callable[[float], None]:
    """Put a delta of any method on `pipe`; returns what sets its strength s (Fig. 26)."""
    from svdiff.sampling.weights_delta import is_weights_delta, load_weights_delta
    from svdiff.spectral import SpectralPipeline

    if is_weights_delta(delta):
        return load_weights_delta(pipe, delta).set_scale
    personal = SpectralPipeline(pipe, cache=cache)
    personal.load_delta(delta, "concept")
    return lambda scale: personal.set_deltas({"concept": scale})


def asked() -> dict[str, Any]:
    """The parameters as they were sent. MLflow takes away those that the signature does not name, with a warning at most."""
    frame: Any = sys._getframe()
    while frame is not None:
        local = frame.f_locals
        if frame.f_code.co_name == "predict" and isinstance(local.get("self"), mlflow.pyfunc.PyFuncModel):
            return dict(local.get("params") or {})
        frame = frame.f_back
    return {}


def refuse_unknown(given: Mapping[str, Any]) -> None:
    """Raise SvdiffError for a parameter that would have no effect."""
    from svdiff.words import did_you_mean

    for name in given:
        if name not in PARAMETERS:
            near = did_you_mean(str(name), PARAMETERS)
            raise SvdiffError(f"params.{name} is unknown{near} Known: {', '.join(PARAMETERS)}")


def read_input(sent: Any) -> tuple[list[str], list[Any] | None]:
    """Prompts, and their seeds where they were sent beside them. Raises SvdiffError for anything without prompts."""
    if isinstance(sent, Mapping):
        sent = {key: _as_list(value) for key, value in sent.items()}
        if len({len(value) for value in sent.values()}) > 1:
            raise SvdiffError(
                f"input: columns of several lengths ({', '.join(map(str, sent))}); expected one row a prompt"
            )
    try:
        table = pd.DataFrame(sent if isinstance(sent, Mapping | pd.DataFrame) else _as_list(sent))
    except ValueError as error:
        raise SvdiffError(f"input of type {type(sent).__name__} is no table of prompts: {error}") from None
    if "prompt" not in table:
        if isinstance(sent, Mapping) or len(table.columns) != 1 or not _is_number(table.columns[0]):
            found = ", ".join(map(str, table.columns)) or "none"
            raise SvdiffError(f"input: expected texts, or a column `prompt`; found columns {found}")
        table = table.set_axis(["prompt"], axis=1)
    for prompt in table["prompt"]:
        if not isinstance(prompt, str) or not prompt.strip():
            raise SvdiffError(f"input: prompt {prompt!r} is no text")
    if table.empty:
        raise SvdiffError("input: no prompt at all")
    return table["prompt"].tolist(), table["seed"].tolist() if "seed" in table else None


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, pd.Series | np.ndarray):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_number(label: Any) -> bool:
    return isinstance(label, int | np.integer)


def read_seeds(given: Mapping[str, Any], count: int, beside: list[Any] | None) -> list[int]:
    """A seed for each prompt: `seeds`, else the column `seed`, else `seed`, `seed` + 1, … Raises SvdiffError for others."""
    seeds = list(given.get("seeds", []))
    if len(seeds) not in (0, count):
        raise SvdiffError(f"params.seeds has {len(seeds)} seeds for {count} prompts; expected one each")
    if len(seeds) == 0:
        seeds = beside or [given.get("seed", 0)] * count
    for seed in seeds:
        if isinstance(seed, bool) or not _is_number(seed) or seed < 0:
            raise SvdiffError(f"seed {seed!r}: expected a whole number from 0")
    by = range(count) if not (len(given.get("seeds", [])) or beside) else [0] * count
    return [int(seed) + more for seed, more in zip(seeds, by, strict=True)]


def read_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SampleConfig:
    """How to sample. Raises SvdiffError for a value that params.yaml would not take either."""
    from pydantic import ValidationError

    from svdiff.config import SampleConfig
    from svdiff.sections import readable

    chosen = {key: given[key] for key in SETTINGS if key in given}
    try:
        return SampleConfig.model_validate(dict(defaults) | chosen)
    except ValidationError as error:
        raise SvdiffError(readable(error, SampleConfig, "params.")) from None


def read_scale(given: Mapping[str, Any]) -> float:
    """s of Fig. 26. Raises SvdiffError for a number that is not finite."""
    scale = float(given.get("scale", 1.0))
    if not math.isfinite(scale):
        raise SvdiffError(f"params.scale is {scale}; expected a finite number, 1 as trained, 0 the base")
    return scale


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


mlflow.models.set_model(ConceptModel())

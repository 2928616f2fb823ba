"""Stage `edit`: a picture's edits, their sheet and scores; and an edit of any picture in one go."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svdiff.config import Config, EditConfig, EditingConfig, StartConfig
from svdiff.data.concepts import load_picture
from svdiff.editing.edits import edit_picture, sheet
from svdiff.editing.scores import score_edits
from svdiff.errors import SvdiffError
from svdiff.evaluation import plots
from svdiff.evaluation.evaluators import Evaluators, describe_evaluators, load_evaluators
from svdiff.files import atomic_dir, check_writable, sha256_file
from svdiff.models import family_of, load_pipeline
from svdiff.sampling.images import check_prompts
from svdiff.sampling.stage import delta_path, personalise
from svdiff.words import file_stem

log = logging.getLogger(__name__)

EDITS = Path("out/edit")  # a folder an edit


def edit(config: Config, name: str, *, delta: Path | None = None, output: Path | None = None) -> Path:
    """Sample and score the edits of a picture that was trained on.

    Writes to out/edit/<name>/ (or `output`): pictures/, sheet.png, images.csv (a row a picture, see `score_edits`),
    metrics.json and evaluators.json.

    Args:
        config: all of params.yaml.
        name: an entry of `edits:`.
        delta: what the training wrote; default out/train/<name>/delta.safetensors.
        output: where the results go.

    Raises:
        SvdiffError: a bad picture, a prompt too long, or nothing trained yet; before any work.
    """
    request, output = config.edit_of(name), output or EDITS / name
    load_picture(request.image)
    delta = delta or delta_path(name)
    if not delta.is_file():
        raise SvdiffError(
            f"{delta} not found; train on the picture first, with `dvc repro train-edit@{name}`, or `svdiff train {name}`"
        )
    pipe = load_pipeline(config.base)
    _check_base(pipe, config, [request.prompt, *request.targets])
    evaluators = load_evaluators(config.evaluators)
    personalise(pipe, delta)
    return make_edits(pipe, config, name, evaluators, output)


def _check_base(pipe: Any, config: Config, prompts: Sequence[str]) -> None:
    """Raise SvdiffError for prompts or starts that this base has no place for."""
    check_prompts(pipe, prompts)
    for start in config.edit.starts.values():
        family_of(pipe).check_eta(start.eta)


def make_edits(pipe: Any, config: Config, name: str, evaluators: Evaluators | None, output: Path) -> Path:
    """Sample the edits of `name` with `pipe` as it is, and score them if there are evaluators, into the files of `edit`.

    Without evaluators there are no scores in images.csv, and neither of the two json files.
    """
    request = config.edit_of(name)
    picture, batch_size = load_picture(request.image).image, config.sample.batch_size
    edited = edit_picture(pipe, picture, request.prompt, request.targets, config.edit, batch_size)
    table, numbers = score_edits(edited, evaluators) if evaluators else (edited.table, {})
    with atomic_dir(output) as folder:
        (folder / "pictures").mkdir()
        singles = {
            "input": edited.original,
            "autoencoder": edited.autoencoded,
            "reconstruction": edited.reconstruction,
        }
        for stem, image in singles.items():
            image.save(folder / "pictures" / f"{stem}.png")
        for file, image in zip(table["file"], edited.pictures, strict=True):
            image.save(folder / "pictures" / file)
        table.to_csv(folder / "images.csv", index=False, float_format="%.6f")
        plots.save(sheet(edited, config.edit), folder / "sheet.png")
        if evaluators:
            (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
            (folder / "evaluators.json").write_text(json.dumps(describe_evaluators(config.evaluators), indent=2) + "\n")
    return output


def edit_any(
    config: Config,
    image: Path,
    prompt: str,
    targets: Sequence[str],
    *,
    overrides: dict[str, Any] | None = None,
    output: Path = Path("pictures"),
) -> Path:
    """Train on any picture, then edit it: <output>/<picture's name and hash>/train/ and …/edit/<targets>/, the sheet in the latter.

    The same picture, prompt and settings are trained once: asking again for other targets only samples, beside the first. Where the
    evaluators are not at hand the edits are made all the same, and a warning says why they have no scores.

    Args:
        config: params.yaml; section `edit` says from where to sample.
        image: the picture.
        prompt: what it shows, without a special token.
        targets: the edited prompts.
        overrides: keys of `train` to set differently, such as method and steps.
        output: folder for the result.

    Returns:
        The folder with the sheet.

    Raises:
        SvdiffError: as training and `edit` do, before any work.
    """
    from svdiff.training import train

    check_writable(output)
    load_picture(image)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", image.stem).strip("-.") or "picture"
    name = f"{stem}-{sha256_file(image)[:8]}"  # pictures of one name lie in many folders
    own = with_edit(config, name, {"image": str(image), "prompt": prompt, "targets": list(targets)})
    own.train_config(name, overrides)
    _check_base(load_pipeline(own.base), own, [prompt, *targets])
    delta = train(own, name, out_dir=output / name / "train", overrides=overrides)
    try:
        evaluators = load_evaluators(own.evaluators)
    except SvdiffError as error:
        log.warning("the edits are not scored: %s", error)
        evaluators = None
    pipe = load_pipeline(own.base)
    personalise(pipe, delta)
    return make_edits(pipe, own, name, evaluators, output / name / "edit" / file_stem(" ".join(targets)))


def with_edit(config: Config, name: str, request: dict[str, Any]) -> Config:
    """`config` with one edit and nothing else to train, and without a live curve, which nobody would follow.

    Raises SvdiffError for a request that is no edit.
    """
    sections: dict[str, Any] = {
        "concepts": {},
        "pairs": {},
        "edits": {name: EditConfig.checked(request)},
        "tracking": config.tracking.model_copy(update={"live": "none"}),
    }
    return config.model_copy(update=sections)


def choose_starts(
    editing: EditingConfig, *, inversion: bool | None = None, eta: float | None = None, alpha: float | None = None
) -> EditingConfig:
    """`editing` with those of its starts that are asked for.

    Args:
        editing: section `edit`.
        inversion: only starts with inversion, or only those without; None takes both.
        eta, alpha: make one start with inversion of these, in the place of the configured ones.

    Raises:
        SvdiffError: values out of range, α without inversion, or no start left.
    """
    starts = {name: start for name, start in editing.starts.items() if inversion in (None, start.alpha < 1)}
    if inversion is False and alpha is not None:
        raise SvdiffError(f"α = {alpha} mixes noise into the inverted picture; without inversion leave it out")
    if eta is not None or alpha is not None:
        values = {"eta": 0.5 if eta is None else eta, "alpha": 0.0 if alpha is None else alpha}
        if inversion is False:
            values["alpha"] = 1.0
        starts = {name: start for name, start in starts.items() if start.alpha == 1 and inversion is None}
        starts["noise" if inversion is False else "inversion"] = StartConfig.checked(values)
    if not starts:
        raise SvdiffError(
            f"edit.starts has none {'with' if inversion else 'without'} inversion: {', '.join(editing.starts)}"
        )
    return editing.model_copy(update={"starts": starts})

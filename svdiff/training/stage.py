"""The stage `train`: trains a concept, pair or edit and writes its delta; killed and started again, it resumes."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from tqdm.auto import tqdm

import svdiff
from svdiff.catalogue import Entry
from svdiff.config import Config, TrainConfig
from svdiff.data.grid import image_grid
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, sha256_file, write_atomic
from svdiff.models import family_of, load_pipeline, scratch
from svdiff.sampling import Job, sample_images
from svdiff.sampling.images import check_prompts
from svdiff.spectral import weights_hash
from svdiff.training.datasets import TrainingData, read_training_data
from svdiff.training.loop import Diverged, Trainer
from svdiff.training.methods import Method, apply_method
from svdiff.training.resume import load_state, save_state
from svdiff.training.tracking import LiveCurve

PACKAGE = Path(svdiff.__file__).parent
# A resume state is good for the code that wrote it only.
CODE = (
    *("spectral/**/*.py", "models/*.py", "training/**/*.py", "data/*.py"),
    *("sampling/images.py", "sampling/weights_delta.py"),
)


def train(config: Config, name: str, out_dir: Path | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Train an entry and write delta.safetensors, curve.csv, validation/ and train.json to `out_dir`.

    Args:
        config: all of params.yaml.
        name: a concept, pair or edit of it.
        out_dir: default out/train/<name>.
        overrides: keys of `train` to set differently, for analyses.

    Returns:
        The delta's path.

    Raises:
        SvdiffError: bad pictures, missing prior images or an impossible setting; before any work.
    """
    entry, settings = config.entry(name), config.train_config(name, overrides)
    out_dir = out_dir or Path("out/train") / name
    data = read_training_data(config, entry, settings)

    pipe = load_pipeline(config.base)
    for token in entry.tokens:
        _check_token(pipe, token)
    accelerator = _accelerator(config, settings)
    set_seed(settings.seed)  # methods with random starts (LoRA) draw from the global generator
    family = family_of(pipe)
    dataset = data.encode(family)
    check_prompts(pipe, [*dataset.prompts, *data.validation_prompts])
    others = [part for name, part in family.parts.items() if name != family.network_name]
    frozen = [*(weights_hash(part) for part in others), pipe.scheduler.to_json_string()]
    method = apply_method(pipe, settings, entry.tokens)
    try:
        trainer = Trainer(pipe, method, settings, dataset, accelerator)
        key = _train_key(config, entry, settings, data, [method.base_hash, *frozen])
        run = _Run(config, entry, settings, data.validation_prompts, key, LiveCurve(accelerator, config.tracking))
        run.curve.start(name, key, settings.model_dump(mode="json"), run.state_dir / "tracker.json")
        rows = _train_resumably(trainer, run)
        run.curve.end()
        _write_result(out_dir, run, method, rows)
    finally:
        method.detach()
    return out_dir / "delta.safetensors"


def state_folder(key: str) -> Path:
    """Where a training keeps its resume state; `key` is the train_key of its train.json."""
    return scratch() / "state" / f"train-{key[:24]}"


@dataclass(frozen=True)
class _Run:
    """One training under way."""

    config: Config
    entry: Entry
    settings: TrainConfig
    prompts: list[str]  # of the validation pictures
    key: str
    curve: LiveCurve

    @property
    def state_dir(self) -> Path:
        return state_folder(self.key)

    @property
    def state_path(self) -> Path:
        """The resume state."""
        return self.state_dir / "state.pt"


def _train_resumably(trainer: Trainer, run: _Run) -> list[dict[str, float]]:
    """Run the trainer from the last saved state to the end; return the whole curve."""
    rows: list[dict[str, float]] = []
    try:
        return _train_from(trainer, run, rows)
    except Diverged as error:
        if save_state(run.state_path, {"trainer": trainer.state(), "rows": rows}):
            error.args = (f"{error}. The state after step {trainer.step} is kept: {run.state_path}",)
        raise


def _train_from(trainer: Trainer, run: _Run, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Add to `rows` what the saved state has and what is trained, up to the last step."""
    settings = run.settings
    saved = load_state(run.state_path)
    if saved is not None:
        trainer.load_state(saved["trainer"])
        rows += saved["rows"]
    elif settings.validate_every:
        _validate(trainer, run)
    with tqdm(total=settings.steps, initial=trainer.step, desc=f"train {run.entry.name}", unit="step") as bar:
        for row in trainer.run():
            rows.append(row)
            run.curve.add(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            bar.update()
            last = trainer.step == settings.steps
            if trainer.step % settings.validate_every == 0 or last:
                _validate(trainer, run)
            if trainer.step % settings.save_every == 0 or last:
                save_state(run.state_path, {"trainer": trainer.state(), "rows": rows})
    return rows


def _validate(trainer: Trainer, run: _Run) -> None:
    """Pictures at fixed seeds (rows: prompts, columns: seeds), and the loss at fixed noise."""
    loss = trainer.fixed_noise_loss()
    seeds, sample = run.settings.validation_seeds, run.config.sample
    images = sample_images(
        trainer.pipe,
        [Job(prompt, seed) for prompt in run.prompts for seed in seeds],
        steps=sample.steps,
        guidance=sample.guidance,
        eta=sample.eta,
        batch_size=sample.batch_size,
    )
    grid = image_grid(images, columns=len(seeds))
    path = run.state_dir / "validation" / f"step-{trainer.step:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    write_atomic(path.with_suffix(".json"), json.dumps({"step": trainer.step, "fixed_noise_loss": loss}))
    run.curve.log({"fixed_noise_loss": loss}, trainer.step)


def _write_result(out_dir: Path, run: _Run, method: Method, rows: list[dict[str, float]]) -> None:
    """Publish the finished training as one folder."""
    settings, entry, state_dir = run.settings, run.entry, run.state_dir
    validations = [
        json.loads(path.read_text())
        for path in sorted((state_dir / "validation").glob("*.json"))
        if json.loads(path.read_text())["step"] <= settings.steps
    ]
    versions = {"svdiff": svdiff.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    identity = {
        "concept": entry.name,
        "kind": entry.kind,
        "class_word": entry.class_word,
        "token": entry.token,
        "train_key": run.key,
    }
    with atomic_dir(out_dir) as folder:
        method.save(
            folder / "delta.safetensors",
            identity
            | {"base_model": run.config.base.model, "config": settings.model_dump_json(), "method": settings.method},
        )
        curve = pd.DataFrame(rows)
        fixed = {row["step"]: row["fixed_noise_loss"] for row in validations}
        curve["fixed_noise_loss"] = curve["step"].map(fixed)
        curve.to_csv(folder / "curve.csv", index=False)
        (folder / "validation").mkdir()
        for row in validations:
            picture = f"step-{row['step']:05d}.png"
            (folder / "validation" / picture).write_bytes((state_dir / "validation" / picture).read_bytes())
        summary = identity | {
            "delta_sha256": sha256_file(folder / "delta.safetensors"),
            "base_hash": method.base_hash,
            "parameters": sum(p.numel() for group in method.parameters().values() for p in group),
            "steps": settings.steps,
            "seconds": round(sum(row["seconds"] for row in rows), 2),
            "fixed_noise_loss": fixed,
            "versions": versions | {"accelerate": accelerate.__version__, "python": platform.python_version()},
            "machine": {"device": str(torch.device(method_device(method))), "threads": torch.get_num_threads()},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": settings.model_dump(mode="json"),
        }
        (folder / "train.json").write_text(json.dumps(summary, indent=2) + "\n")


def method_device(method: Method) -> torch.device:
    """Where the trainable parameters live."""
    return next(p.device for group in method.parameters().values() for p in group)


def _train_key(config: Config, entry: Entry, settings: TrainConfig, data: TrainingData, base: list[str]) -> str:
    """Hash of everything that the result depends on: a resume state is never taken up by another training."""
    result_neutral = {"save_every"}
    parts = {
        "base": base,
        "settings": settings.model_dump(mode="json", exclude=result_neutral),
        "sample": [config.sample.steps, config.sample.guidance, config.sample.eta],
        "entry": [entry.kind, entry.name, entry.subjects, data.validation_prompts],
        "prior_prompt": config.prior.prompt,
        "reads": data.reads,
        "code": [sha256_file(file) for part in CODE for file in sorted(PACKAGE.glob(part))],
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _accelerator(config: Config, settings: TrainConfig) -> Accelerator:
    """Raises SvdiffError where the device cannot train in the precision asked for."""
    AcceleratorState._reset_state()  # kept for the process, which may train another concept in another precision
    live = config.tracking.live
    try:
        accelerator = Accelerator(mixed_precision=settings.precision, log_with=None if live == "none" else live)
    except ValueError as error:
        raise SvdiffError(f"train.precision is {settings.precision}: {error} Choose another precision") from error
    if settings.precision != "no" and not accelerator.native_amp:  # fp16 on a CPU would silently be float32
        raise SvdiffError(
            f"train.precision is {settings.precision}, which {accelerator.device.type} cannot train in; "
            "choose bf16 or no"
        )
    return accelerator


def _check_token(pipe: Any, token: str) -> None:
    """The special token must be one token that the vocabulary knows: pieces of words carry meanings of their own."""
    tokenizer = family_of(pipe).tokenizer
    pieces = tokenizer.tokenize(token)
    if len(pieces) != 1 or tokenizer.convert_tokens_to_ids(pieces[0]) == tokenizer.unk_token_id:
        raise SvdiffError(
            f"token '{token}' is {len(pieces)} tokens to the base's tokenizer ({', '.join(pieces) or 'none'}); "
            "expected one rare word of its vocabulary, e.g. sks"
        )

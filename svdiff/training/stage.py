"""The stage `train`: trains a concept, pair or edit and writes its delta; killed and started again, it resumes."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed

import svdiff
from svdiff.catalogue import Entry
from svdiff.config import Config, TrainConfig
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, sha256_file
from svdiff.models import family_of, load_pipeline, scratch
from svdiff.sampling.images import check_prompts
from svdiff.spectral import weights_hash
from svdiff.training.compatibility import check_compile, check_family
from svdiff.training.datasets import TrainingData, read_training_data
from svdiff.training.loop import Trainer
from svdiff.training.methods import Method, apply_method
from svdiff.training.optimizers import check_optimizer
from svdiff.training.run import Run, continue_shorter, train_resumably
from svdiff.training.selection import best_step
from svdiff.training.tracking import LiveCurve, check_tracker

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
    validation_prompts = config.validation_prompts(name, settings)
    out_dir = out_dir or Path("out/train") / name
    check_optimizer(settings.optimizer)
    check_tracker(config.tracking.live)
    data = read_training_data(config, entry, settings)

    accelerator = _accelerator(config, settings)
    check_compile(settings, accelerator.device)
    pipe = load_pipeline(config.base, accelerator.device)
    family = family_of(pipe)
    check_family(family, settings)
    family.check_tokens(entry.tokens)
    set_seed(settings.seed)  # methods with random starts (LoRA) draw from the global generator
    dataset = data.encode(family)
    check_prompts(pipe, [*dataset.prompts, *validation_prompts])
    others = [part for name, part in family.parts.items() if name != family.network_name]
    frozen = [*(weights_hash(part) for part in others), pipe.scheduler.to_json_string()]
    method = apply_method(pipe, settings, entry.tokens)
    try:
        trainer = Trainer(pipe, method, settings, dataset, accelerator)
        starts = [str(embedding.change.tolist()) for embedding in getattr(method, "tokens", {}).values()]
        base = [method.base_hash, *frozen, *starts]
        facts = _facts(config, entry, settings, data, base, accelerator.num_processes)
        key, lineage = _hash(facts), _hash(facts | {"settings": facts["settings"] | {"steps": None}})
        curve = LiveCurve(accelerator, config.tracking)
        run = Run(config, entry, settings, validation_prompts, key, lineage, curve)
        if accelerator.is_main_process:
            continue_shorter(run)
        accelerator.wait_for_everyone()
        run.curve.start(name, key, settings.model_dump(mode="json"), run.state_dir / "tracker.json")
        rows = train_resumably(trainer, run)
        run.curve.end()
        if accelerator.is_main_process:
            _write_result(out_dir, run, method, rows)
        accelerator.wait_for_everyone()
    finally:
        method.detach()
    return out_dir / "delta.safetensors"


def _write_result(out_dir: Path, run: Run, method: Method, rows: list[dict[str, float]]) -> None:
    """Publish the finished training as one folder."""
    settings, state_dir, fixed = run.settings, run.state_dir, run.losses
    versions = {"svdiff": svdiff.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    chosen = best_step(fixed) if settings.choose == "best" else max(fixed)
    with atomic_dir(out_dir) as folder:
        shutil.copyfile(run.delta_path(chosen), folder / "delta.safetensors")
        curve = pd.DataFrame(rows)
        curve["fixed_noise_loss"] = curve["step"].map(fixed)
        curve.to_csv(folder / "curve.csv", index=False)
        (folder / "validation").mkdir()
        for step in fixed:
            picture = f"step-{step:05d}.png"
            (folder / "validation" / picture).write_bytes((state_dir / "validation" / picture).read_bytes())
        summary = run.identity | {
            "delta_sha256": sha256_file(folder / "delta.safetensors"),
            "base_hash": method.base_hash,
            "parameters": sum(p.numel() for group in method.parameters().values() for p in group),
            "steps": len(rows),
            "chosen_step": chosen,
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


def _facts(
    config: Config, entry: Entry, settings: TrainConfig, data: TrainingData, base: list[str], processes: int
) -> dict[str, Any]:
    """Everything that the result depends on: a resume state is never taken up by a training of other facts."""
    result_neutral = {"save_every", "keep_deltas", "methods", "batch_size"}
    return {
        "base": base,
        "settings": settings.model_dump(mode="json", exclude=result_neutral),
        "batch_size": settings.batch_size * processes,
        "sample": [config.sample.steps, config.sample.guidance, config.sample.eta],
        "entry": [entry.kind, entry.name, entry.subjects, config.validation_prompts(entry.name, settings)],
        "prior_prompt": config.prior.prompt,
        "reads": data.reads,
        "code": [sha256_file(file) for part in CODE for file in sorted(PACKAGE.glob(part))],
        "torch": torch.__version__,
    }


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _accelerator(config: Config, settings: TrainConfig) -> Accelerator:
    """Raises SvdiffError where the device cannot train in the precision asked for."""
    AcceleratorState._reset_state()  # kept for the process, which may train another concept in another precision
    live = config.tracking.live
    try:
        accelerator = Accelerator(
            mixed_precision=settings.precision,
            log_with=None if live == "none" else live,
            project_dir=scratch() / "tensorboard",
        )
    except ValueError as error:
        raise SvdiffError(f"train.precision is {settings.precision}: {error} Choose another precision") from error
    if settings.precision != "no" and not accelerator.native_amp:  # fp16 on a CPU would silently be float32
        raise SvdiffError(
            f"train.precision is {settings.precision}, which {accelerator.device.type} cannot train in; "
            "choose bf16 or no"
        )
    return accelerator

"""The stage `train`: trains concepts, pairs or edits and writes their deltas; killed and started again, it resumes."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
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
from svdiff.models.compatibility import check_compile, check_family, check_precision
from svdiff.peaks import Peaks
from svdiff.sampling.images import check_prompts
from svdiff.spectral import weights_hash
from svdiff.training.datasets import TrainingData, read_training_data
from svdiff.training.loop import Row, Trainer
from svdiff.training.methods import Method, apply_method
from svdiff.training.optimizers import check_optimizer
from svdiff.training.run import Network, Run, Training, continue_shorter, train_side_by_side
from svdiff.training.selection import best_step
from svdiff.training.together import OwnNetwork, SharedNetwork, check_together
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
    [path] = _train(config, {name: config.train_config(name, overrides)}, out_dir)
    return path


def train_together(config: Config, names: Sequence[str]) -> list[Path]:
    """Train several entries as one batch, each into out/train/<name> as `train` does; the deltas' paths.

    Each picture takes its own entry's shifts. Results are those of training each alone, but for the order in which floats
    are added. One that fails, or is through, leaves the others as they are. No live curves are sent meanwhile.

    Raises:
        SvdiffError: as `train`; settings that a network cannot be shared with, before any work; or which of them failed,
            after the others are trained.
    """
    names = list(dict.fromkeys(names))
    if len(names) > 1:
        config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"live": "none"})})
    return _train(config, {name: config.train_config(name) for name in names})


def _train(config: Config, settings: Mapping[str, TrainConfig], out_dir: Path | None = None) -> list[Path]:
    check_tracker(config.tracking.live)
    entries, data, several = {name: config.entry(name) for name in settings}, {}, len(settings) > 1
    validation = {name: config.validation_prompts(name, own) for name, own in settings.items()}
    if several:
        check_together(settings)
    for name, own in settings.items():
        check_optimizer(own.optimizer)
        data[name] = read_training_data(config, entries[name], own)

    first_name, first = next(iter(settings.items()))
    accelerator = _accelerator(config, first)
    if several and accelerator.num_processes > 1:
        raise SvdiffError(
            f"{len(settings)} trainings together in {accelerator.num_processes} processes: `accelerate launch` shares the "
            "batch of one training; leave it out, or name one"
        )
    check_compile(first, accelerator.device)
    peaks = Peaks()
    with peaks.phase("loading"):
        pipe = load_pipeline(config.base.model_copy(update={"offload": "none"}), accelerator.device)
    family = family_of(pipe)
    for name, own in settings.items():
        check_family(family, own)
        check_precision(config.base, own)
        family.check_tokens(entries[name].tokens)
    set_seed(first.seed)  # methods with random starts (LoRA) draw from the global generator
    with peaks.phase("encoding"):
        datasets = {name: of.encode(family) for name, of in data.items()}
    check_prompts(pipe, [text for name in settings for text in (*datasets[name].prompts, *validation[name])])
    others = [part for name, part in family.parts.items() if name != family.network_name]
    frozen = [*(weights_hash(part) for part in others), pipe.scheduler.to_json_string(), str(family.image_size)]

    def start(name: str, method: Method) -> Training:
        entry, own = entries[name], settings[name]
        trainer = Trainer(pipe, method, own, datasets[name], accelerator)
        starts = [str(embedding.change.tolist()) for embedding in getattr(method, "tokens", {}).values()]
        base = [method.base_hash, *frozen, *starts]
        facts = _facts(config, entry, own, data[name], base, accelerator.num_processes)
        key, lineage = _hash(facts), _hash(facts | {"settings": facts["settings"] | {"steps": None}})
        run = Run(config, entry, own, validation[name], key, lineage, LiveCurve(accelerator, config.tracking), peaks)
        if accelerator.is_main_process:
            continue_shorter(run)
        accelerator.wait_for_everyone()
        run.curve.start(name, key, own.model_dump(mode="json"), run.state_dir / "tracker.json")
        return Training(trainer, run, out_dir or Path("out/train") / name)

    tokens = [entries[name].tokens for name in settings]
    with peaks.phase("decomposition"):
        network: Network = (
            SharedNetwork(pipe, list(settings.values()), tokens)
            if several
            else OwnNetwork(apply_method(pipe, first, tokens[0]))
        )
    try:
        trainings = []
        for name, method in zip(settings, network.methods, strict=True):
            network.turn(method)
            trainings.append(start(name, method))
        failures: dict[str, SvdiffError] = {}
        for training, outcome in train_side_by_side(trainings, network):
            training.run.curve.end()
            if isinstance(outcome, SvdiffError):
                failures[training.run.entry.name] = outcome
            elif accelerator.is_main_process:
                _write_result(training, outcome)
        accelerator.wait_for_everyone()
    finally:
        network.detach()
    if accelerator.is_main_process:
        peaks.say()
    if failures and not several:
        raise failures[first_name]
    if failures:
        said = "\n".join(f"{name}: {error}" for name, error in failures.items())
        raise SvdiffError(f"{len(failures)} of {len(trainings)} trainings did not end; the others are written:\n{said}")
    return [training.out_dir / "delta.safetensors" for training in trainings]


def _write_result(training: Training, rows: list[Row]) -> None:
    """Publish a finished training as one folder."""
    run, method = training.run, training.trainer.method
    settings, state_dir, fixed = run.settings, run.state_dir, run.losses
    versions = {"svdiff": svdiff.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    # A training that went on from a shorter one has those deltas that the shorter one kept.
    there = {step: loss for step, loss in fixed.items() if run.delta_path(step).is_file()}
    chosen = best_step(there) if settings.choose == "best" else max(fixed)
    with atomic_dir(training.out_dir) as folder:
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
            "peak_bytes": run.peaks.bytes,
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

"""The stage `train`: trains a concept, pair or edit and writes its delta; killed and started again, it resumes."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import signal
import threading
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
from accelerate.utils import broadcast_object_list, set_seed
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
from svdiff.training.optimizers import check_optimizer
from svdiff.training.resume import load_state, save_state
from svdiff.training.selection import best_step, is_over, kept_steps
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
    out_dir = out_dir or Path("out/train") / name
    check_optimizer(settings.optimizer)
    check_tracker(config.tracking.live)
    data = read_training_data(config, entry, settings)

    accelerator = _accelerator(config, settings)
    pipe = load_pipeline(config.base).to(accelerator.device)
    for token in entry.tokens:
        _check_token(pipe, token)
    set_seed(settings.seed)  # methods with random starts (LoRA) draw from the global generator
    family = family_of(pipe)
    dataset = data.encode(family)
    check_prompts(pipe, [*dataset.prompts, *data.validation_prompts])
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
        run = _Run(config, entry, settings, data.validation_prompts, key, lineage, curve)
        if accelerator.is_main_process:
            _continue_shorter(run)
        accelerator.wait_for_everyone()
        run.curve.start(name, key, settings.model_dump(mode="json"), run.state_dir / "tracker.json")
        rows = _train_resumably(trainer, run)
        run.curve.end()
        if accelerator.is_main_process:
            _write_result(out_dir, run, method, rows)
        accelerator.wait_for_everyone()
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
    lineage: str  # the same for trainings that differ in their number of steps alone
    curve: LiveCurve

    @property
    def state_dir(self) -> Path:
        """Where this training keeps what it has done so far."""
        return state_folder(self.key)

    @property
    def state_path(self) -> Path:
        """The resume state."""
        return self.state_dir / "state.pt"

    def delta_path(self, step: int) -> Path:
        """The delta after `step`."""
        return self.state_dir / "deltas" / f"step-{step:05d}.safetensors"

    @property
    def losses(self) -> dict[int, float]:
        """Fixed-noise losses of the validations so far, by step."""
        rows = [json.loads(path.read_text()) for path in sorted((self.state_dir / "validation").glob("*.json"))]
        losses = {row["step"]: row["fixed_noise_loss"] for row in rows}
        return {step: loss for step, loss in losses.items() if self.validates(step)}

    def validates(self, step: int) -> bool:
        """Whether there is a validation after `step`."""
        return step % self.settings.validate_every == 0 or step == self.settings.steps

    @property
    def identity(self) -> dict[str, str]:
        """Who was trained, for the delta's metadata and train.json."""
        entry = self.entry
        words = {"class_word": entry.class_word, "token": entry.token, "train_key": self.key}
        return {"concept": entry.name, "kind": entry.kind} | words


def _train_resumably(trainer: Trainer, run: _Run) -> list[dict[str, float]]:
    """Run the trainer from the last saved state to the end; return the whole curve."""
    rows: list[dict[str, float]] = []
    try:
        return _train_from(trainer, run, rows)
    except Diverged as error:
        if trainer.accelerator.is_main_process and _save(trainer, run, rows):
            error.args = (f"{error}. The state after step {trainer.step} is kept: {run.state_path}",)
        raise


def _train_from(trainer: Trainer, run: _Run, rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Add to `rows` what the saved state has and what is trained, up to the last step or until `is_over`.

    Of several processes the first one alone validates and saves; the others wait for it.
    """
    settings, accelerator = run.settings, trainer.accelerator
    saved = load_state(run.state_path)
    if saved is not None:
        trainer.load_state(saved["trainer"])
        rows += saved["rows"]
    elif accelerator.is_main_process:
        _validate(trainer, run)
    accelerator.wait_for_everyone()
    if _over(trainer, run):
        return rows
    main = accelerator.is_main_process
    bar = tqdm(
        total=settings.steps, initial=trainer.step, desc=f"train {run.entry.name}", unit="step", disable=not main
    )
    with bar, StopRequest(main and accelerator.num_processes == 1) as stop:
        for row in trainer.run():
            rows.append(row)
            run.curve.add(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            bar.update()
            last = trainer.step == settings.steps
            if main and run.validates(trainer.step):
                _validate(trainer, run)
            over = run.validates(trainer.step) and _over(trainer, run)
            if main and (trainer.step % settings.save_every == 0 or last or over or stop.requested):
                _save(trainer, run, rows)
            if stop.requested and not last and not over:
                with trainer.averaged():
                    _save_delta(trainer, run)
                raise SvdiffError(
                    f"stopped after step {trainer.step} of {settings.steps}. Pictures of it: svdiff sample --delta "
                    f"{run.delta_path(trainer.step)} --prompt …; the same command again goes on"
                )
            if over:
                break
    return rows


def _over(trainer: Trainer, run: _Run) -> bool:
    """`is_over`, as the first process finds."""
    answer = [is_over(run.losses, run.settings.patience) if trainer.accelerator.is_main_process else False]
    return bool(broadcast_object_list(answer)[0])


def _save(trainer: Trainer, run: _Run, rows: list[dict[str, float]]) -> bool:
    """Save the resume state, and remove deltas that are neither the best nor among the last."""
    if not save_state(run.state_path, {"trainer": trainer.state(), "rows": rows}):
        return False
    kept = {run.delta_path(step) for step in kept_steps(run.losses, run.settings.keep_deltas)}
    for path in run.delta_path(0).parent.glob("*.safetensors"):
        if path not in kept:
            path.unlink()
    return True


def _continue_shorter(run: _Run) -> None:
    """Start from the state of a training that differs in having fewer steps, where there is one and the schedule allows.

    At a constant rate its steps are the first steps of this training. Under other schedules rates depend on the number
    of steps, so that more steps are another training from the start.
    """
    if run.settings.schedule == "constant" and not run.state_path.is_file():
        shorter: list[tuple[int, Path]] = []
        for path in run.state_dir.parent.glob("train-*/lineage.json"):
            content = json.loads(path.read_text())
            finished = (path.parent / "state.pt").is_file()
            if content["lineage"] == run.lineage and content["steps"] < run.settings.steps and finished:
                shorter.append((content["steps"], path.parent))
        if shorter:
            with atomic_dir(run.state_dir) as folder:
                shutil.copytree(max(shorter)[1], folder, dirs_exist_ok=True)
                (folder / "tracker.json").unlink(missing_ok=True)
    write_atomic(run.state_dir / "lineage.json", json.dumps({"lineage": run.lineage, "steps": run.settings.steps}))


class StopRequest:
    """Takes Ctrl-C as a wish to stop after the step under way; a second one stops at once."""

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.requested = False

    def __enter__(self) -> StopRequest:
        if self.active:
            self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self._before)

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, self._before)


def _save_delta(trainer: Trainer, run: _Run) -> None:
    """Write what is learned so far as a delta."""
    known = {"base_model": run.config.base.model, "config": run.settings.model_dump_json(), "step": str(trainer.step)}
    trainer.method.save(run.delta_path(trainer.step), run.identity | known | {"method": run.settings.method})


def _validate(trainer: Trainer, run: _Run) -> None:
    """The delta so far, the loss at fixed noise, and pictures at fixed seeds (rows: prompts, columns: seeds)."""
    seeds, sample, step = run.settings.validation_seeds, run.config.sample, trainer.step
    with trainer.averaged():
        loss = trainer.fixed_noise_loss()
        images = sample_images(
            trainer.pipe,
            [Job(prompt, seed) for prompt in run.prompts for seed in seeds],
            steps=sample.steps,
            guidance=sample.guidance,
            eta=sample.eta,
            batch_size=sample.batch_size,
        )
        if step > 0:
            _save_delta(trainer, run)
    path = run.state_dir / "validation" / f"step-{step:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns=len(seeds)).save(path)
    write_atomic(path.with_suffix(".json"), json.dumps({"step": step, "fixed_noise_loss": loss}))
    run.curve.log({"fixed_noise_loss": loss}, step)


def _write_result(out_dir: Path, run: _Run, method: Method, rows: list[dict[str, float]]) -> None:
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
        "entry": [entry.kind, entry.name, entry.subjects, data.validation_prompts],
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


def _check_token(pipe: Any, token: str) -> None:
    """The special token must be one token that the vocabulary knows: pieces of words carry meanings of their own."""
    tokenizer = family_of(pipe).tokenizer
    pieces = tokenizer.tokenize(token)
    if len(pieces) != 1 or tokenizer.convert_tokens_to_ids(pieces[0]) == tokenizer.unk_token_id:
        raise SvdiffError(
            f"token '{token}' is {len(pieces)} tokens to the base's tokenizer ({', '.join(pieces) or 'none'}); "
            "expected one rare word of its vocabulary, e.g. sks"
        )

"""Stage `train`: a concept's pictures in, its delta out. Killed at any moment, it goes on where it was."""

from __future__ import annotations

import hashlib
import json
import platform
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
from tqdm.auto import tqdm

import svdiff
from svdiff.config import Config, TrainConfig
from svdiff.data.concepts import concept_folder, load_concept_images, to_square
from svdiff.data.prior import load_prior_images, prior_folder
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, sha256_file, sha256_tree, write_atomic
from svdiff.models import image_size, load_pipeline, scratch
from svdiff.sampling import Job, sample_images
from svdiff.sampling.grid import image_grid
from svdiff.spectral import weights_hash
from svdiff.training.batches import LatentImages
from svdiff.training.checkpoint import load_state, save_state
from svdiff.training.loop import Examples, Trainer
from svdiff.training.methods import Method, apply_method
from svdiff.training.tracking import LiveCurve

PACKAGE = Path(svdiff.__file__).parent
# A resume state is good for the code that wrote it only.
CODE = ("spectral/**/*.py", "training/**/*.py", "data/concepts.py", "sampling/images.py")


def train(config: Config, concept: str, out_dir: Path | None = None, overrides: dict[str, Any] | None = None) -> Path:
    """Train one concept and write delta.safetensors, curve.csv, validation/ and train.json to `out_dir`.

    Args:
        config: all of params.yaml.
        concept: its name there.
        out_dir: default out/train/<concept>.
        overrides: keys of `train` to set differently, for analyses.

    Returns:
        The delta's path.

    Raises:
        SvdiffError: bad pictures, missing prior images or an impossible setting; before any work.
    """
    settings = config.train_config(concept, overrides)
    subject = config.concept(concept)
    out_dir = out_dir or Path("out/train") / concept
    pictures = load_concept_images(concept_folder(concept))
    priors = load_prior_images(subject.class_word) if settings.prior_weight > 0 else []

    pipe = load_pipeline(config.base)
    _check_token(pipe, subject.token)
    size = image_size(pipe)
    accelerator = _accelerator(config, settings)
    set_seed(settings.seed)  # methods with random starts (LoRA) draw from the global generator
    instance = Examples(
        LatentImages.encode(pipe.vae, [to_square(picture.image, size) for picture in pictures]),
        settings.prompt.format(subject=subject.subject),
    )
    prior = None
    if priors:
        prior = Examples(
            LatentImages.encode(pipe.vae, [to_square(image, size) for image in priors]),
            config.prior.prompt.format(subject=subject.class_word),
        )
    frozen = [weights_hash(pipe.text_encoder), weights_hash(pipe.vae), pipe.scheduler.to_json_string()]
    method = apply_method(pipe, settings, subject.token)
    try:
        key = _train_key(config, concept, settings, [method.base_hash, *frozen])
        state_dir = scratch() / "state" / f"train-{key[:24]}"
        trainer = Trainer(pipe, method, settings, instance, prior, accelerator)
        curve = LiveCurve(accelerator, config.tracking)
        curve.start(concept, key, settings.model_dump(mode="json"), state_dir / "tracker.json")
        rows = _train_resumably(trainer, config, concept, settings, state_dir, curve)
        curve.end()
        _write_result(out_dir, state_dir, config, concept, settings, method, key, rows)
    finally:
        method.detach()
    return out_dir / "delta.safetensors"


def _train_resumably(
    trainer: Trainer, config: Config, concept: str, settings: TrainConfig, state_dir: Path, curve: LiveCurve
) -> list[dict[str, float]]:
    """Run the trainer from the last saved state to the end; return the whole curve."""
    rows: list[dict[str, float]] = []
    saved = load_state(state_dir / "state.pt")
    if saved is not None:
        trainer.load_state(saved["trainer"])
        rows = saved["rows"]
    elif settings.validate_every:
        _validate(trainer, config, concept, settings, state_dir, curve)
    with tqdm(total=settings.steps, initial=trainer.step, desc=f"train {concept}", unit="step") as bar:
        for row in trainer.run():
            rows.append(row)
            curve.add(row)
            bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
            bar.update()
            last = trainer.step == settings.steps
            if trainer.step % settings.validate_every == 0 or last:
                _validate(trainer, config, concept, settings, state_dir, curve)
            if trainer.step % settings.save_every == 0 or last:
                save_state(state_dir / "state.pt", {"trainer": trainer.state(), "rows": rows})
    return rows


def _validate(
    trainer: Trainer, config: Config, concept: str, settings: TrainConfig, state_dir: Path, curve: LiveCurve
) -> None:
    """Pictures at fixed seeds (rows: prompts, columns: seeds), and the loss at fixed noise."""
    subject = config.concept(concept).subject
    prompts = [prompt.format(subject=subject) for prompt in settings.validation_prompts]
    images = sample_images(
        trainer.pipe,
        [Job(prompt, seed) for prompt in prompts for seed in settings.validation_seeds],
        steps=config.sample.steps,
        guidance=config.sample.guidance,
        batch_size=config.sample.batch_size,
    )
    grid = image_grid(images, columns=len(settings.validation_seeds))
    path = state_dir / "validation" / f"step-{trainer.step:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    loss = trainer.fixed_noise_loss()
    write_atomic(path.with_suffix(".json"), json.dumps({"step": trainer.step, "fixed_noise_loss": loss}))
    curve.log({"fixed_noise_loss": loss}, trainer.step)


def _write_result(
    out_dir: Path,
    state_dir: Path,
    config: Config,
    concept: str,
    settings: TrainConfig,
    method: Method,
    key: str,
    rows: list[dict[str, float]],
) -> None:
    """Publish the finished training as one folder."""
    subject = config.concept(concept)
    validations = [
        json.loads(path.read_text())
        for path in sorted((state_dir / "validation").glob("*.json"))
        if json.loads(path.read_text())["step"] <= settings.steps
    ]
    versions = {"svdiff": svdiff.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    identity = {"concept": concept, "class_word": subject.class_word, "token": subject.token, "train_key": key}
    with atomic_dir(out_dir) as folder:
        method.save(
            folder / "delta.safetensors",
            identity
            | {"base_model": config.base.model, "config": settings.model_dump_json(), "method": settings.method},
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


def _train_key(config: Config, concept: str, settings: TrainConfig, base: list[str]) -> str:
    """Hash of everything that the result depends on: a resume state is never taken up by another training."""
    result_neutral = {"save_every"}
    parts = {
        "base": base,
        "settings": settings.model_dump(mode="json", exclude=result_neutral),
        "sample": [config.sample.steps, config.sample.guidance],
        "subject": config.concept(concept).model_dump(exclude={"train"}),
        "prior_prompt": config.prior.prompt,
        "pictures": sha256_tree(concept_folder(concept)),
        "priors": sha256_tree(prior_folder(config.concept(concept).class_word)) if settings.prior_weight > 0 else None,
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
    pieces = pipe.tokenizer.tokenize(token)
    if len(pieces) != 1 or pipe.tokenizer.convert_tokens_to_ids(pieces[0]) == pipe.tokenizer.unk_token_id:
        raise SvdiffError(
            f"token '{token}' is {len(pieces)} tokens to the base's tokenizer ({', '.join(pieces) or 'none'}); "
            "expected one rare word of its vocabulary, e.g. sks"
        )

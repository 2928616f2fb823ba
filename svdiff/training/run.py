"""One training under way: its folder with resume state, validations and deltas; it stops, is killed and goes on."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from svdiff.catalogue import Entry
from svdiff.config import Config, SampleConfig, TrainConfig
from svdiff.data.grid import image_grid
from svdiff.errors import SvdiffError
from svdiff.files import atomic_dir, write_atomic
from svdiff.models import scratch
from svdiff.peaks import Peaks
from svdiff.sampling import Job
from svdiff.training.loop import Asking, Diverged, Row, Trainer, Validation
from svdiff.training.losses import Loss
from svdiff.training.methods import Method
from svdiff.training.resume import load_state, save_state
from svdiff.training.selection import is_over, kept_steps
from svdiff.training.tracking import LiveCurve


def state_folder(key: str) -> Path:
    """Where a training keeps its resume state; `key` is the train_key of its train.json."""
    return scratch() / "state" / f"train-{key[:24]}"


@dataclass(frozen=True)
class Run:
    """One training under way."""

    config: Config
    entry: Entry
    settings: TrainConfig
    prompts: list[str]  # of the validation pictures
    key: str
    lineage: str  # the same for trainings that differ in their number of steps alone
    curve: LiveCurve
    peaks: Peaks

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
        rows = [
            json.loads(path.read_text()) for path in sorted((self.state_dir / "validation").glob("step-*.json"))
        ]  # others are half-written
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


def train_resumably(trainer: Trainer, run: Run, stop: StopRequest) -> Asking[list[Row]]:
    """Train from the last saved state to the end; returns the whole curve."""
    rows: list[Row] = []
    try:
        return (yield from _train_from(trainer, run, rows, stop))
    except Diverged as error:
        if trainer.accelerator.is_main_process and _save(trainer, run, rows):
            error.args = (f"{error}. The state after step {trainer.step} is kept: {run.state_path}",)
        raise


def _train_from(trainer: Trainer, run: Run, rows: list[Row], stop: StopRequest) -> Asking[list[Row]]:
    """Add to `rows` what the saved state has and what is trained, up to the last step or until `is_over`.

    Of several processes the first one alone validates and saves; the others wait for it.
    """
    settings, accelerator = run.settings, trainer.accelerator
    saved = load_state(run.state_path)
    if saved is not None:
        trainer.load_state(saved["trainer"])
        rows += saved["rows"]
    main, failure = accelerator.is_main_process, None
    if saved is None and main:
        failure = yield from _validated(trainer, run)
    over = _over(trainer, run, failure)
    while trainer.step < settings.steps and not over:
        rows.append((yield from trainer.take_step()))
        run.curve.add(rows[-1])
        last = trainer.step == settings.steps
        if main and run.validates(trainer.step):
            failure = yield from _validated(trainer, run)
        over = run.validates(trainer.step) and _over(trainer, run, failure)
        if main and (trainer.step % settings.save_every == 0 or last or over or stop.requested):
            _save(trainer, run, rows)
        if stop.requested and not last and not over:
            with trainer.averaged():
                _save_delta(trainer, run)
            raise SvdiffError(
                f"stopped after step {trainer.step} of {settings.steps}. Pictures of it: svdiff sample --delta "
                f"{run.delta_path(trainer.step)} --prompt …; the same command again goes on"
            )
    return rows


@dataclass(frozen=True, eq=False)
class Training:
    """A training from its start to its result."""

    trainer: Trainer
    run: Run
    out_dir: Path


class Network(Protocol):
    """What trainings side by side share."""

    @property
    def methods(self) -> Sequence[Method]:
        """What each of them trains."""
        ...

    def turn(self, method: Method) -> None:
        """From now on something is done for one of them alone."""
        ...

    def answer(self, asked: Mapping[Trainer, int]) -> list[Loss]:
        """The loss of the batch that each trainer asks for, by its number, with its share of the step's gradients made."""
        ...

    def validate(self, asked: Mapping[Trainer, list[Job]], settings: SampleConfig) -> list[Validation | SvdiffError]:
        """The loss of each trainer at fixed noise and the pictures that it asks for, as far as it has learned; or why not."""
        ...

    def detach(self) -> None:
        """Give the pipeline its base weights back."""
        ...


def train_side_by_side(
    trainings: Sequence[Training], network: Network
) -> Iterator[tuple[Training, list[Row] | SvdiffError]]:
    """Bring trainings forward step by step; yields each that has ended, with its curve or why it failed.

    One that ends leaves the others as they are.
    """
    accelerator = trainings[0].trainer.accelerator
    stop = StopRequest(accelerator.is_main_process and accelerator.num_processes == 1)
    ended: list[tuple[Training, list[Row] | SvdiffError]] = []
    asked: dict[Training, int | list[Job]] = {}
    with ExitStack() as open_:
        asking = {one: open_.enter_context(closing(train_resumably(one.trainer, one.run, stop))) for one in trainings}

        def go_on(one: Training, answer: Loss | Validation | SvdiffError | None) -> None:
            network.turn(one.trainer.method)
            try:
                if isinstance(answer, SvdiffError):
                    asked[one] = asking[one].throw(answer)
                else:
                    asked[one] = asking[one].send(answer)
            except StopIteration as end:
                ended.append((one, end.value))
            except SvdiffError as error:
                ended.append((one, error))

        for one in trainings:
            go_on(one, None)
        yield from ended
        names = ", ".join(one.run.entry.name for one in asked)
        bar = tqdm(
            total=sum(one.run.settings.steps for one in asked),
            initial=sum(one.trainer.step for one in asked),
            desc=f"train {names}",
            unit="step",
            disable=not accelerator.is_main_process or not asked,
        )
        with bar, stop:
            while asked:
                done = bar.n
                # Validations first: whoever asks for losses waits, so that all go on with their steps together.
                wanted = {one: jobs for one, jobs in asked.items() if isinstance(jobs, list)}
                numbers = {one: number for one, number in asked.items() if isinstance(number, int)}
                now = list(wanted or numbers)
                for one in now:
                    del asked[one]
                run, losses = now[0].run, list[Loss]()
                answers: Sequence[Loss | Validation | SvdiffError]
                if wanted:
                    with run.peaks.phase("validation"):
                        jobs_of = {one.trainer: jobs for one, jobs in wanted.items()}
                        answers = network.validate(jobs_of, run.config.sample)
                else:
                    with run.peaks.phase("training"):
                        answers = losses = network.answer({one.trainer: number for one, number in numbers.items()})
                ended.clear()
                for one, answer in zip(now, answers, strict=True):
                    before = one.trainer.step
                    go_on(one, answer)
                    bar.update(one.trainer.step - before)
                if bar.n > done:
                    bar.set_postfix(
                        loss=f"{sum(float(loss.total) for loss in losses) / len(losses):.4f}", refresh=False
                    )
                yield from ended


def _over(trainer: Trainer, run: Run, failure: Exception | None) -> bool:
    """`is_over`, as the first process finds; where its validation failed, all raise that: none waits for another."""
    losses = {step: loss for step, loss in run.losses.items() if step <= trainer.step}
    first = trainer.accelerator.is_main_process
    answer = [is_over(losses, run.settings.patience) if first else False, None if failure is None else str(failure)]
    over, failed = broadcast_object_list(answer)
    if failed is not None:
        raise failure or SvdiffError(failed)
    return bool(over)


def _save(trainer: Trainer, run: Run, rows: list[dict[str, float]]) -> bool:
    """Save the resume state, and remove deltas that are neither the best nor among the last."""
    if not save_state(run.state_path, {"trainer": trainer.state(), "rows": rows}):
        return False
    kept = {run.delta_path(step) for step in kept_steps(run.losses, run.settings.keep_deltas)}
    for path in run.delta_path(0).parent.glob("*.safetensors"):
        if path not in kept:
            path.unlink()
    return True


def continue_shorter(run: Run) -> None:
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


def _save_delta(trainer: Trainer, run: Run) -> None:
    """Write what is learned so far as a delta."""
    known = {"base_model": run.config.base.model, "config": run.settings.model_dump_json(), "step": str(trainer.step)}
    trainer.method.save(run.delta_path(trainer.step), run.identity | known | {"method": run.settings.method})


def _validated(trainer: Trainer, run: Run) -> Asking[Exception | None]:
    """Validate; returns what went wrong, a full memory or disk as well."""
    try:
        yield from _validate(trainer, run)
    except Exception as error:
        return error
    return None


def _validate(trainer: Trainer, run: Run) -> Asking[None]:
    """The delta so far, the loss at fixed noise, and pictures at fixed seeds (rows: prompts, columns: seeds)."""
    seeds, step = run.settings.validation_seeds, trainer.step
    with trainer.averaged():
        loss, images = yield [Job(prompt, seed) for prompt in run.prompts for seed in seeds]
        if step > 0:
            _save_delta(trainer, run)
    path = run.state_dir / "validation" / f"step-{step:05d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns=len(seeds)).save(path)
    write_atomic(path.with_suffix(".json"), json.dumps({"step": step, "fixed_noise_loss": loss}))
    run.curve.log({"fixed_noise_loss": loss}, step)

"""Sends the loss curve to a tracker while a training runs; a tracker that fails is reported once and never stops it."""

from __future__ import annotations

import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from svdiff.config import TrackingConfig
from svdiff.errors import SvdiffError
from svdiff.files import write_atomic
from svdiff.secrets import redacted

log = logging.getLogger(__name__)

EVERY = 10  # steps whose mean makes one point: a database answers slower than a small model trains


def check_tracker(live: str) -> None:
    """Raise SvdiffError for a tracker that is not installed."""
    if live != "none" and find_spec(live) is None:
        package = {"mlflow": "'svdiff[workflow]'", "tensorboard": "'svdiff[training]'"}.get(live, live)
        raise SvdiffError(f"tracking.live is {live}, which is not installed: `pip install {package}`, or choose none")


class LiveCurve:
    """Sends means of the curve's rows to the tracker, under one run for the whole training, resumed or not."""

    def __init__(self, accelerator: Accelerator, tracking: TrackingConfig) -> None:
        self.accelerator, self.experiment = accelerator, tracking.experiment
        self.tracker = tracking.live
        self.active = tracking.live != "none" and accelerator.is_main_process
        self.rows: list[dict[str, float]] = []
        os.environ.setdefault("MLFLOW_TRACKING_URI", tracking.uri)

    def start(self, name: str, train_key: str, parameters: dict[str, Any], memory: Path) -> None:
        """Open the run, or the one that `memory` remembers from before an interruption."""
        if not self.active:
            return
        run_id = json.loads(memory.read_text())["run_id"] if memory.is_file() else None
        tags = {"svdiff.train_key": train_key, "svdiff.concept": name}
        options = {
            "mlflow": {"run_name": name, "run_id": run_id, "tags": tags},
            "wandb": {"name": name, "id": train_key[:24], "resume": "allow", "config": tags},
            "tensorboard": {},
        }
        plain = {key: v if isinstance(v, int | float | str) else json.dumps(v) for key, v in parameters.items()}
        project = f"{self.experiment}-{name}-{train_key[:8]}" if self.tracker == "tensorboard" else self.experiment
        try:
            self.accelerator.init_trackers(project, config=None if run_id else plain, init_kwargs=options)
            run = getattr(self.accelerator.get_tracker(self.tracker).tracker, "info", None)
            if run is not None:
                write_atomic(memory, json.dumps({"run_id": run.run_id}))
        except Exception as error:  # whatever a server or database can raise
            self._give_up(error)

    def add(self, row: dict[str, float]) -> None:
        """Take one row; every EVERY rows, send their mean."""
        self.rows.append(row)
        if len(self.rows) >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Send what has gathered."""
        if not self.active or not self.rows:
            self.rows.clear()
            return
        step = int(self.rows[-1]["step"])
        values = {key: sum(r[key] for r in self.rows) / len(self.rows) for key in self.rows[-1] if key != "step"}
        self.rows.clear()
        self.log(values, step)

    def log(self, values: dict[str, float], step: int) -> None:
        """Send one point."""
        if self.active:
            try:
                self.accelerator.log(values, step=step)
            except Exception as error:
                self._give_up(error)

    def end(self) -> None:
        """Close the run."""
        self.flush()
        if self.active:
            try:
                self.accelerator.end_training()
            except Exception as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.active = False
        log.warning("live curve off, training goes on: %s: %s", type(error).__name__, redacted(str(error)))

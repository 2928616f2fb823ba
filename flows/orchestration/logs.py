"""The output of stages as lines of JSON with run, concept and stage, in .svdiff/logs of the clone, for programs."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime
from pathlib import Path

from prefect.runtime import flow_run, task_run

from svdiff.models import scratch


class StageLog:
    """Appends lines to .svdiff/logs/<flow run id>.jsonl; concepts in work at once write to files of their own runs."""

    def __init__(self, stage: str, root: Path) -> None:
        kind, _, name = stage.partition("@")
        run = str(flow_run.id or "none")
        self.path = root / scratch() / "logs" / f"{run}.jsonl"
        self.fields = {
            "flow_run": run,
            "flow_run_name": flow_run.name,
            "task_run": str(task_run.id or "none"),
            "attempt": task_run.run_count,
            "stage": kind,
            "concept": name or None,
            "machine": socket.gethostname(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, line: str) -> None:
        """Append one line, dated."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **self.fields, "message": line}
        with open(self.path, "a") as stream:  # short appends do not mix
            stream.write(json.dumps(record) + "\n")

"""Artifacts in the Prefect UI: scores, pictures and registered version of a concept, progress of a stage."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import time
from typing import Any
from uuid import UUID

from PIL.Image import Image
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)

from flows.pipeline.results import Results
from flows.registry import summary
from flows.registry.runs import sample_grids
from svdiff.secrets import redacted

log = logging.getLogger(__name__)

SERVER_AWAY = 300.0  # seconds in which a bar is not shown again, after Prefect's client has tried for a minute
PERCENT = re.compile(r"(\d+)%\|")  # as tqdm writes it


def publish_concept(results: Results) -> None:
    """A markdown artifact with scores and links, and an image artifact with the sample grid."""
    concept = results.concept
    record = json.loads((results.root / "out" / "register" / f"{concept}.json").read_text())
    text = summary.artifact(results, record)
    create_markdown_artifact(text, key=key("concept", concept), description=f"Scores of {concept}")
    grid = sample_grids(results)["trained"]
    create_image_artifact(data_uri(grid), key=key("samples", concept), description=f"{concept}: prompts by seeds")


class Progress:
    """A progress artifact that follows the bar of one stage; there is none for a stage that shows no bar.

    A server that is away, or refuses, is no reason to end the stage: its bar is then not shown for a while.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None
        self.next = 0.0

    def show(self, bar: str) -> None:
        """Set the artifact to what `bar`, a line of tqdm, says."""
        found = PERCENT.search(bar)
        if found is None or time.monotonic() < self.next:
            return
        try:
            if self.artifact is None:
                made: Any = create_progress_artifact(float(found[1]), key=key("progress", self.stage), description=bar)
                self.artifact = made
            else:
                update_progress_artifact(self.artifact, float(found[1]), description=bar)
        except Exception as error:
            log.warning("the progress of %s is not shown: %s", self.stage, redacted(str(error)))
            self.next = time.monotonic() + SERVER_AWAY


def key(*parts: str) -> str:
    """An artifact's key: small letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())


def data_uri(picture: Image) -> str:
    """A picture as an address that holds it itself: the UI need not reach this machine's files."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

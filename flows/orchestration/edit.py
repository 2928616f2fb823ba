"""Flow `edit-image`: one entry of `edits:` in params.yaml, from its picture to the sheet of its edits and their scores.

prefect deployment run edit-image/edit-image --param edit=woman-on-blue --watch
python -c 'from flows.orchestration.edit import edit_image; edit_image("woman-on-blue")'
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image
from prefect import flow
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from flows.orchestration.artifacts import data_uri, key
from flows.orchestration.parameters import Minutes, Name, check
from flows.orchestration.tasks import dvc_stage
from flows.pipeline.order import own_stages, shared_stages
from svdiff.config import Config, EditConfig


@flow(name="edit-image", flow_run_name="edit-{edit}", persist_result=False)
def edit_image(edit: Name, timeout_minutes: Minutes | None = None, report: bool = False) -> dict[str, str]:
    """Train on one picture, then sample and score its edits; what is up to date is left as it is.

    Args:
        edit: name under `edits:` in params.yaml.
        timeout_minutes: how long a stage may take; it is ended, with everything it started, after that.
        report: afterwards bring the report up to date, for which the other results must be there.
    """
    config = check(edit)
    config.edit_of(edit)
    stages = [*shared_stages(config, edit), *own_stages(config, edit), *(["report"] if report else [])]
    outcomes = {stage: dvc_stage(stage, timeout_minutes) for stage in stages}
    publish_edit(config, edit, Path.cwd())
    return outcomes


def publish_edit(config: Config, edit: str, root: Path) -> None:
    """A markdown artifact with the scores, and an image artifact with the sheet."""
    folder = root / "out" / "edit" / edit
    numbers = json.loads((folder / "metrics.json").read_text())
    text = summary(edit, config.edit_of(edit), list(config.edit.starts), numbers)
    create_markdown_artifact(text, key=key("edit", edit), description=f"Scores of {edit}")
    with Image.open(folder / "sheet.png") as sheet:
        create_image_artifact(
            data_uri(sheet), key=key("edits", edit), description=f"{edit}: prompts by starts and seeds"
        )


def summary(edit: str, request: EditConfig, starts: list[str], numbers: dict[str, float]) -> str:
    """What was asked for, and the scores of each start."""
    return "\n".join(
        [
            f"# {edit}",
            "",
            f"`{request.image}`, “{request.prompt}”, became “{'”, “'.join(request.targets)}”.",
            "",
            "| start | faithfulness (1 − LPIPS to the input) | edit (CLIP cosine with the target) |",
            "|---|---|---|",
            *(f"| {s} | {numbers[f'{s}_faithfulness']:.4f} | {numbers[f'{s}_edit']:.4f} |" for s in starts),
            f"| unchanged input | 1 | {numbers['input_edit']:.4f} |",
            "",
            f"Reconstruction by inversion: PSNR {numbers['reconstruction_psnr']:.2f} dB, "
            f"the autoencoder's own {numbers['autoencoder_psnr']:.2f} dB.",
        ]
    )

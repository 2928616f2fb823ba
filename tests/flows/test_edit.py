"""Flow `edit-image` on a real Prefect server and DVC project."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import pytest
import yaml
from PIL import Image
from prefect.client.orchestration import get_client

from flows.orchestration.edit import edit_image
from svdiff.errors import SvdiffError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

STAGES = """
  train-edit:
    foreach: ${edits}
    do:
      cmd: python stage.py train-edit ${key}
      deps: ["${item.image}"]
      outs: ["out/train-edit/${key}"]
  edit:
    foreach: ${edits}
    do:
      cmd: python edit.py ${key}
      deps: ["out/train-edit/${key}"]
      outs: ["out/edit/${key}"]
"""
EDIT_PY = """
import json, sys
from pathlib import Path
from PIL import Image
folder = Path("out/edit", sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
names = [f"{s}_{m}" for s in ("noise", "inversion", "mixture") for m in ("faithfulness", "edit", "reconstruction")]
numbers = dict.fromkeys([*names, "input_edit", "reconstruction_psnr", "autoencoder_psnr"], 0.25)
(folder / "metrics.json").write_text(json.dumps(numbers | {"inversion_edit": 0.75}))
Image.new("RGB", (48, 16), "red").save(folder / "sheet.png")
"""


@pytest.fixture
def editing_project(dvc_project: Path) -> Path:
    """A DVC project with one edit; the current folder."""
    path = dvc_project / "params.yaml"
    edits = {"on-red": {"image": "photo.png", "prompt": "a dog", "targets": ["a red dog"]}}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"edits": edits}))
    with (dvc_project / "dvc.yaml").open("a") as stages:
        stages.write(STAGES)
    (dvc_project / "edit.py").write_text(EDIT_PY)
    Image.new("RGB", (40, 40), "blue").save(dvc_project / "photo.png")
    return dvc_project


def test_an_edit_from_its_picture_to_the_sheet(editing_project: Path) -> None:
    assert edit_image("on-red") == dict.fromkeys(["check", "train-edit@on-red", "edit@on-red"], "ran")
    with get_client(sync_client=True) as prefect:
        artifacts = {artifact.key: artifact for artifact in prefect.read_artifacts()}
    assert "0.7500" in str(artifacts["edit-on-red"].data)
    assert "“a red dog”" in str(artifacts["edit-on-red"].data)
    picture = str(artifacts["edits-on-red"].data).removeprefix("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (48, 16)
    assert set(edit_image("on-red").values()) == {"unchanged"}


def test_a_bad_picture_or_name_fails_before_any_work(editing_project: Path) -> None:
    (editing_project / "photo.png").write_text("not a picture")
    with pytest.raises(SvdiffError, match=r"photo\.png"):
        edit_image("on-red")
    with pytest.raises(SvdiffError, match="no edit 'dog'"):
        edit_image("dog")
    assert not (editing_project / "out").exists()

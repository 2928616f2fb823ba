"""`svdiff push`: a folder for the Hub, with all that somebody else needs."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from miniature import Project

from flows.registry.push import write_repository
from svdiff.errors import SvdiffError
from svdiff.files import sha256_file


def test_a_concept_becomes_a_folder_for_the_hub(project: Project, tmp_path: Path) -> None:
    results, output = project.results(), tmp_path / "hub"
    write_repository(project.config, results, output)
    assert sha256_file(output / "delta.safetensors") == results.delta_sha256
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "text-to-image"
    assert {"svdiff", "diffusers"} <= set(card.data.tags)
    assert card.data.to_dict()["instance_prompt"] == "a sks dog"
    assert "| identity | 0.6500 |" in card.text
    assert 'personal.load_delta("delta.safetensors", "dog")' in card.text
    assert f'from_pretrained("{project.config.base.model}", dtype=torch.float32)' in card.text
    assert {path.name for path in output.iterdir()} == {"README.md", "delta.safetensors", "trained.png", "base.png"}
    with pytest.raises(SvdiffError, match="where something lies already"):
        write_repository(project.config, results, output)


def test_the_card_loads_the_base_in_the_precision_and_files_that_the_delta_fits(
    project: Project, tmp_path: Path
) -> None:
    base = {"model": "owner/name", "precision": "bf16", "revision": "abc", "variant": "fp16"}
    config = project.config.model_copy(update={"base": project.config.base.replaced(base)})
    write_repository(config, project.results(), tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model == "owner/name"
    assert 'from_pretrained("owner/name", dtype=torch.bfloat16, revision="abc", variant="fp16")' in card.text

"""A concept on a base of every family goes into the registry and comes back as pictures."""

from __future__ import annotations

import io
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from miniature import Project, write_params
from PIL import Image

from flows.pipeline.results import read_results
from flows.registry.register import register
from svdiff.models import family_of, load_pipeline
from svdiff.sampling.images import Job, sample_images
from svdiff.spectral import attach, load_basis
from tests.models.tiny import PIXELS, base_settings, make_tiny

pytestmark = pytest.mark.slow


def drawn(frame) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(image)), int) for image in frame["image"]])


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sd3", "sd3.5", "flux", "flux2", "flux2-klein"])
def test_a_registered_version_draws_what_was_trained(project: Project, tmp_path: Path, family: str) -> None:
    base = base_settings(family, make_tiny(family, tmp_path / "base")) | {"precision": "bf16"}
    write_params(project.root, "dog", base=base)
    project = Project(project.root)
    results = project.results("dog")
    pipe = load_pipeline(project.config.base)
    view = family_of(pipe)
    basis = load_basis(view.network, cache=None, progress=False)
    shifts = attach(view.network, basis, prefix=view.network_name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shifts.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    shifts.delta(concept="dog").save(results.delta)
    jobs = [Job("a sks dog", 1), Job("a dog", 2)]
    trained = sample_images(pipe, jobs, steps=2, guidance=2.0)
    shifts.detach()
    plain = sample_images(pipe, jobs, steps=2, guidance=2.0)
    version = register(project.tracking, project.config, read_results(project.config, "dog", project.root))
    assert version is not None
    mlflow.set_tracking_uri(project.config.tracking.uri)
    model = mlflow.pyfunc.load_model("models:/dog@champion")
    asked = {"steps": 2, "guidance": 2.0, "seeds": [1, 2]}
    got = drawn(model.predict([job.prompt for job in jobs], params=asked))
    zero = drawn(model.predict([job.prompt for job in jobs], params=asked | {"scale": 0.0}))
    assert got.shape == (2, PIXELS, PIXELS, 3)
    for images, expected in ((got, trained), (zero, plain)):
        difference = np.abs(images - np.stack([np.asarray(image, int) for image in expected]))
        assert difference.mean() < 2  # the rounding of bfloat16
    assert np.abs(got - zero).mean() > 4

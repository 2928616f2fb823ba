"""What sampling does not need is imported when somebody needs it, and works then as if it had always been there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from svdiff.spectral import attach, load_basis

# By what they take to import, these would double the time to a picture.
NOT_FOR_PICTURES = {
    *("sympy", "pandas", "scipy.ndimage", "scipy.special", "scipy.stats._stats_py", "scipy.optimize._optimize"),
    *("torch._dynamo.eval_frame", "torch._inductor", "torch.distributed.tensor", "tensorboard"),
    *("matplotlib", "open_clip", "lpips", "mlflow", "prefect", "dvc", "ray", "fastapi"),
    *("diffusers.models.transformers.transformer_flux", "diffusers.models.autoencoders.autoencoder_kl_wan"),
    *("svdiff.base", "svdiff.evaluation", "svdiff.training", "flows"),
}
COMMAND = """
import atexit, sys
atexit.register(lambda: print("loaded:", *sys.modules, file=sys.stderr))
from svdiff.cli import main
main()
"""
CODE = """
import sys
import torch
from svdiff.config import BaseModelConfig
from svdiff.models import load_pipeline
from svdiff.sampling.stage import draw_pictures, sample_images, Job

pipe = load_pipeline(BaseModelConfig(model=sys.argv[1]))
sample_images(pipe, [Job("a dog", 0)], steps=2, guidance=2.0)

from diffusers.schedulers.scheduling_euler_discrete import scipy
assert abs(scipy.stats.beta.ppf(0.5, 2, 2) - 0.5) < 1e-6
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert linear_sum_assignment([[1, 0], [0, 1]])[1].tolist() == [1, 0]
from diffusers import AutoencoderKLWan, FluxTransformer2DModel, models
assert models.transformers.FluxTransformer2DModel is FluxTransformer2DModel
assert models.autoencoders.AutoencoderKL is type(pipe.vae)
from transformers import AutoModel, CLIPTextConfig
assert type(AutoModel.from_config(CLIPTextConfig(num_hidden_layers=1))).__name__ == "CLIPTextModel"
from torch.nn.attention.flex_attention import BlockMask
assert BlockMask.__module__ == "torch.nn.attention.flex_attention"
import scipy.stats.qmc
assert scipy.stats.qmc.Sobol(2).random(2).shape == (2, 2)

seen = []
layer = torch.nn.Linear(2, 2)
model = torch.compile(torch.nn.Sequential(layer), backend=lambda graph, _: seen.append(graph) or graph)
assert torch.equal(model(torch.ones(1, 2)), layer(torch.ones(1, 2))) and seen
import torch._dynamo.utils
assert torch._dynamo.utils.counters and type(torch._dynamo.utils).__name__ == "module"
torch.optim.AdamW(layer.parameters()).step()
print("works")
"""


@pytest.mark.slow
def test_a_picture_is_drawn_without_what_it_does_not_need(tiny_base: Path, tiny_pipe, tmp_path: Path) -> None:
    attach(tiny_pipe.unet, load_basis(tiny_pipe.unet, None, progress=False)).delta().save(tmp_path / "zero.safetensors")
    concepts = {"classes": ["dog"], "concepts": {"rex": {"class_word": "dog"}}, "sample": {"prompts": ["a {subject}"]}}
    (tmp_path / "params.yaml").write_text(json.dumps({"base": {"model": str(tiny_base)}} | concepts))
    asked = ["sample", "--delta", "zero.safetensors", "--prompt", "a dog", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *asked], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stderr.partition("loaded: ")[2].split())
    assert {"diffusers", "svdiff.sampling.stage"} <= loaded
    assert sorted(NOT_FOR_PICTURES & loaded) == []
    assert list(tmp_path.glob("*/*.png")) != []


@pytest.mark.slow
def test_what_pictures_do_without_loads_when_asked(tiny_base: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tiny_base)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[0] == "works"

"""Registered concepts with real deltas on tiny bases, sampled and scored by the real stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from miniature import Project, write_params, write_train
from PIL import Image

from flows.pipeline.results import read_results
from flows.registry.concepts import model_id
from flows.registry.overrides import promote_manually
from flows.registry.promotion import champion_of
from flows.registry.register import Registration, register
from svdiff.config import Config
from svdiff.spectral import attach, load_basis

SAMPLE = {"prompts": ["a {subject}", "a {subject} on a blue background"], "seeds": [0, 1], "steps": 2, "guidance": 2.0}
COLOURS = [(200, 60, 40), (40, 80, 200), (60, 180, 60)]  # of concepts: evaluators must tell them apart
EVALUATORS = {"clip_model": "tiny", "clip_pretrained": "random", "lpips_weights": None}


class Champions(Project):
    """A checkout whose concepts are on a base of its own, at models/base."""

    def __init__(self, root: Path, tiny_base: Path, *concepts: str, **sections: dict) -> None:
        self.base, self.sections = root / "models" / "base", sections
        shutil.copytree(tiny_base, self.base)
        for index, name in enumerate(concepts):
            folder = root / "data" / "concepts" / name
            folder.mkdir(parents=True)
            for number in range(2):
                noise = np.random.default_rng([index, number]).normal(0, 20, (20, 20, 3))
                pixels = np.full((32, 32, 3), 255, np.uint8)  # a plain background: of pairs the subjects are cut out
                pixels[6:26, 6:26] = (COLOURS[index % len(COLOURS)] + noise).clip(0, 255)
                Image.fromarray(pixels).save(folder / f"{number}.png")
        self.concepts = concepts
        self.write_params(root)
        super().__init__(root)

    def write_params(self, root: Path, **sections: dict) -> None:
        """params.yaml, in which `sections` differ."""
        usual = {
            "base": {"model": "models/base"},
            "evaluators": EVALUATORS,
            "sample": SAMPLE,
            "score": {"bootstrap": 100},
        }
        write_params(root, *self.concepts, **(usual | self.sections | sections))

    def change(self, **sections: dict) -> Config:
        """The configuration with other `sections` in params.yaml."""
        from svdiff.config import load_config

        self.write_params(self.root, **sections)
        self.config = load_config(self.root / "params.yaml")
        return self.config

    def train(self, pipe, name: str, *, seed: int = 0, strength: float = 0.3) -> Registration:
        """A delta of random shifts in the place of a trained one, then the real stages up to the registry."""
        from svdiff.evaluation.score import score
        from svdiff.sampling.stage import sample_entry

        write_train(self.root, name, value=float(seed), train_key=f"{name}-{seed}-{strength}")
        shifts = attach(pipe.unet, load_basis(pipe.unet, cache=None, progress=False))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in [*shifts.parameters_spectral(), *shifts.parameters_1d()]:
                parameter += strength * torch.randn(parameter.shape, generator=generator)
        shifts.delta(concept=name).save(self.root / "out" / "train" / name / "delta.safetensors")
        shifts.detach()
        sample_entry(self.config, name)
        score(self.config, name)
        done = register(self.tracking, self.config, read_results(self.config, name, self.root))
        if champion_of(self.tracking, name) is None:  # random shifts are not better than the base
            promote_manually(self.tracking, name, done.version, "for the test")
        return done

    def version(self, name: str, number: int = 1):
        """A version as the registry has it now."""
        return self.tracking.client.get_model_version(name, str(number))

    def delta_file(self, name: str, number: int = 1) -> Path:
        """The registered delta's file in the artifact store."""
        model = self.tracking.client.get_logged_model(model_id(self.version(name, number)))
        return Path(model.artifact_location.removeprefix("file://")) / "artifacts" / "delta.safetensors"


def write_evaluators(root: Path, seed: int) -> dict[str, str]:
    """Small random evaluators as files below `root`, for processes of their own; the section of params.yaml."""
    import lpips
    import open_clip
    from safetensors.torch import save_file

    models = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    texts = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 16, "vision_cfg": models, "text_cfg": texts}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = open_clip.CLIP(**shape)
        backbone = lpips.LPIPS(net="squeeze", lpips=False, pretrained=False, pnet_rand=True, verbose=False).net
    folder = root / "models" / "clip"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_cfg": shape, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    save_file(backbone.state_dict(), root / "models" / "backbone.safetensors")
    return {
        "clip_model": "models/clip",
        "lpips_net": "squeeze",
        "lpips_weights": "models/backbone.safetensors",
    }


def disturb_autoencoder(base: Path) -> None:
    """Change a part of the base that deltas do not name: pictures differ, the UNet's hash does not."""
    from safetensors.torch import load_file, save_file

    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.weight"] *= 3.0
    save_file(weights, file, metadata={"format": "pt"})

"""Train a concept of params.yaml on another base, and take it to plain diffusers as a LoRA file.

In a checkout, with a diffusers folder or a Hub id:

    python examples/real_base.py stable-diffusion-v1-5/stable-diffusion-v1-5 teapot --steps 500

The prior images in out/prior are that base's afterwards; `dvc repro` brings back those of the pipeline.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from svdiff.config import Config, load_config
from svdiff.models import family_of, load_pipeline, scratch
from svdiff.sampling.prior import make_prior_images
from svdiff.spectral import SpectralDelta, export_lora, load_basis
from svdiff.threads import use_threads
from svdiff.training import train


def on_base(config: Config, base: str) -> Config:
    """params.yaml with another base, and the paper's settings for it instead of the embedded base's."""
    values = config.model_dump(exclude_unset=True)
    values["base"] = {"model": base}
    paper = {
        "train": {"lr": 1e-3, "lr_1d": 1e-6, "schedule": "constant", "train_token": False},  # a LoRA file has no token
        "prior": {"eta": 0.0},
        "sample": {"eta": 0.0},
    }
    for section, settings in paper.items():
        values[section] = {**values.get(section, {}), **settings}
    return Config.checked(values)


def main() -> None:
    """Train, export, and draw a picture by diffusers alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="diffusers folder or Hub id")
    parser.add_argument("name", help="a concept of params.yaml")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()

    config = on_base(load_config(), asked.base)
    use_threads(config.threads)
    concept = config.concept(asked.name)
    make_prior_images(config, concept.class_word)
    path = train(config, asked.name, out_dir=asked.output / asked.name, overrides={"steps": asked.steps})

    pipe = load_pipeline(config.base)
    name, network = family_of(pipe).network_name, family_of(pipe).network
    basis = load_basis(network, cache=scratch() / "bases")
    lora = path.with_name("lora.safetensors")
    dropped = export_lora({name: network}, {name: basis}, SpectralDelta.load(path), lora)
    print(f"{lora}: LoRA at full rank; {len(dropped)} shifts of norms have no place in it")

    pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    picture = asked.output / f"{asked.name}-lora.png"
    pipe(f"a {concept.subject}", num_inference_steps=config.sample.steps).images[0].save(picture)
    print(picture)


if __name__ == "__main__":
    main()

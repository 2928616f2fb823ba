"""Personalise a concept from Python, without DVC: prior images, training, pictures.

In a checkout with its pictures in data/concepts/rex/:

    python examples/own_concept.py rex --class-word dog --token qex --prompt "a {subject} on a pink background"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from svdiff.config import Config, load_config
from svdiff.sampling.prior import make_prior_images
from svdiff.sampling.stage import sample_prompts
from svdiff.threads import use_threads
from svdiff.training import train


def with_concept(config: Config, name: str, class_word: str, token: str) -> Config:
    """params.yaml with one more concept, in memory."""
    values = config.model_dump(exclude_unset=True)
    values["classes"] = list(dict.fromkeys([*config.classes, class_word]))
    values["concepts"] = {**values.get("concepts", {}), name: {"class_word": class_word, "token": token}}
    return Config.checked(values)


def main() -> None:
    """Train the concept and print where its pictures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="folder below data/concepts")
    parser.add_argument("--class-word", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--prompt", default="a {subject}")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()

    config = with_concept(load_config(), asked.name, asked.class_word, asked.token)
    use_threads(config.threads)
    make_prior_images(config, asked.class_word)
    delta = train(config, asked.name, out_dir=asked.output / asked.name)
    prompts = config.entry(asked.name).prompts([asked.prompt])
    for path in sample_prompts(
        config, [(delta, 1.0)], prompts, seeds=[0, 1], output=asked.output, settings=config.sample
    ):
        print(path)


if __name__ == "__main__":
    main()

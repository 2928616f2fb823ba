"""Put two concepts into one picture from Python, without DVC: mixes, joint training, pictures with negative prompts (Eq. 10).

In a checkout whose params.yaml has the pair:

    python examples/pair.py two-cats --prompt "a {first} beside a {second}"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from svdiff.config import load_config
from svdiff.data.mixes import make_mixes
from svdiff.sampling.prior import make_prior_images
from svdiff.sampling.stage import default_negatives, sample_prompts
from svdiff.threads import use_threads
from svdiff.training import train


def main() -> None:
    """Train the pair and print where its pictures are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a pair of params.yaml")
    parser.add_argument("--prompt", default="a {first} beside a {second}")
    parser.add_argument("--beta", type=float, default=0.7, help="of Eq. 10; 1 leaves the negative prompts out")
    parser.add_argument("--output", type=Path, default=Path("pictures"))
    asked = parser.parse_args()

    config = load_config()
    use_threads(config.threads)
    config.pair_of(asked.name)
    entry = config.entry(asked.name)
    for class_word in dict.fromkeys(concept.class_word for concept in entry.concepts.values()):
        make_prior_images(config, class_word)
    print(make_mixes(config, asked.name) / "sheet.png")
    delta = train(config, asked.name, out_dir=asked.output / asked.name)
    for path in sample_prompts(
        config,
        [(delta, 1.0)],
        entry.prompts([asked.prompt]),
        seeds=[0, 1],
        output=asked.output,
        settings=config.sample.replaced({"beta": asked.beta}),
        negatives=default_negatives(config, entry),
    ):
        print(path)


if __name__ == "__main__":
    main()

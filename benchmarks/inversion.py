"""How much of a picture comes back from DDIM inversion and sampling with the same prompt (Eq. 6), by the number of steps.

python -m benchmarks.inversion
python -m benchmarks.inversion --steps 10 50 250 --json

The pictures are those of the edit benchmark, which the base was not trained on; nothing is fine-tuned. What the
autoencoder alone keeps is the limit.
"""

from __future__ import annotations

import argparse
import json
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.common import machine, table
from svdiff.base.config import load_base_training
from svdiff.base.loop import load_world
from svdiff.base.scenes import scene_edits
from svdiff.config import load_config
from svdiff.data.concepts import to_square
from svdiff.editing.scores import psnr
from svdiff.evaluation.evaluators import load_evaluators
from svdiff.models import family_of, load_pipeline
from svdiff.sampling.guidance import decode
from svdiff.sampling.inversion import encode_images, invert, reconstruct

if TYPE_CHECKING:
    from PIL.Image import Image


def measure(lengths: list[int]) -> dict[str, dict[str, float]]:
    """Mean PSNR in dB and LPIPS to the pictures, of the autoencoder alone and by steps, and PSNR to what it alone keeps."""
    config = load_config()
    world, pipe = load_world(load_base_training()), load_pipeline(config.base)
    distance = load_evaluators(config.evaluators).distance
    edits = scene_edits(world)
    pictures = [to_square(edit.picture(world), family_of(pipe).image_size) for edit in edits]
    prompts = [edit.prompt for edit in edits]
    latents = encode_images(pipe, pictures)

    def scores(found: list[Image]) -> dict[str, float]:
        apart = [float(distance([one], [other])) for one, other in zip(found, pictures, strict=True)]
        decibels = [psnr(one, other) for one, other in zip(found, pictures, strict=True)]
        return {"psnr": fmean(decibels), "lpips": fmean(apart)}

    limit = decode(pipe, latents)
    results = {"autoencoder": scores(limit)}
    for steps in lengths:
        back = reconstruct(pipe, invert(pipe, latents, prompts, steps=steps), prompts, steps=steps)
        to_limit = fmean(psnr(one, other) for one, other in zip(back, limit, strict=True))
        results[str(steps)] = scores(back) | {"psnr_to_autoencoder": to_limit}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 25, 50, 100, 250])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = measure(arguments.steps)
    if arguments.json:
        print(json.dumps({"machine": machine(), "results": results}))
        return
    rows = [
        [
            name,
            f"{found['psnr']:.2f} dB",
            f"{found['lpips']:.4f}",
            f"{found.get('psnr_to_autoencoder', float('inf')):.2f} dB",
        ]
        for name, found in results.items()
    ]
    print(table(["steps", "PSNR", "LPIPS", "PSNR to the autoencoder's"], rows))


if __name__ == "__main__":
    main()

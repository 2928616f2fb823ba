"""`svdiff train` of several concepts, together and one after the other: time, and memory of the process.

Each way runs in a process of its own, in a checkout of its own, from the pictures to the deltas, with the settings of params.yaml but
for the number of steps; on small bases the two take turns of some seconds, so that both meet the same machine.
`python -m benchmarks.catalogue` prints what comes out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import children_in_turn, in_child, memory_gb

# The two ways, and seconds of a turn of each: about as one needs in the time of the other.
WAYS = {"alone": 6.0, "together": 3.0}
LARGE = Path("build/sd15")


def write_sd15(folder: Path = LARGE, latents: int = 32) -> Path:
    """A pipeline of the shape of SD 1.5 with random weights, once; its words are those of the embedded base."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from svdiff.models.sizes import build

    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=8 * latents,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=build("sd15", "text_encoder", "cpu"),
        tokenizer=CLIPTokenizer.from_pretrained("models/base/tokenizer", model_max_length=77),
        unet=build("sd15", device="cpu", sample_size=latents),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def measure(model: str, concepts: int, steps: int, cache: str) -> dict[str, Any]:
    """Ratios of training together over alone, and what they are made of.

    Args:
        model: a diffusers folder, or `sd15`: concepts of one picture then, and no prior pictures.
        concepts: how many, of those in data/concepts.
        steps: of each; a validation at either end.
        cache: folder of decompositions; the one that is wanted is made before anything is timed.
    """
    large = model == "sd15"
    folder = write_sd15() if large else Path(model)
    with tempfile.TemporaryDirectory() as home:
        arguments = {"model": str(folder.resolve()), "concepts": concepts, "cache": str(Path(cache).resolve())}
        children = {
            way: {"way": way, "home": f"{home}/{way}", "steps": steps, "large": large, **arguments}
            for way in ("decompose", *WAYS)
        }
        results = {"decompose": in_child("benchmarks.together", **children.pop("decompose"))}
        if large:  # one after the other: both at once would not fit into memory
            for way, own in children.items():
                results |= children_in_turn("benchmarks.together", {way: own}, {way: 60.0})
        else:
            results |= children_in_turn("benchmarks.together", children, WAYS)
    for way, result in results.items():
        if "error" in result:
            raise SystemExit(f"training {way}: {result['error']}")
    ratios = {
        name: results["together"][key] / results["alone"][key]
        for name, key in {
            "together_over_alone": "wall_s",
            "cpu_together_over_alone": "cpu_s",
            "memory_together_over_one": "memory_gb",
        }.items()
    }
    parts = {f"{name}_{way}": value for way in WAYS for name, value in results[way].items()}
    return ratios | parts | {"train_steps": steps}


def settings(names: list[str], steps: int, large: bool) -> Any:
    """params.yaml's settings of all concepts, which lie in a checkout's `data` and have the base in `base`."""
    from svdiff.config import Config, load_config

    values = load_config().model_dump(exclude_unset=True)
    kept = {key: values[key] for key in ("train", "sample", "prior")}
    kept["train"] |= {"steps": steps, "validate_every": steps}
    if large:
        kept["train"] |= {"batch_size": 1, "prior_weight": 0.0, "lr": 1e-3, "lr_1d": 1e-6}
        kept["train"] |= {"validation_prompts": ["a {subject}"], "validation_seeds": [0]}
        kept["sample"] |= {"steps": 1}
    own = {
        "base": {"model": "base"},
        "classes": ["cat"],
        "concepts": {name: {"class_word": "cat", "token": "sks"} for name in names},
        "rank": {"concepts": []},
        "tracking": {"live": "none"},
    }
    return Config.model_validate(kept | own)


def child(way: str, model: str, home: str, concepts: int, steps: int, cache: str, large: bool) -> dict[str, float]:
    """Train all concepts one way; when it began and ended, seconds of processors, peak memory (alone: of the first)."""
    from svdiff.config import load_config
    from svdiff.spectral import load_basis
    from svdiff.threads import use_threads
    from svdiff.training import train, train_together

    use_threads(load_config().threads)  # as the command line does
    if way == "decompose":
        from diffusers import UNet2DConditionModel

        load_basis(UNet2DConditionModel.from_pretrained(model, subfolder="unet"), cache, progress=True)
        return {}
    repository, checkout = Path.cwd(), Path(home)
    pictures = sorted(path for path in (repository / "data/concepts").iterdir() if path.is_dir())[:concepts]
    names = [path.name for path in pictures]
    if len(names) < concepts:
        raise SystemExit(f"data/concepts has {len(names)} concepts, {concepts} are wanted: `svdiff sync` brings them")
    config = settings(names, steps, large)
    (checkout / "scratch").mkdir(parents=True)
    for place, target in {"base": Path(model), "scratch/bases": Path(cache)}.items():
        (checkout / place).symlink_to(target)
    for folder in pictures:
        own = checkout / "data/concepts" / folder.name
        own.mkdir(parents=True)
        for picture in sorted(folder.glob("*.png"))[: 1 if large else None]:
            shutil.copy(picture, own)
    shutil.copytree(pictures[0], checkout / "out/prior/cat")
    os.chdir(checkout)
    os.environ["SVDIFF_HOME"] = "scratch"
    started, cpu, peak = time.time(), time.process_time(), 0.0
    if way == "together":
        train_together(config, names)
    else:
        for name in names:
            train(config, name)
            peak = peak or memory_gb()
    spent = {"started": started, "ended": time.time(), "cpu_s": time.process_time() - cpu}
    return spent | {"memory_gb": peak or memory_gb()}


def main() -> None:
    """One of the processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=json.loads, required=True)
    print(json.dumps(child(**parser.parse_args().child)))


if __name__ == "__main__":
    main()

"""`svdiff plan`: what `dvc repro` would run, and about how long."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from ruamel.yaml import YAML

from svdiff.config import Config
from svdiff.errors import SvdiffError

START_UP = 12.0  # seconds of imports and loading, a stage
TRAIN_STEP = 6.0  # a training step against a forward pass of as many pictures: measured 6 on the embedded base at 2 + 2
OTHERS = {"mix": 5.0, "score": 15.0, "register": 10.0, "correlate": 5.0, "report": 8.0}


def plan(config: Config) -> list[str]:
    """Lines for people: each stage that is not up to date with an estimate, and the sum.

    The estimates rest on one forward pass of the base, timed here and now.
    """
    stages = stages_to_run()
    if not stages:
        return ["nothing to run: every stage is up to date"]
    if not Path(config.base.model).is_dir():
        return [*stages, *memory(config), f"no estimate: {config.base.model} is not a folder here"]
    forward = seconds_per_picture(config)
    seconds = {stage: estimate(config, stage, forward) for stage in stages}
    width = max(map(len, stages))
    lines = [
        f"{stage:<{width}}  {_duration(seconds[stage]):<12}" + (f"  if {' or '.join(causes)} changes" if causes else "")
        for stage, causes in stages.items()
    ]
    total = f"{'together':<{width}}  {_duration(sum(seconds.values())):<12}"
    return [
        *(line.rstrip() for line in lines),
        *memory(config),
        f"{total}  one after another, by a pass of the UNet timed now",
    ]


def memory(config: Config) -> list[str]:
    """What a training of shifts holds, the rank up to which it fits each card, and whether it fits the one that is here.

    Nothing for other methods.
    """
    import torch

    from svdiff.models.memory import CARDS, largest_rank, said, training_memory, verdict
    from svdiff.models.sizes import build

    if config.train.method != "svdiff":
        return []
    itemsize = 4 if config.base.precision == "fp32" else 2
    try:
        network = build(config.base.config or config.base.model)
    except SvdiffError as error:
        return [f"memory: unknown, {error}"]
    subset, rank = config.train.subset, config.train.rank
    holds = training_memory(network, subset, rank, itemsize).total
    fits = (f"{card} GB: {said(largest_rank(network, card, subset, itemsize))}" for card in CARDS)
    lines = [f"memory: the network in training holds {holds / 2**30:.2f} GiB beside activations; {', '.join(fits)}"]
    if torch.cuda.is_available():
        here = torch.cuda.get_device_properties(0).total_memory / 2**30
        lines.append(f"memory: on this GPU of {here:.0f} GB it {verdict(network, here, subset, rank, itemsize)}")
    return lines


def stages_to_run() -> dict[str, list[str]]:
    """The stages that `dvc repro` would run, in order: what is stale, and what depends on it.

    A stage that is not stale itself has the stages whose outputs it waits for: should they come out as they were, it does
    not run. Not by `dvc repro --dry`, which fails where an upstream output is not there yet. Raises SvdiffError if DVC cannot say.
    """
    itself = set(json.loads(_dvc("status", "--json")))
    edges = re.findall(r'"([^"]+)" -> "([^"]+)"', _dvc("dag", "--dot"))
    stale = set(itself)
    upstream: dict[str, set[str]] = {stage: set() for stage in stale}
    for before, after in edges:
        upstream.setdefault(after, set()).add(before)
    order = list(TopologicalSorter(upstream).static_order())
    for stage in order:
        if upstream.get(stage, set()) & stale:
            stale.add(stage)
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    frozen = {name for name, stage in stages.items() if "frozen" in stage}
    return {
        stage: [] if stage in itself else sorted(upstream[stage] & stale)
        for stage in order
        if stage in stale - frozen and not stage.endswith(".dvc")
    }


def _dvc(*arguments: str) -> str:
    dvc = shutil.which("dvc", path=str(Path(sys.executable).parent)) or shutil.which("dvc")
    if dvc is None:
        raise SvdiffError("the dvc command is not installed: pip install 'svdiff[workflow]'")
    done = subprocess.run([dvc, *arguments], capture_output=True, text=True)
    if refused := re.search(r"\[Errno (\d+)\] [^:]+: '(.+)'", done.stderr):  # a disk that does
        raise OSError(int(refused[1]), os.strerror(int(refused[1])), refused[2])
    if done.returncode not in (0, 1) or not done.stdout.strip():
        raise SvdiffError(f"`dvc {' '.join(arguments)}` failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def estimate(config: Config, stage: str, forward: float) -> float:
    """Seconds of a stage, `forward` being those of one picture's pass through the UNet."""
    kind, _, name = stage.partition("@")
    kind = kind.removesuffix("-pair").removesuffix("-edit")
    guided = 2 * forward
    sampled = config.sample.steps * guided
    work = OTHERS.get(kind, 0.0)
    if kind == "prior":
        work = config.prior.images * config.prior.steps * guided
    elif kind == "train" or kind == "second-run":
        work = _training(config, name, {}, forward)
    elif kind == "sample":
        pictures = len(config.sample_prompts(name)) * len(config.sample.seeds)
        pictures += len(config.entry(name).class_prompts(config.prior.prompt)) * config.sample.drift_pictures
        work = 2 * pictures * sampled
    elif kind == "edit":
        once = len(config.edit.starts) * len(config.edit.seeds) * guided + forward  # and a step of inversion
        work = OTHERS["score"] + (1 + len(config.edits[name].targets)) * config.edit.steps * once
    elif kind == "rank":
        once = _training(config, name, {"steps": config.rank.steps}, forward)
        once += len(config.rank.prompts) * len(config.rank.seeds) * sampled
        work = (len(config.rank.ranks) + 1) * once
    return START_UP + work


def _training(config: Config, name: str, overrides: dict[str, int], forward: float) -> float:
    settings = config.train_config(name, overrides)
    pictures = settings.batch_size * (2 if settings.prior_weight > 0 else 1) * settings.accumulation
    validations = 1 + settings.steps // settings.validate_every
    drawn = len(config.validation_prompts(name, settings)) * len(settings.validation_seeds)
    return settings.steps * pictures * TRAIN_STEP * forward + validations * drawn * config.sample.steps * 2 * forward


def seconds_per_picture(config: Config) -> float:
    """Time of one picture's pass through the denoising network, in a batch of eight."""
    import torch

    from svdiff.models import family_of, load_pipeline

    pipe = load_pipeline(config.base)
    family = family_of(pipe)
    latents = torch.zeros(8, *family.latent_shape, device=family.device)
    timesteps = torch.full((8,), family.objective.level(0.5), device=family.device)
    with torch.no_grad():
        conditions = family.encode([""] * 8)

    def timings() -> Iterator[float]:
        for _ in range(4):
            started = time.perf_counter()
            with torch.no_grad():
                predicted = family.predict(latents, timesteps, conditions)
            predicted.sum().item()  # a GPU computes after the call returns
            yield time.perf_counter() - started

    return min(timings()) / 8


def _duration(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"

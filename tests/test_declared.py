"""What a stage opens and reads of params.yaml while it runs is what dvc.yaml says: on the tiny base, in this process."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from svdiff.config import Config, load_config
from svdiff.sections import Section

ROOT = Path(__file__).parent.parent
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = """
base: {model: models/base}
evaluators: {clip_model: models/clip, lpips_net: squeeze, lpips_weights: models/lpips/backbone.safetensors, identity_model: models/identity}
classes: [dog, cat]
regularisation: {panda: data/panda}
concepts:
  one: {class_word: dog, token: sks}
  two: {class_word: cat, token: zwx}
pairs:
  both: {concepts: [one, two]}
edits:
  red: {image: data/concepts/one/0.png, prompt: a dog, targets: [a red dog]}
prior: {images: 2, steps: 1}
train: {steps: 2, validate_every: 2, save_every: 1, validation_seeds: [0]}
sample: {prompts: ["a {subject} on a red background"], seeds: [0], steps: 1, drift_pictures: 2}
mix: {mixes: 2, prompts: ["a {first} on the left and a {second} on the right"], validation_prompts: ["a {subject}"]}
edit: {train: {steps: 2}, steps: 2, seeds: [0]}
score: {bootstrap: 100}
correlate: {second_runs: [one]}
rank: {concepts: [one], ranks: [1], steps: 1, seeds: [0]}
tracking: {live: none}
"""
#: Keys that decide nothing that a stage writes: where the curve is shown, how many pictures are drawn at once, and other
#: methods' rates, which are looked at wherever settings are put together.
NEUTRAL = r"tracking\..*|sample\.batch_size|train\.methods"
#: What is read in vain, or comes in another way: an edit has no class; pictures and mixes stand in the key of each training.
ANOTHER_WAY = {"train-edit": ["prior.prompt"], "report": ["data/concepts", "out/mix"]}
#: Who is asked for: the entry that a stage is named after stands in the sections of entries, with all others.
NAMES = {"classes", "regularisation", "concepts", "pairs", "edits"}
#: The section of each class of settings.
OF_CLASS = {field.annotation: name for name, field in Config.model_fields.items() if name not in NAMES}

_opened: set[Path] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str) and not arguments[2] & os.O_WRONLY:
        _opened.add(Path(os.path.abspath(arguments[0])))


sys.addaudithook(_note)


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[set[Path], set[str]]]:
    """Files that Python opens, and keys of params.yaml that are read, while this is entered."""
    global _opened
    _opened, keys = set(), set()
    plain, dumped = Section.__getattribute__, Section.model_dump

    def reading(section: Section, name: str) -> Any:
        of = OF_CLASS.get(type(section))
        if of and name in type(section).model_fields:
            keys.add(f"{of}.{name}")
        return plain(section, name)

    def dumping(section: Section, **options: Any) -> Any:
        values = dumped(section, **options)
        if (of := OF_CLASS.get(type(section))) not in (
            None,
            "train",
        ):  # what is put together for a training is read there
            keys.update(f"{of}.{name}" for name in values)
        return values

    with monkeypatch.context() as patched:
        patched.setattr(Section, "__getattribute__", reading)
        patched.setattr(Section, "model_dump", dumping)
        try:
            yield _opened, keys
        finally:
            _opened = None


def write_evaluators(models: Path) -> None:
    """Small random networks in the files that open_clip, lpips and transformers write."""
    import lpips
    import open_clip
    import torch
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, ResNetConfig, ResNetModel

    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    shape = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = open_clip.CLIP(**shape)
        backbone = lpips.LPIPS(net="squeeze", lpips=False, pretrained=False, pnet_rand=True, verbose=False).net
        identity = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"))
    for folder in ("clip", "lpips"):
        (models / folder).mkdir(parents=True)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (models / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": preprocess}))
    save_file(clip.state_dict(), models / "clip/open_clip_model.safetensors")
    save_file(backbone.state_dict(), models / "lpips/backbone.safetensors")
    identity.save_pretrained(models / "identity")
    sides = {"height": 32, "width": 32}
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=sides).save_pretrained(models / "identity")


@pytest.fixture(scope="module")
def project(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("declared")
    (root / "models").mkdir()
    (root / "models/base").symlink_to(tiny_base)
    (root / "params.yaml").write_text(PARAMS)
    write_evaluators(root / "models")
    for folder in ("concepts/one", "concepts/two", "panda"):
        (root / "data" / folder).mkdir(parents=True)
        for number in range(3):
            picture = Image.effect_noise((40, 40), 40 + number).convert("RGB")
            if folder == "concepts/two":  # unlike the other
                picture = Image.new("RGB", (40, 40), (200, 30, 40 * number))
            picture.save(root / f"data/{folder}/{number}.png")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        patched.setenv("SVDIFF_HOME", str(root / ".svdiff"))
        yield root


@pytest.fixture(scope="module")
def made() -> set[str]:
    """Stages that have run."""
    return set()


def run_stage(stage: str, config: Config, name: str) -> None:
    """What the stage's command calls; the imports are cheap, as each is needed by the stages before."""
    from svdiff.check import check
    from svdiff.data.mixes import make_mixes
    from svdiff.editing.stage import edit
    from svdiff.evaluation.correlation import correlate, train_second_run
    from svdiff.evaluation.score import score
    from svdiff.experiments.rank import rank
    from svdiff.report.page import report
    from svdiff.sampling.prior import make_prior_images
    from svdiff.sampling.stage import sample_entry
    from svdiff.training import train

    own: dict[str, Any] = {
        "prior": lambda config, name: [
            make_prior_images(config, word) for word in (config.classes if name == "dog" else [name])
        ],
        "mix": make_mixes,
        "train": train,
        "sample": sample_entry,
        "score": score,
        "edit": edit,
        "second-run": train_second_run,
        "rank": rank,
    }
    shared: dict[str, Any] = {"check": check, "correlate": correlate, "report": report}
    if stage in shared:
        shared[stage](config)
    else:
        own[stage.removesuffix("-pair").removesuffix("-edit").removeprefix("own-")](config, name)


#: Every stage but `register`, with the name that it is for; in this order, as each reads what others have made.
ORDER = {
    "check": "",
    "prior": "dog",
    "own-prior": "panda",
    "mix": "both",
    "train": "one",
    "sample": "one",
    "score": "one",
    "train-pair": "both",
    "train-edit": "red",
    "second-run": "one",
    "sample-pair": "both",
    "score-pair": "both",
    "edit": "red",
    "correlate": "",
    "rank": "one",
    "report": "",
}


def body(stage: str) -> dict[str, Any]:
    found: dict[str, Any] = STAGES[stage].get("do", STAGES[stage])
    return found


def declared(stage: str, kind: str) -> list[str]:
    """Paths or parameters of a stage as dvc.yaml names them, filled in."""
    written = {"base.model": "models/base", "item.class_word": "dog", "key": ORDER[stage], "item": ORDER[stage]}
    written |= {"item.image": "data/concepts/one/0.png"} | ({"item": "data/panda"} if stage == "own-prior" else {})
    written |= {f"item.concepts[{place}]": name for place, name in (("0", "one"), ("1", "two"), ("-1", "two"))}
    paths = []
    for entry in body(stage).get(kind, []):
        path = entry if isinstance(entry, str) else next(iter(entry))
        for name, meant in written.items():
            path = path.replace(f"${{{name}}}", meant)
        assert "$" not in path
        paths.append(path)
    return paths


def test_every_stage_that_works_by_itself_is_compared() -> None:
    others = {name for name, stage in STAGES.items() if stage.get("frozen")} | {"register", "register-pair"}
    assert set(STAGES) - others == set(ORDER)


FAST = ("check", "prior", "mix", "train", "sample", "score")


@pytest.mark.parametrize("stage", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in ORDER])
def test_a_stage_opens_and_reads_what_it_declares(
    project: Path, made: set[str], tiny_base: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config()
    for earlier in list(ORDER)[: list(ORDER).index(stage)]:
        if earlier not in made:
            run_stage(earlier, config, ORDER[earlier])
            made.add(earlier)
    made.add(stage)
    with recorded(monkeypatch) as (opened, keys):
        run_stage(stage, config, ORDER[stage])
    inside = {path.relative_to(project) for path in opened if project in path.parents and path.is_file()}
    inside |= {Path("models/base") / path.relative_to(tiny_base) for path in opened if tiny_base in path.parents}
    inside = {path for path in inside if path.parts[0] != ".svdiff"}
    assert inside or stage == "correlate", "nothing was recorded"
    allowed = [Path(path) for kind in ("deps", "outs", "plots", "metrics") for path in declared(stage, kind)]
    allowed += map(Path, ANOTHER_WAY.get(stage, []))
    if Path("out/evaluators.json") in allowed:  # says which these are
        allowed += map(Path, config.evaluators.local.values())
    undeclared = {path for path in inside if not any(path == known or known in path.parents for known in allowed)}
    assert {str(path) for path in undeclared if not re.search(r"/\.", f"/{path}")} == set()
    if Path("params.yaml") in allowed:
        return
    named = declared(stage, "params") + ANOTHER_WAY.get(stage, [])
    read = {key for key in keys if not re.fullmatch(NEUTRAL, key)}
    assert {key for key in read if not any(key == name or key.startswith(f"{name}.") for name in named)} == set()

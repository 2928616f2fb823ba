"""`svdiff check`: what it refuses, and that nothing is removed before it has been asked."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from svdiff.base.tokenizer import load, save
from svdiff.base.words import SPECIAL_WORDS
from svdiff.check import EVALUATORS, OUTPUT, check
from svdiff.config import BaseModelConfig, load_config
from svdiff.errors import SvdiffError
from svdiff.models import load_words
from svdiff.models.stable_diffusion import StableDiffusion
from tests.models.tiny import make_tiny

ROOT = Path(__file__).parent.parent
LONG = "a red dog and a red dog and a red dog and a red dog"  # the tiny base reads 14 words


def params(base: Path | str, **sections: Any) -> dict[str, Any]:
    return {
        "base": {"model": str(base)},
        "evaluators": {"clip_model": "ViT-B-32", "clip_pretrained": "openai", "lpips_weights": None},
        "classes": ["dog", "cat"],
        "concepts": {"one": {"class_word": "dog", "token": "sks"}, "two": {"class_word": "cat", "token": "zwx"}},
        "sample": {"prompts": ["a {subject} on a red background"]},
        "rank": {"concepts": []},
        **sections,
    }


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checked(base: Path | str, **sections: Any) -> Path:
    Path("params.yaml").write_text(yaml.safe_dump(params(base, **sections)))
    return check(load_config())


def test_what_the_base_can_read_passes_and_leaves_the_same_file_whatever_it_says(tiny_base: Path) -> None:
    pair = {"pairs": {"both": {"concepts": ["one", "two"]}}}
    edit = {"edits": {"red": {"image": "a.png", "prompt": "a dog", "targets": ["a red dog"]}}}
    first = checked(tiny_base, **pair, **edit, rank={"concepts": ["one"]}).read_bytes()
    assert checked(tiny_base).read_bytes() == first


@pytest.mark.parametrize(
    ("sections", "place"),
    [
        ({"train": {"prompt": f"{LONG} and a {{subject}}"}}, "one"),
        ({"train": {"validation_prompts": [LONG]}}, "one"),
        ({"prior": {"prompt": f"{LONG} and a {{subject}}"}}, "one"),
        ({"sample": {"prompts": [LONG]}}, "one"),
        ({"sample": {"prompts": ["a {subject}"], "beta": 0.5, "negatives": [LONG]}}, "sample.negatives"),
        ({"rank": {"concepts": ["one"], "prompts": {"edit": f"{LONG} and a {{subject}}"}}}, "rank.prompts"),
        ({"edits": {"red": {"image": "a.png", "prompt": LONG, "targets": ["a dog"]}}}, "edits.red"),
        ({"edits": {"red": {"image": "a.png", "prompt": "a dog", "targets": [LONG]}}}, "edits.red"),
        ({"pairs": {"both": {"concepts": ["one", "two"]}}, "mix": {"prompts": [LONG + "{first} {second}"]}}, "both"),
        (
            {
                "pairs": {"both": {"concepts": ["one", "two"]}},
                "train": {"prompt": "a photo of a {subject}"},  # fits alone, and not with both and their places
            },
            "pairs.both",
        ),
    ],
)
def test_a_prompt_that_would_be_cut_is_refused_with_its_place(tiny_base: Path, sections: dict, place: str) -> None:
    with pytest.raises(SvdiffError, match=rf"{place}: prompt '.*' is \d+ tokens long; the text encoder reads 16"):
        checked(tiny_base, **sections)
    assert not OUTPUT.exists()


def test_a_token_that_is_several_to_the_base_is_refused(tiny_base: Path) -> None:
    with pytest.raises(SvdiffError, match=r"concepts\.one: token 'qqq' is 3 tokens"):
        checked(tiny_base, concepts={"one": {"class_word": "dog", "token": "qqq"}})


def test_a_hub_id_is_refused_with_the_command_that_brings_it() -> None:
    fix = r"hf download some/model --local-dir models/model`, and set base\.model: models/model"
    with pytest.raises(SvdiffError, match=fix):
        checked("some/model")
    Path("model.safetensors").touch()
    Path("params.yaml").write_text(
        yaml.safe_dump(params("") | {"base": {"model": "model.safetensors", "config": "some/model"}})
    )
    with pytest.raises(SvdiffError, match=r"base\.config is 'some/model'.* set base\.config: models/model"):
        check(load_config())


def test_a_resolution_that_is_no_whole_number_of_patches_is_refused(tiny_base: Path) -> None:
    with pytest.raises(SvdiffError, match=r"base\.resolution is 25; expected a multiple of 2 pixels"):
        Path("params.yaml").write_text(
            yaml.safe_dump(params("") | {"base": {"model": str(tiny_base), "resolution": 25}})
        )
        check(load_config())


def test_a_base_without_one_of_its_text_encoders_can_be_checked(tmp_path: Path) -> None:
    base = make_tiny("sd3", tmp_path / "sd3")
    index = json.loads((base / "model_index.json").read_text())
    index |= {"tokenizer_3": [None, None], "text_encoder_3": [None, None]}
    (base / "model_index.json").write_text(json.dumps(index))
    checked(base)


@pytest.mark.parametrize("family", ["flux", "flux2-klein"])
def test_negative_prompts_of_a_distilled_base_are_refused(tmp_path: Path, family: str) -> None:
    base = make_tiny(family, tmp_path / family)
    if family == "flux2-klein":
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"is_distilled": True}))
    flow = {"prior": {"eta": 0.0}}
    checked(base, **flow)
    with pytest.raises(SvdiffError, match="the base is distilled"):
        checked(base, **flow, sample={"prompts": ["a {subject}"], "beta": 0.5})


def test_weights_that_open_clip_does_not_have_are_refused(tiny_base: Path) -> None:
    evaluators = {"clip_model": "ViT-B-32", "clip_pretrained": "opena", "lpips_weights": None}
    with pytest.raises(SvdiffError, match=r"clip_pretrained is 'opena'.*laion2b_s34b_b79k.*openai"):
        checked(tiny_base, evaluators=evaluators)


def test_other_evaluators_are_another_file_and_the_same_ones_are_not(tiny_base: Path) -> None:
    hub = {"clip_model": "ViT-B-32", "clip_pretrained": "openai"}
    checked(tiny_base)
    published = EVALUATORS.read_bytes()
    Path("models/lpips").mkdir(parents=True)
    Path("models/lpips/backbone.safetensors").write_bytes(b"one")
    own = {"evaluators": hub | {"lpips_weights": "models/lpips/backbone.safetensors"}}
    checked(tiny_base, **own)
    first = EVALUATORS.read_bytes()
    checked(tiny_base, **own, train={"steps": 3})
    assert published != first == EVALUATORS.read_bytes()
    Path("models/lpips/backbone.safetensors").write_bytes(b"another")
    checked(tiny_base, **own)
    assert EVALUATORS.read_bytes() != first


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("clip_model", "models/clip", "models/clip holds no open_clip_config.json"),
        ("lpips_weights", "models/lpips/backbone.safetensors", "backbone.safetensors does not exist"),
        ("identity_model", "models/identity", "'models/identity' is not a folder here"),
        ("clip_model", "./clip", "follows evaluators by the files in models/"),
        ("lpips_weights", "models/../other.safetensors", "follows evaluators by the files in models/"),
        ("identity_model", "/somewhere/else", "follows evaluators by the files in models/"),
    ],
)
def test_evaluators_that_are_not_here_are_refused_before_anything_is_trained(
    tiny_base: Path, key: str, value: str, words: str
) -> None:
    evaluators = {"clip_model": "ViT-B-32", "clip_pretrained": "openai", "lpips_weights": None} | {key: value}
    if key == "clip_model":
        del evaluators["clip_pretrained"]
    with pytest.raises(SvdiffError, match=words):
        checked(tiny_base, evaluators=evaluators)
    assert not OUTPUT.exists()


def test_evaluators_change_the_stages_that_score_and_no_others() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    bodies = {name: stage.get("do", stage) for name, stage in stages.items()}
    scoring = {"score", "score-pair", "edit", "rank"}
    assert {name for name, body in bodies.items() if str(EVALUATORS) in body.get("deps", [])} == scoring
    assert {name for name, body in bodies.items() if "evaluators" in body.get("params", [])} == scoring
    followed = {name for name, body in bodies.items() if {"models/clip", "models/lpips"} & set(body.get("deps", []))}
    assert not followed, "an evaluator that params.yaml does not name is none"


def test_a_base_that_is_not_here_is_refused() -> None:
    with pytest.raises(SvdiffError, match="'models/base' is not a folder here"):
        checked("models/base")


@pytest.fixture(scope="module")
def clip_words(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusion:
    """The vocabulary of Stable Diffusion 1 and 2, which open_clip brings along."""
    import open_clip
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    packed = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(packed.read_bytes()).decode().splitlines()[1 : 49152 - 256 - 2 + 1]
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return StableDiffusion(SimpleNamespace(tokenizer=CLIPTokenizer.from_pretrained(folder)))


@pytest.mark.parametrize("token", ["sks", "ohwx", "olis", "pll", "nwa"])
def test_rare_words_of_clip_are_tokens(clip_words: StableDiffusion, token: str) -> None:
    clip_words.check_token(token)


@pytest.mark.parametrize("token", ["dog", "Monster", "robot", "glasses", "grey", "thing"])
def test_ordinary_words_of_clip_are_no_tokens(clip_words: StableDiffusion, token: str) -> None:
    with pytest.raises(SvdiffError, match=f"'{token}' is an ordinary word to the base"):
        clip_words.check_token(token)


@pytest.mark.parametrize(("token", "warned"), [("sks", False), ("zwx", False), ("white", True), ("left", True)])
def test_words_that_a_small_base_was_trained_on_are_warned_of(
    tiny_base: Path, caplog: pytest.LogCaptureFixture, token: str, warned: bool
) -> None:
    load_words(BaseModelConfig(model=str(tiny_base))).check_token(token)
    assert ("ordinary word" in caplog.text) == warned


def test_the_embedded_bases_own_words_for_tokens_are_rare_enough(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for names in (200, 2000):
        save(tmp_path / str(names), names)
        words = StableDiffusion(SimpleNamespace(tokenizer=load(tmp_path / str(names))))
        for token in SPECIAL_WORDS:
            words.check_token(token)
        assert not caplog.text
        for token in ("robot", "hat", "tree", "blue"):
            words.check_token(token)
            assert f"token '{token}' is number" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(("first", "second"), [("sks", "SKS"), ("sks", "sks")])
def test_tokens_that_the_tokenizer_cannot_tell_apart_are_refused(
    clip_words: StableDiffusion, first: str, second: str
) -> None:
    clip_words.check_tokens([first, "olis"])
    with pytest.raises(SvdiffError, match="are one to the base's tokenizer"):
        clip_words.check_tokens([first, second])


def test_stages_that_params_names_folders_of_are_behind_the_check() -> None:
    stages = {
        name: stage.get("do", stage)
        for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items()
    }
    outs = {
        name: [
            path if isinstance(path, str) else next(iter(path))
            for kind in ("outs", "metrics", "plots")
            for path in stage.get(kind, [])
        ]
        for name, stage in stages.items()
    }

    def behind(name: str) -> bool:
        deps = stages[name]["deps"]
        makers = [other for other, paths in outs.items() if other != name and any(path in deps for path in paths)]
        return str(OUTPUT) in deps or any(behind(maker) for maker in makers)

    named = [name for name, paths in outs.items() if any("$" in path for path in paths)]
    assert len(named) > 10
    assert [name for name in named if not behind(name)] == []


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["../../notes"], "concepts": {}},
        pytest.param(
            {"edits": {"../../notes": {"image": "photo.png", "prompt": "a dog", "targets": ["a red dog"]}}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_dvc_removes_nothing_that_a_name_in_params_points_at(tiny_base: Path, tmp_path: Path, change: dict) -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    pipeline["stages"] = {name: stage for name, stage in pipeline["stages"].items() if "frozen" not in stage}
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    Path("models").mkdir()
    shutil.copytree(ROOT / "svdiff", "svdiff", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tiny_base, "base")
    values = yaml.safe_load((ROOT / "params.yaml").read_text()) | params("base") | {"pairs": {}, "edits": {}}
    Path("params.yaml").write_text(yaml.safe_dump(values | change))
    Path("photo.png").touch()
    Path("notes").mkdir()
    Path("notes/diary.txt").write_text("years of work")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet", "--no-scm"], check=True)
    command = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "../../notes" in done.stderr
    assert "failed to reproduce 'check'" in done.stderr
    assert Path("notes/diary.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"prior": {"eta": 1.0}}, "prior.eta: η is 1.0"),
        ({"sample": {"prompts": ["a {subject}"], "eta": 0.5}}, "sample.eta: η is 0.5"),
        (
            {"edits": {"red": {"image": "a.png", "prompt": "a dog", "targets": ["a cat"]}}},
            "edit.starts.inversion.eta: η is 0.5",
        ),
        (
            {"train": {"single_subject_weight": 0.1}},
            "one: train.single_subject_weight is a loss on cross-attention maps",
        ),
        ({"train": {"min_snr_gamma": 5}}, "one: train.min_snr_gamma is 5.0, and Stable Diffusion 3 predicts a flow"),
    ],
)
def test_what_the_family_of_the_base_cannot_do_is_refused_before_its_weights_are_loaded(
    tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    base = make_tiny("sd3", tmp_path / "sd3")
    for weights in base.rglob("*.safetensors"):
        weights.unlink()
    checked(base)
    with pytest.raises(SvdiffError, match=message) as error:
        checked(base, **sections)
    assert "\n" not in str(error.value)


def test_gradients_that_would_vanish_are_refused(tiny_base: Path) -> None:
    written = params(tiny_base)
    written["base"]["precision"] = "fp16"
    Path("params.yaml").write_text(yaml.safe_dump(written))
    with pytest.raises(SvdiffError, match=r"one: base\.precision is fp16 and train\.precision no"):
        check(load_config())
    Path("params.yaml").write_text(yaml.safe_dump(written | {"train": {"precision": "fp16"}}))
    check(load_config())


@pytest.mark.parametrize("method", ["full", "lora", "custom-diffusion"])
def test_weights_trained_beside_ones_of_another_precision_are_refused(tiny_base: Path, method: str) -> None:
    half = {"base": {"model": str(tiny_base), "precision": "bf16"}}
    Path("params.yaml").write_text(yaml.safe_dump(params("") | half | {"train": {"method": method}}))
    with pytest.raises(SvdiffError, match=rf"one: base\.precision is bf16 and train\.method {method}"):
        check(load_config())

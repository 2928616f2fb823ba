"""params.yaml: what is wrong is named, with what is allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from svdiff.config import Config, describe, load_config
from svdiff.errors import SvdiffError
from svdiff.sections import METHOD_RATES

ROOT = Path(__file__).parent.parent


@pytest.fixture
def params(tmp_path: Path) -> Any:
    """Write changed copies of the project's own params.yaml."""

    def write(change: Any) -> Path:
        values = yaml.safe_load((ROOT / "params.yaml").read_text())
        change(values)
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


def test_the_projects_own_parameters_are_valid_and_described() -> None:
    config = load_config(ROOT / "params.yaml")
    lines = "\n".join(describe(config))
    assert all(f"train.{name}" in lines for name in type(config.train).model_fields)
    assert "None\n    None" not in lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v["train"].update(learning_rate=1), ["train.learning_rate", "unknown key", "lr_1d"]),
        (lambda v: v["train"].update(steps=-1), ["train.steps", "-1", "greater than or equal to 1"]),
        (lambda v: v["sample"].update(steps=501), ["sample.steps", "501", "less than or equal to 500"]),
        (lambda v: v["prior"].update(guidance=0), ["prior.guidance", "greater than or equal to 1"]),
        (lambda v: v["sample"].update(guidance=1, beta=0.5), ["sample", "beta 0.5 has no effect with guidance 1"]),
        (
            lambda v: v["edit"].update(starts={"input": {"eta": 0, "alpha": 1}}),
            ["edit.starts", "called input", "another name"],
        ),
        (lambda v: v["train"].update(method="svd"), ["train.method", "'svdiff'", "'lora'", "'svd'"]),
        (
            lambda v: v["concepts"]["scarf-cat"].update(train={"lrr": 1}),
            ["concepts.scarf-cat.train.lrr", "lr_1d"],
        ),
        (lambda v: v["concepts"]["scarf-cat"].update(train={"lr": -1}), ["concepts.scarf-cat.train.lr", "-1"]),
        (lambda v: v["concepts"]["scarf-cat"].update(class_word="wolf"), ["scarf-cat", "'wolf'", "classes"]),
        (lambda v: v["concepts"].update({"../evil": {"class_word": "dog"}}), ["../evil", "letters"]),
        (
            lambda v: v["pairs"].update({"scarf-cat": v["pairs"]["two-cats"]}),
            ["'scarf-cat'", "concepts", "pairs"],
        ),
        (lambda v: v["pairs"]["two-cats"].update(concepts=["scarf-cat", "nobody"]), ["two-cats", "'nobody'"]),
        (lambda v: v["pairs"]["two-cats"].update(concepts=["scarf-cat"] * 2), ["two-cats", "twice"]),
        (lambda v: v["pairs"]["two-cats"].update(concepts=["scarf-cat"]), ["pairs.two-cats.concepts", "2"]),
        (lambda v: v["concepts"]["scarf-cat"].update(token="zwx"), ["two-cats", "zwx, zwx", "token"]),
        (lambda v: v["pairs"]["two-cats"].update(train={"lr": -1}), ["pairs.two-cats.train.lr", "-1"]),
        (lambda v: v["pairs"]["two-cats"].update(mixes=3), ["pairs.two-cats.mixes", "unknown key", "train"]),
        (lambda v: v["mix"].update(layouts=["diagonal"]), ["mix.layouts", "'left-right'", "diagonal"]),
        (lambda v: v["mix"].update(prompts=["a {subject}"]), ["mix.prompts", "{second}", "a {subject}"]),
        (lambda v: v["mix"]["train"].update(mix_probability=1.5), ["mix_probability", "1.5"]),
        (lambda v: v["sample"].update(beta=2), ["sample.beta", "2"]),
        (lambda v: v["rank"].update(concepts=["nobody"]), ["rank.concepts", "nobody", "scarf-cat"]),
        (lambda v: v["rank"].update(ranks=[0]), ["rank.ranks", "from 1"]),
        (lambda v: v.update(extra=1), ["extra", "unknown key", "concepts"]),
        (lambda v: v.pop("sample"), ["sample", "required"]),
    ],
)
def test_a_bad_value_names_itself(params: Any, change: Any, words: list[str]) -> None:
    with pytest.raises(SvdiffError) as error:
        load_config(params(change))
    for word in words:
        assert word in str(error.value)


def test_every_mistake_is_reported_at_once(params: Any) -> None:
    path = params(lambda v: (v["train"].update(steps=0, warmup=-2), v["prior"].update(images="many")))
    with pytest.raises(SvdiffError) as error:
        load_config(path)
    for key in ("train.steps", "train.warmup", "prior.images"):
        assert key in str(error.value)


def test_a_concept_overrides_the_training_and_overrides_win(params: Any) -> None:
    config = load_config(params(lambda v: v["concepts"]["scarf-cat"].update(train={"lr": 0.5, "steps": 7})))
    settings = config.train_config("scarf-cat", {"steps": 9})
    assert (settings.lr, settings.steps) == (0.5, 9)
    others = [name for name in config.concepts if name != "scarf-cat"]
    assert config.train_config(others[0]) == config.train.model_copy(update={"methods": {}})


def test_a_pair_is_trained_as_its_kind_and_itself_say(params: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        values["mix"] |= {"train": {"steps": 11, "lr": 0.1}, "methods": {"full": {"lr": 0.002, "steps": 13}}}
        values["pairs"]["two-cats"]["train"] = {"steps": 12}

    config = load_config(params(change))
    settings = config.train_config("two-cats")
    assert (settings.lr, settings.steps, settings.batch_size) == (0.1, 12, config.train.batch_size)
    assert settings.validation_prompts == config.mix.validation_prompts
    full = config.train_config("two-cats", {"method": "full"})
    assert (full.lr, full.steps) == (0.002, 12)
    assert config.train_config("scarf-cat") == config.train.model_copy(update={"methods": {}})


def test_entries_speak_of_their_subjects() -> None:
    config = load_config(ROOT / "params.yaml")
    concept, pair = config.entry("scarf-cat"), config.entry("two-cats")
    assert (concept.kind, pair.kind) == ("concept", "pair")
    assert (pair.token, pair.class_word, pair.subject) == ("sks, zwx", "cat, cat", "sks cat and a zwx cat")
    assert concept.prompts(["a {subject} on red", "a car"]) == ["a sks cat on red", "a car"]
    assert pair.prompts(["a {subject}", "a {second} beside a {first}"]) == [
        "a sks cat",
        "a zwx cat",
        "a zwx cat beside a sks cat",
    ]
    assert pair.shown("a zwx cat and a sks cat") == ["scarf-cat", "bow-cat"]
    assert pair.shown("a sksdog") == []
    assert pair.shown('a card that says "sks cat"/zwx cat') == ["scarf-cat", "bow-cat"]
    with pytest.raises(SvdiffError, match="needs two subjects"):
        concept.prompts(["a {first} beside a {second}"])
    assert all("sks cat" in prompt and "zwx cat" in prompt for prompt in config.sample_prompts("two-cats"))


def test_a_missing_file_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match=r"nowhere\.yaml not found"):
        load_config(tmp_path / "nowhere.yaml")


def test_an_unknown_concept_says_how_to_add_it() -> None:
    config: Config = load_config(ROOT / "params.yaml")
    with pytest.raises(SvdiffError, match="data/concepts/dragon/"):
        config.concept("dragon")


# ---- rates of each method ----


def with_methods(values: dict[str, Any]) -> None:
    values["concepts"] = {"dog": {"class_word": "dog"}, "cat": {"class_word": "cat", "token": "zwx"}}
    values["classes"] = ["dog", "cat"]
    values["pairs"] = {"both": {"concepts": ["dog", "cat"]}}
    values["edits"] = {"red": {"image": "x.png", "prompt": "a cat", "targets": ["a dog"]}}
    values["rank"]["concepts"] = ["dog"]
    values["train"] = {"lr": 0.02, "lr_1d": 0.005, "methods": {"full": {"lr": 3e-5, "steps": 7}}}
    values["mix"] = {"train": {"lr": 0.01}, "methods": {"full": {"lr": 4e-5}}}
    values["edit"] = {"train": {"steps": 120}, "methods": {"full": {"lr": 5e-5}}}


@pytest.mark.parametrize(
    ("name", "overrides", "lr", "lr_1d"),
    [
        ("dog", {}, 0.02, 0.005),
        ("both", {}, 0.01, 0.005),
        ("dog", {"method": "full"}, 3e-5, METHOD_RATES["full"]["lr_1d"]),
        ("both", {"method": "full"}, 4e-5, METHOD_RATES["full"]["lr_1d"]),
        ("red", {"method": "full"}, 5e-5, METHOD_RATES["full"]["lr_1d"]),
        ("dog", {"method": "lora"}, METHOD_RATES["lora"]["lr"], METHOD_RATES["lora"]["lr_1d"]),
        ("both", {"method": "custom-diffusion"}, *METHOD_RATES["custom-diffusion"].values()),
        ("dog", {"method": "full", "lr": 0.5}, 0.5, METHOD_RATES["full"]["lr_1d"]),
    ],
)
def test_no_method_trains_at_the_rates_of_another(
    params: Any, name: str, overrides: dict[str, Any], lr: float, lr_1d: float
) -> None:
    settings = load_config(params(with_methods)).train_config(name, overrides)
    assert (settings.lr, settings.lr_1d) == (lr, lr_1d)


def test_rates_beside_a_method_are_its_own_at_every_level(params: Any) -> None:
    def change(values: dict[str, Any]) -> None:
        with_methods(values)
        values["concepts"]["dog"]["train"] = {"method": "lora", "lr": 0.003}

    config = load_config(params(change))
    assert config.train_config("dog").lr == 0.003
    assert config.train_config("dog", {"method": "svdiff"}).lr == 0.02  # not the concept's, which is LoRA's
    assert config.train_config("dog", {"method": "full"}).steps == 7  # any key may differ by method


@pytest.mark.parametrize(
    ("section", "name", "key", "value"),
    [
        ("concepts", "dog", "unmix_weight", 1.0),
        ("concepts", "dog", "mix_probability", 0.1),
        ("edits", "red", "single_subject_weight", 1.0),
    ],
)
def test_settings_without_an_effect_on_an_entry_are_refused(
    params: Any, section: str, name: str, key: str, value: float
) -> None:
    def change(values: dict[str, Any]) -> None:
        with_methods(values)
        values[section][name]["train"] = {key: value}

    with pytest.raises(SvdiffError, match=rf"{section}.{name}.train.{key} is {value}, which has no effect"):
        load_config(params(change))
    # Said for all trainings, it is meant for those on which it has one.
    everywhere = load_config(params(lambda values: (with_methods(values), values["train"].update({key: value}))))
    assert getattr(everywhere.train_config("both"), key) == value

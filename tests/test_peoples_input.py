"""What people write into params.yaml and into prompts: a list of cases, and what becomes of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from svdiff.config import Config, load_config
from svdiff.errors import SvdiffError
from svdiff.words import file_stem, fill

PARAMS = """
classes: [{class_word}]
concepts:
  {name}: {{class_word: {class_word}, token: {token}}}
sample: {{prompts: ["a {{subject}} on a blue background"]}}
rank: {{concepts: []}}
"""


def written(folder: Path, *, name: str = "pet", class_word: str = "dog", token: str = "sks", more: str = "") -> Config:
    """params.yaml with words exactly as somebody typed them."""
    path = folder / "params.yaml"
    path.write_text(PARAMS.format(name=name, class_word=class_word, token=token) + more, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("word", ["dog", "teddy bear", "child's toy", "T-shirt", "Häuschen", "犬", "4x4", "'on'"])
def test_class_words_that_are_words(tmp_path: Path, word: str) -> None:
    typed = f'"{word}"' if "'s" in word else word
    assert written(tmp_path, class_word=typed).classes == [word.strip("'") if word == "'on'" else word]


@pytest.mark.parametrize(
    "word",
    [
        *('"$(touch x)"', '"`touch x`"', '"dog; touch x"', '"dog && touch x"', '"dog | x"', '"dog > x"', '"*"', '"~"'),
        *(
            '"a/b"',
            '".."',
            '"../../data"',
            '"a\\\\b"',
            '""',
            '" "',
            '" dog"',
            '"dog "',
            '"a  b"',
            '"dog\\ncat"',
            '"-rf"',
        ),
        *('"{subject}"', '"dog\\0"', '"C:dog"', "012", "1.5", "2024-01-01", "null", "true", f'"{"x" * 61}"'),
    ],
)
def test_class_words_that_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(SvdiffError, match=r"classes|class word"):
        written(tmp_path, class_word=word)


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/b", "a b", "a.b", ".hidden", "-rf", "$(x)", "ünder", '""', "x" * 101, "2024", "2024-01-01", "1.5"],
)
def test_names_that_are_no_folders_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SvdiffError, match=r"name|string"):
        written(tmp_path, name=name)


@pytest.mark.parametrize("token", ["sks", "olis", "zwx7", "ŝks"])
def test_tokens_that_are_words(tmp_path: Path, token: str) -> None:
    assert written(tmp_path, token=token).concepts["pet"].token == token


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("012", "quotes"),
        ("1e3", "quotes"),
        ("true", "quotes"),
        ('"s k s"', "one rare word"),
        ('""', "one rare word"),
        ('"{x}"', "one rare word"),
        ('"<sks>"', "one rare word"),
        ("dog", "ordinary word"),
        ("DOG", "ordinary word"),
        ("on", "ordinary word"),  # YAML 1.1 would have read it as true
        ("blue", "ordinary word"),
        ("Background", "ordinary word"),
    ],
)
def test_tokens_that_are_refused(tmp_path: Path, token: str, words: str) -> None:
    with pytest.raises(SvdiffError, match=words):
        written(tmp_path, token=token)


def test_a_word_of_an_edits_prompt_is_no_token_either(tmp_path: Path) -> None:
    edit = "edits: {one: {image: a.png, prompt: a red house, targets: [a blue house]}}\n"
    with pytest.raises(SvdiffError, match="'house', an ordinary word"):
        written(tmp_path, token="house", more=edit)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("train: {prompt: a dog}", "lacks {subject}"),
        ("train: {prompt: 'a {style} {subject}'}", "'{style}'"),
        ("train: {prompt: 'a {subject'}", "'{'"),
        ("train: {prompt: 'a {subject} }'}", "'}'"),
        ("train: {prompt: 'a {subject} {}'}", "'{}'"),
        ("train: {prompt: 'a {subject!r}'}", "subject!r"),
        ("train: {prompt: 'a {{subject}}'}", "'{'"),
        ("train: {validation_prompts: [a dog, a dog]}", "twice"),
        ("train: {validation_seeds: [0, 0]}", "twice"),
        ("train: {validation_seeds: [-1]}", "greater than or equal to 0"),
        ("train: {attention_layers: '('}", "regular expression"),
        ("train: {lr: .nan}", "train.lr"),
        ("train: {prior_weight: .inf}", "train.prior_weight"),
        ("prior: {prompt: a dog}", "lacks {subject}"),
        ("mix: {prompts: ['a {first}']}", "lacks {second}"),
        ("edit: {starts: {a/b: {eta: 0.0, alpha: 1.0}}}", "a/b"),
        ("edits: {one: {image: a.png, prompt: 'a {subject}', targets: [x]}}", "may stand in braces"),
        ("edits: {one: {image: a.png, prompt: ' ', targets: [x]}}", "says nothing"),
        ("edits: {one: {image: a.png, prompt: null, targets: [x]}}", "edits.one.prompt"),
        ("pairs:", "pairs"),
        ("edits: []", "edits"),
        ("train: {}\ntrain: {}", "duplicate key"),
        ("train: {step: 3}", "did you mean 'steps'"),
        ("base: {model: models/base, revision: main}", "leave it out"),
        ("evaluators: {clip_pretrained: openai}", "leave it out"),
        ("evaluators: {clip_model: 'hf-hub:some/model', clip_pretrained: openai}", "leave it out"),
        ("evaluators: {clip_model: ViT-B-32}", "needs the tag of its weights, clip_pretrained"),
    ],
)
def test_sections_that_are_refused(tmp_path: Path, section: str, words: str) -> None:
    with pytest.raises(SvdiffError) as error:
        written(tmp_path, more=section + "\n")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("{unmix_weight: 1.0}", "unmix_weight"),
        ("{mix_probability: 0.5}", "mix_probability"),
    ],
)
def test_settings_without_effect_on_a_concept_are_refused(tmp_path: Path, train: str, words: str) -> None:
    with pytest.raises(SvdiffError, match=rf"concepts\.pet\.train\.{words}.*no effect"):
        written(tmp_path, token=f"sks, train: {train}")


@pytest.mark.parametrize("key", ["prompt: 'a {subject}'", "single_subject_weight: 1.0", "validation_prompts: [a dog]"])
def test_settings_without_effect_on_an_edit_are_refused(tmp_path: Path, key: str) -> None:
    edit = f"edits: {{one: {{image: a.png, prompt: a house, targets: [a red house], train: {{{key}}}}}}}\n"
    with pytest.raises(SvdiffError, match=r"edits\.one\.train\..*no effect"):
        written(tmp_path, more=edit)


@pytest.mark.parametrize(("first", "second"), [("sks", "sks"), ("sks", "SKS")])
def test_tokens_that_a_tokenizer_cannot_tell_apart(tmp_path: Path, first: str, second: str) -> None:
    pair = f"  other: {{class_word: dog, token: {second}}}\npairs: {{two: {{concepts: [pet, other]}}}}\n"
    text = PARAMS.format(name="pet", class_word="dog", token=first)
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("sample:", pair + "sample:"))
    with pytest.raises(SvdiffError, match="need different ones"):
        load_config(path)


def test_names_that_differ_in_case_alone_share_folders_on_some_disks(tmp_path: Path) -> None:
    with pytest.raises(SvdiffError, match="share their folders"):
        written(tmp_path, more="edits: {Pet: {image: a.png, prompt: a house, targets: [a red house]}}\n")


def test_files_as_other_systems_write_them(tmp_path: Path) -> None:
    text = PARAMS.format(name="pet", class_word="Bär", token="sks").replace("\n", "\r\n")
    (tmp_path / "params.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config(tmp_path / "params.yaml").classes == ["Bär"]
    (tmp_path / "params.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(SvdiffError, match="is not YAML"):
        load_config(tmp_path / "params.yaml")


@pytest.mark.parametrize("missing", [(), ("concepts",), ("pairs", "edits"), ("concepts", "pairs", "edits")])
def test_any_selection_of_entries_is_a_configuration(tmp_path: Path, missing: tuple[str, ...]) -> None:
    values: dict[str, Any] = YAML(typ="safe").load((Path(__file__).parent.parent / "params.yaml").read_text())
    if "concepts" in missing:
        values["pairs"], values["rank"] = {}, {"concepts": []}
    for section in missing:
        values.pop(section)
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML(typ="safe").dump(values, stream)
    assert set(load_config(tmp_path / "params.yaml").concepts) == set(values.get("concepts", {}))


@pytest.mark.parametrize(("wrong", "meant"), [("pett", "pet"), ("PET", "pet"), ("pe", "pet")])
def test_a_name_that_is_nearly_right_is_suggested(tmp_path: Path, wrong: str, meant: str) -> None:
    with pytest.raises(SvdiffError, match=f"did you mean '{meant}'"):
        written(tmp_path).entry(wrong)


def test_prompts_are_filled_with_what_stands_in_braces_and_nothing_else() -> None:
    assert fill("a {subject} at 5 o'clock, 100 %", subject="{subject} $HOME") == "a {subject} $HOME at 5 o'clock, 100 %"
    for template in ("a {style}", "a {", "}", "{subject} {first}", "{subject.x}", "{0}"):
        with pytest.raises(SvdiffError, match="may stand in braces"):
            fill(template, subject="dog")


def test_every_prompt_has_a_picture_file_of_its_own() -> None:
    long = "a " * 60
    prompts = [
        "a dog",
        "a/dog",
        "a dog ",
        "a  dog",
        "../a dog",
        "a-dog",
        "",
        "/",
        "?",
        "犬",
        long + "cat",
        long + "dog",
        "A dog",
    ]
    stems = [file_stem(prompt) for prompt in prompts]
    assert len(set(stems)) == len(prompts)
    assert all(stem and "/" not in stem and not stem.startswith((".", "-")) and len(stem) < 120 for stem in stems)
    assert file_stem("a dog") == "a-dog"

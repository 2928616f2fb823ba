"""The command line: at once, and in words for people."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from svdiff import __version__
from svdiff.cli import COMMANDS, EXTRAS, load, main
from svdiff.config import load_config
from svdiff.errors import for_people

ROOT = Path(__file__).parents[2]


@pytest.fixture
def svdiff(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command as a person does; exit status, what it says, and what it complains of."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svdiff", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
            raise SystemExit(0)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err

    monkeypatch.chdir(ROOT)
    return call


HEAVY = {"torch", "diffusers", "transformers", "pandas", "mlflow", "prefect", "dvc", "matplotlib", "numpy"}
NAMES_IMPORTED = "import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"


def imported(code: str) -> tuple[set[str], str]:
    """The packages that `code` imports, and what it prints."""
    code = NAMES_IMPORTED.format(code=code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stderr.split()), done.stdout


def test_help_imports_nothing_heavy_and_lists_every_command() -> None:
    packages, said = imported("from svdiff.cli import app; app(['--help'], standalone_mode=False)")
    assert not packages & {*HEAVY, "pydantic", "rich"}
    assert all(f"\n  {command} " in said for command in COMMANDS)


def test_help_of_no_command_imports_anything_heavy() -> None:
    calls = "from svdiff.cli import COMMANDS, app; [app([name, '--help'], standalone_mode=False) for name in COMMANDS]"
    packages, said = imported(calls)
    assert not packages & HEAVY
    assert said.count("Usage:") == len(COMMANDS)


def test_version(svdiff) -> None:
    assert svdiff("--version") == (0, f"svdiff {__version__}\n", "")


@pytest.mark.parametrize(("typed", "meant"), [("trian", "train"), ("samples", "sample"), ("promte", None)])
def test_a_mistyped_command_is_answered_with_what_was_perhaps_meant(svdiff, typed: str, meant: str | None) -> None:
    status, _, error = svdiff(typed)
    assert status == 2
    assert f"no command '{typed}'" in " ".join(error.split())
    assert (f"did you mean '{meant}'" in error) == (meant is not None)


def test_names_are_completed_from_params(monkeypatch: pytest.MonkeyPatch) -> None:
    from svdiff.cli.arguments import _known

    monkeypatch.chdir(ROOT)
    names = list(load_config().concepts)
    assert _known("concepts", names[0][:3]) == [name for name in names if name.startswith(names[0][:3])]
    assert set(_known("concepts pairs edits", "")) > set(names)


def test_what_a_missing_extra_needs_is_said(svdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "svdiff.evaluation.correlation", None)
    monkeypatch.setitem(EXTRAS, "svdiff", "evaluation")
    status, _, error = svdiff("correlate")
    assert status == 2
    assert "pip install 'svdiff[evaluation]'" in error


def test_an_unknown_concept_is_refused_with_what_was_perhaps_meant(svdiff) -> None:
    status, _, error = svdiff("train", "scarf-cta")
    assert status == 2
    assert "no concept, pair or edit 'scarf-cta'" in error
    assert "did you mean 'scarf-cat'" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train",), "NAME"),
        (("prior", "cta"), "did you mean 'cat'"),
        (("rank", "nobody"), "no concept"),
        (("mix", "scarf-cat"), "no pair 'scarf-cat'"),
        (("sample",), "NAME is missing"),
        (("sample", "scarf-cat", "--steps", "3"), "--steps has no effect without --prompt"),
        (("sample", "scarf-cat", "--seed", "3"), "--seed has no effect without --prompt"),
        (("sample", "scarf-cat", "--output", "x"), "--output has no effect without --prompt"),
        (("sample", "--delta", "scarf-cat", "--prompt", "a dog", "--scale", "2"), "--scale is of NAME alone"),
        (("sample", "scarf-cat", "--prompt", "a {style} dog"), "'{style}'"),
        (("sample", "scarf-cat", "--prompt", "a dog {"), "'{'"),
        (("sample", "--delta", "scarf-cat", "--prompt", "a {subject}"), "'{subject}'"),
        (("sample", "scarf-cat", "--prompt", " "), "says nothing"),
        (("edit", "woman-on-blue", "--output", "x"), "--output has no effect"),
        (("edit", "woman-on-blue", "--eta", "0.5"), "--prompt is missing"),
        (("sample", "--delta", "scarf-cat"), "--delta has no effect without --prompt"),
        (("sample", "scarf-cat", "--delta", "scarf-cat", "--prompt", "a dog"), "either NAME or --delta"),
        (("sample", "scarf-cat", "--prompt", "a dog", "--negative", "a cat"), "beta"),
        (("sample", "scarf-cat", "--prompt", "a dog", "--beta", "3"), "beta"),
        (("compare-pairs", "--way", "without", "--unmix-weight", "2"), "--unmix-weight is of the way `unmix` alone"),
        (("export", "a.safetensors", "-o", "folder", "--rank", "4"), "add --lora"),
        (("export", "a.safetensors", "-o", "folder", "--lora"), "a LoRA is a .safetensors file"),
        (("export", "a.safetensors", "-o", "b.safetensors"), "plain weights are a folder"),
        (("attention", "two-cats", "--prompt", "a {subject}"), "is 2 prompts"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(svdiff, arguments, words: str) -> None:
    status, _, error = svdiff(*arguments)
    assert status == 2
    assert words in error


def test_outside_a_checkout_it_says_so(svdiff, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = svdiff("report")
    assert status == 2
    assert "params.yaml not found" in error


PROJECT = """
classes: [Bär]
concepts: {one: {class_word: Bär, token: sks}}
edits: {red: {image: a.png, prompt: a dog, targets: [a red dog]}}
sample: {prompts: ["a {subject} on a red background"]}
rank: {concepts: []}
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("attention one --prompt x", "names nothing that one has learned"),
        ("attention red --prompt x", "names nothing that red has learned"),
        ("attention one --prompt {subject} --delta one:0.7", "out/train/one/delta.safetensors not found"),
        ("attention one --prompt {subject} --seed -1", "seed"),
        ("sample one --prompt x --scale nan", "nan is not a finite number"),
        ("sample --delta one:inf --prompt x", "out/train/one/delta.safetensors not found"),
        ("strip scale one --prompt x --at nan", "nan is not a finite number"),
        ("delta combine a.safetensors:nan -o b.safetensors", "a finite number is expected"),
        ("compare-pairs", "has no `pairs:`"),
        ("compare-pairs --unmix-weight nan", "Invalid value for '--unmix-weight'"),
        ("ablate one steps 5 5", "5 is given twice"),
        ("ablate one validate_every 5 10", "decides nothing of an ablation"),
        ("ablate one choose best last", "decides nothing of an ablation"),
        ("ablate one unmix_weight 1", "no effect on concepts"),
        ("ablate red steps 5", "'red' is an edit"),
        ("edit red --steps 5", "--prompt is missing"),
    ],
)
def test_options_without_effect_and_impossible_ones_are_refused_before_work(
    svdiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PROJECT, encoding="utf-8")
    status, _, complaint = svdiff(*arguments.split())
    assert status == 2
    assert words in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_every_option_of_edit_curves_reaches_the_experiment(svdiff, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def record(config: object, edits: list[SimpleNamespace], **options: object) -> Path:
        asked.update(options)
        return Path("recorded")

    monkeypatch.setattr("svdiff.experiments.edits.edit_curves", record)
    monkeypatch.setattr("svdiff.base.loop.load_world", lambda config: None)
    monkeypatch.setattr("svdiff.base.scenes.scene_edits", lambda world: [])
    options = "--edit a --edit b --method full --steps 3 --steps 5 --output x"
    assert svdiff("edit-curves", *options.split())[:2] == (0, "wrote recorded\n")
    assert asked == {"names": ["a", "b"], "methods": ["full"], "lengths": [3, 5], "output": Path("x")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--edit fly", "no edit 'fly' whose answer is known"),
        ("--method svd", "no method 'svd' to compare"),
        ("--method full --method full", "'full' is given twice"),
        ("--steps 0", "steps"),
        ("--steps 5 --steps 5", "5 is given twice"),
    ],
)
def test_what_edit_curves_cannot_do_is_refused_before_work(
    svdiff, monkeypatch: pytest.MonkeyPatch, options: str, words: str
) -> None:
    monkeypatch.setattr("svdiff.base.loop.load_world", lambda config: None)
    monkeypatch.setattr("svdiff.base.scenes.scene_edits", lambda world: [])
    monkeypatch.setattr("svdiff.experiments.edits.Runner", None)
    status, _, said = svdiff("edit-curves", *options.split())
    assert status == 2
    assert words in said


def test_weights_of_deltas_are_finite_and_have_an_effect(
    svdiff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PROJECT, encoding="utf-8")
    (tmp_path / "out/train/one").mkdir(parents=True)
    (tmp_path / "out/train/one/delta.safetensors").touch()
    assert "a weight has no effect here" in svdiff("attention", "one", "--prompt", "{subject}", "--delta", "one:0.7")[2]
    for weight in ("nan", "inf", "much"):
        assert "a finite number as in one:0.5" in svdiff("sample", "--delta", f"one:{weight}", "--prompt", "x")[2]


LOCALES = {
    "without UTF-8": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "Turkish, where it is installed": {"LC_ALL": "tr_TR"},
    "C": {"LANG": "C", "LC_ALL": ""},
}


@pytest.mark.parametrize(
    ("module", "locale"),
    [
        *(("svdiff.cli", locale) for locale in LOCALES),
        pytest.param("flows", "without UTF-8", marks=pytest.mark.slow),
    ],
)
def test_every_locale_reads_and_writes_utf8(tmp_path: Path, locale: str, module: str) -> None:
    (tmp_path / "params.yaml").write_text(PROJECT, encoding="utf-8")
    command = ["config"] if module == "svdiff.cli" else ["lineage", "Bär"]
    done = subprocess.run(
        [sys.executable, "-m", module, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | LOCALES[locale],
        capture_output=True,
        check=False,
    )
    said = (done.stdout + done.stderr).decode("utf-8")
    assert "Bär" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("number", "fix"),
    [(errno.EROFS, "can be written"), (errno.EACCES, "permissions"), (errno.ENOSPC, "free some space")],
)
def test_what_a_disk_refuses_is_said_with_a_fix(number: int, fix: str) -> None:
    said = for_people(OSError(number, os.strerror(number), "out/report"))
    assert said.startswith(f"out/report: {os.strerror(number)}; ")
    assert fix in said


def test_errors_that_are_not_about_disks_stay_as_they_are() -> None:
    with pytest.raises(BrokenPipeError):
        for_people(BrokenPipeError(errno.EPIPE, "gone"))


def commands_below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A command, or all commands of a group, with their words."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands_below(below, f"{path} {name}")


def test_every_whole_number_has_a_least_one() -> None:
    """So that a wrong one is refused before any work, by the command line itself."""
    counts = [
        (f"{path} {option.opts[0]}", option.min)
        for name in COMMANDS
        for path, command in commands_below(load(name), name)
        for option in command.params
        if option.type_descriptor.annotation in (int, list[int])
    ]
    assert len(counts) > 20
    assert not [option for option, least in counts if least is None]

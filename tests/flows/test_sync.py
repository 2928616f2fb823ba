"""What people do to their data survives `python -m flows sync`, and git and DVC around it in every order."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from datawork import ROOT, STAGES, Clone

from flows.pipeline.sync import Source, decide
from svdiff.errors import SvdiffError


@pytest.mark.parametrize(
    ("recorded", "here", "seen", "touched", "action"),
    [
        pytest.param("a", "a", [], False, "nothing", id="all is well"),
        pytest.param("a", "a", ["b"], True, "nothing", id="somebody brought it already"),
        pytest.param("a", None, [], False, "bring", id="fresh clone"),
        pytest.param("a", None, ["a"], False, "removed", id="removed here"),
        pytest.param("b", None, ["a", "b"], False, "bring", id="killed between taking away and putting there"),
        pytest.param("b", "a", ["a", "b"], False, "bring", id="killed before the exchange"),
        pytest.param("b", "a", ["a"], False, "bring", id="git moved on, untouched here"),
        pytest.param("b", "a", ["a"], True, "track", id="changed back here after DVC recorded a change"),
        pytest.param("a", "b", ["a"], True, "track", id="changed here"),
        pytest.param("a", "b", [], False, "track", id="changed before it was ever seen"),
        pytest.param("b", "c", ["a"], True, "track", id="changed here and in git"),
    ],
)
def test_what_is_done_about_a_folder(
    recorded: str, here: str | None, seen: list[str], touched: bool, action: str
) -> None:
    source = Source(Path("data/concepts/dog"), "dog.dvc", recorded, here, touched)
    assert decide(source, seen) == action


def test_a_base_that_was_deleted_comes_back() -> None:
    assert decide(Source(Path("models/base"), "base-model", "a", None, False), ["a"]) == "bring"


@pytest.fixture
def one(tmp_path: Path) -> Clone:
    return Clone.origin(tmp_path)


def test_a_new_concept_is_tracked_by_a_file_of_its_own(one: Clone) -> None:
    one.add("teapot", {"0.png": b"teapot"})
    assert "data/concepts/teapot: new; tracked by data/concepts/teapot.dvc" in "\n".join(one.sync())
    assert one.sync() == []
    assert one.git("status", "--short").stdout.splitlines() == [" M params.yaml", "?? data/concepts/teapot.dvc"]


def test_pictures_whose_bytes_are_in_the_cache_already_stay(one: Clone) -> None:
    one.add("copy", one.pictures("first"))
    one.sync()
    assert one.pictures("copy") == {"0.png": b"first"}


def test_replaced_added_and_removed_pictures_stay_so(one: Clone) -> None:
    one.write("first", {"0.png": b"old", "1.png": b"one"})
    assert "changed here" in one.sync()[0]
    for pictures in ({"0.png": b"new", "1.png": b"one"}, {"0.png": b"new"}, {"0.png": b"old", "1.png": b"one"}):
        one.write("first", pictures)
        one.sync()
        assert one.pictures("first") == pictures
        one.reproduce()
        assert one.made("first") == b"".join(pictures.values())


def test_changed_back_after_plain_dvc_repro_stays_so(one: Clone) -> None:
    """Without `sync` in between, hashes alone look as if git had moved on."""
    one.write("first", {"0.png": b"other"})
    one.reproduce()
    one.write("first", {"0.png": b"first"})
    one.sync()
    assert one.pictures("first") == {"0.png": b"first"}


def test_a_removed_concept_stays_removed_and_git_has_it(one: Clone) -> None:
    one.add("teapot", {"0.png": b"teapot"})
    one.sync()
    before = one.commit()
    one.remove("teapot")
    assert "data/concepts/teapot: removed here" in one.sync()[0]
    one.reproduce()
    assert not one.folder("teapot").exists()
    one.commit()
    one.git("checkout", "--quiet", before)
    one.sync()
    assert one.pictures("teapot") == {"0.png": b"teapot"}


def test_a_removed_folder_that_params_still_names_is_refused_with_the_way_back(one: Clone) -> None:
    shutil.rmtree(one.folder("first"))
    with pytest.raises(
        SvdiffError, match=r"data/concepts/first was removed here.*dvc checkout data/concepts/first.dvc"
    ):
        one.sync()
    one.command("dvc", "checkout", "-q", "data/concepts/first.dvc")
    assert one.sync() == []


def test_a_moved_concept_keeps_its_pictures(one: Clone) -> None:
    one.rename("first", "second")
    one.sync()
    assert one.catalogue() == {"second": {"0.png": b"first"}}
    assert {path.name for path in (one.root / "data/concepts").glob("*.dvc")} == {"second.dvc"}


def test_what_a_colleague_changed_comes_after_git_pull_and_nothing_else_moves(one: Clone) -> None:
    two = one.clone("two")
    assert two.sync() == ["data/concepts/first: brought"]
    two.add("own", {"0.png": b"own"})
    one.write("first", {"0.png": b"better"})
    one.sync()
    one.commit()
    assert one.push()
    assert two.pull()
    assert "data/concepts/first: brought up to date" in two.sync()[0]
    assert two.catalogue() == {"first": {"0.png": b"better"}, "own": {"0.png": b"own"}}


def test_a_base_that_a_colleague_trained_comes_after_git_pull(one: Clone) -> None:
    """The output of a frozen stage: its hash is in dvc.lock, which changes without dvc.yaml."""
    base = "  base-model: {cmd: make, frozen: true, outs: [models/base]}\n"
    (one.root / "dvc.yaml").write_text(STAGES + base)
    one.train_base(b"old")
    one.commit()
    one.push()
    two = one.clone("two")
    two.sync()
    one.train_base(b"new")
    one.commit()
    one.push()
    assert two.pull()
    assert two.sync() == ["models/base: brought up to date with dvc.yaml:base-model"]
    assert (two.root / "models/base").read_bytes() == b"new"


def test_changed_here_and_by_a_colleague_what_is_here_counts(one: Clone) -> None:
    two = one.clone("two")
    two.sync()
    one.write("first", {"0.png": b"better"})
    one.sync()
    one.commit()
    one.push()
    assert two.pull()
    two.write("first", {"0.png": b"mine"})
    assert "changed here" in two.sync()[0]
    assert two.pictures("first") == {"0.png": b"mine"}


def test_branches_that_each_add_a_concept_merge(one: Clone) -> None:
    """Pictures, params.yaml with its list of classes, and dvc.lock."""
    two = one.clone("two")
    two.sync()
    for clone, name in ((one, "teapot"), (two, "hat")):
        clone.add(name, {"0.png": name.encode()})
        clone.sync()
        clone.reproduce()
        clone.commit()
    assert one.push()
    assert not two.push()
    assert two.pull()
    two.sync()
    expected = {"first": b"first", "teapot": b"teapot", "hat": b"hat"}
    assert two.catalogue() == {name: {"0.png": content} for name, content in expected.items()}
    assert two.params["classes"] == ["kind first", "kind hat", "kind teapot"]
    two.reproduce()
    assert {name: two.made(name) for name in expected} == expected
    assert two.push()


def test_comments_of_params_stay_where_they_are_in_a_merge(tmp_path: Path) -> None:
    from flows.pipeline.merge import merge_files

    base, ours, theirs = (tmp_path / name for name in ("base", "ours", "theirs"))
    text = (ROOT / "params.yaml").read_text()
    concepts = text[text.index("concepts:\n") : text.index("# Concepts learned together")].rstrip()

    def adding(name: str) -> str:
        return text.replace(concepts, f"{concepts}\n  {name}:\n    class_word: dog\n    token: {name}")

    base.write_text(text)
    ours.write_text(adding("mine"))
    theirs.write_text(adding("yours").replace("bootstrap: 2000", "bootstrap: 1000"))
    merge_files(base, ours, theirs)
    last = concepts.rindex("\n  ", 0, concepts.rindex("\n    class_word"))
    assert ours.read_text().splitlines() == (
        adding("mine").replace("bootstrap: 2000", "bootstrap: 1000").replace(
            "\n  mine:", "\n  yours:\n    class_word: dog\n    token: yours\n  mine:"
        )
    ).splitlines(), last  # fmt: skip


def test_what_both_changed_is_a_conflict_that_git_shows(one: Clone) -> None:
    two = one.clone("two")
    two.sync()
    for clone, token in ((one, "abc"), (two, "xyz")):
        values = clone.params
        values["concepts"]["first"]["token"] = token
        clone.write_params(values)
        clone.commit()
    one.push()
    assert two.git("pull", "--no-rebase", "origin", "main", check=False).returncode
    assert "<<<<<<< ours" in (two.root / "params.yaml").read_text()


def test_a_remote_without_the_data_is_named(one: Clone) -> None:
    shutil.rmtree(one.root.parent / "remote")
    two = one.clone("two")
    with pytest.raises(
        SvdiffError, match=r"first with hash .* is neither in the DVC cache nor to be had from the remote"
    ):
        two.sync()
    assert not two.folder("first").exists()


KILLED = {
    "rwlock": (".dvc/tmp/rwlock", 0),
    "rwlock, half": (".dvc/tmp/rwlock", 5),
    "rwlock of experiments": (".dvc/tmp/exps/rwlock", 0),
    "dvc.lock": ("dvc.lock", 0),
    "dvc.lock, half": ("dvc.lock", 30),
    "of a committed concept": ("data/concepts/first.dvc", 0),
    "of a new concept": ("data/concepts/teapot.dvc", 20),
}
KILLED_FAST = ("dvc.lock, half",)


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=() if what in KILLED_FAST else pytest.mark.slow) for what in KILLED]
)
def test_what_a_killed_dvc_left_half_written_is_mended(one: Clone, what: str) -> None:
    """DVC writes in place: the file is as long as what it had written when it was killed."""
    one.reproduce()
    one.commit()
    one.write("first", {"0.png": b"newer, and nowhere but here"})
    one.add("teapot", {"0.png": b"teapot"})
    one.sync()
    one.reproduce()
    name, length = KILLED[what]
    path = one.root / name
    for folder in (one.root / ".dvc/tmp", one.root / ".dvc/tmp/exps"):
        folder.mkdir(exist_ok=True)
        (folder / "rwlock").write_text('{"write": {}, "read": {}}')
    cut = path.read_bytes()[:length]
    path.write_bytes(cut)
    assert f"{path.name}: unreadable" in "\n".join(one.sync())
    assert one.sync() == []
    assert one.catalogue() == {"first": {"0.png": b"newer, and nowhere but here"}, "teapot": {"0.png": b"teapot"}}
    one.reproduce()
    assert [one.made(name) for name in ("first", "teapot")] == [b"newer, and nowhere but here", b"teapot"]
    if "rwlock" not in name:
        assert (one.root / ".dvc/tmp" / f"{path.name}.unreadable").read_bytes() == cut
    commit = one.commit()
    one.push()
    two = one.clone("two")
    two.sync()
    assert two.catalogue() == one.catalogue(), commit


@pytest.mark.parametrize("way", ["shallow", pytest.param("worktree", marks=pytest.mark.slow)])
def test_a_shallow_clone_and_a_worktree_are_checkouts_like_others(one: Clone, way: str) -> None:
    one.add("teapot", {"0.png": b"teapot"})
    one.sync()
    one.commit()
    one.push()
    two, remote = Clone(one.root.parent / "two"), f"file://{one.root.parent}/origin"
    if way == "shallow":
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", remote, str(two.root)], check=True)
        assert two.git("rev-parse", "--is-shallow-repository").stdout == "true\n"
    else:
        one.git("worktree", "add", "--quiet", "-b", "other", str(two.root))
    two.sync()
    assert two.catalogue() == one.catalogue()
    two.add("vase", {"0.png": b"vase"})
    two.sync()
    two.reproduce()
    assert two.made("vase") == b"vase"
    two.commit()
    two.push()
    assert two.git("status", "--short").stdout == ""
    assert one.sync() == []
    assert "vase" not in one.catalogue()
    assert one.pull()
    one.sync()
    assert one.catalogue() == two.catalogue()


def _three_commits(one: Clone) -> list[str]:
    """A concept, then none of that name, then one of that name again with other pictures."""
    commits = []
    for pictures in ({"0.png": b"old"}, None, {"1.png": b"new"}):
        if pictures:
            one.add("vase", pictures)
        else:
            one.remove("vase")
        one.sync()
        commits.append(one.commit())
    one.push()
    return commits


def test_a_concept_that_a_commit_lacks_is_as_the_next_commit_has_it(one: Clone) -> None:
    old, without, new = _three_commits(one)
    two = one.clone("two")
    for commit in (old, without, new, without, old):
        two.git("checkout", "--quiet", commit)
        two.sync()
        if commit != without:
            assert two.pictures("vase") == ({"0.png": b"old"} if commit == old else {"1.png": b"new"})
        assert two.git("status", "--short").stdout == ""


def test_what_was_done_to_a_folder_that_no_commit_speaks_of_counts(one: Clone) -> None:
    old, without, new = _three_commits(one)
    two = one.clone("two")
    for commit in (old, without):
        two.git("checkout", "--quiet", commit)
        two.sync()
    two.write("vase", {"0.png": b"mine"})
    two.git("checkout", "--quiet", new)
    two.sync()
    assert two.pictures("vase") == {"0.png": b"mine"}
    two.git("checkout", "--quiet", "--force", without)
    two.sync()
    shutil.rmtree(two.folder("vase"))
    two.sync()
    two.git("checkout", "--quiet", new)
    two.sync()
    assert two.pictures("vase") == {"1.png": b"new"}


def test_a_conflict_that_waits_for_somebody_is_left_alone(one: Clone) -> None:
    conflict = "<<<<<<< ours\nouts: [\n=======\n"
    (one.root / "data/concepts/first.dvc").write_text(conflict)
    with pytest.raises(SvdiffError):
        one.sync()
    assert (one.root / "data/concepts/first.dvc").read_text() == conflict


@pytest.mark.slow
def test_from_outside_by_the_commands_that_the_readme_names(one: Clone) -> None:
    two = one.clone("two")
    assert "data/concepts/first: brought" in two.command("flows", "sync").stdout
    two.add("teapot", {"0.png": b"teapot"})
    two.command("flows", "sync")
    two.command("dvc", "repro", "-q")
    for command in (["pull", "-q"], ["checkout", "-q"], ["status"], ["push", "-q"]):
        two.command("dvc", *command)
    assert two.catalogue()["teapot"] == {"0.png": b"teapot"}
    assert subprocess.run(["git", "status", "--short"], cwd=two.root, capture_output=True, text=True).stdout
    assert two.made("teapot") == b"teapot"

"""A stage as a child process: what it says, how it fails, and that nothing of it survives."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from miniature import DVC_YAML, write_params
from team import alive, until

from flows.pipeline.stages import StageBusy, StageFailed, StageTimeout, changed, run_stage, train_together
from svdiff.config import Config, load_config


def pids(root: Path, patience: float = 300) -> list[int]:
    """Process ids of the hanging stage and of its child."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if (root / ".marks/pids").exists() and (found := (root / ".marks/pids").read_text().split()):
            return [int(pid) for pid in found]
        time.sleep(0.1)
    raise AssertionError("the stage did not start")


def runs(pid: int) -> bool:
    return psutil.pid_exists(pid) and alive(psutil.Process(pid))


def dvc_of(pid: int) -> psutil.Process:
    """The dvc process above a stage."""
    return next(p for p in psutil.Process(pid).parents() if "--single-item" in p.cmdline())


@pytest.mark.slow
def test_runs_once_then_is_unchanged_then_restored(dvc_project: Path) -> None:
    lines: list[str] = []
    first = run_stage("prior@dog", root=dvc_project, on_line=lines.append)
    second = run_stage("prior@dog", root=dvc_project, on_line=lines.append)
    (dvc_project / "dvc.lock").unlink()
    run_stage("train@dog", root=dvc_project, on_line=lines.append)
    (dvc_project / "dvc.lock").unlink()
    restored = run_stage("train@dog", root=dvc_project, on_line=lines.append)
    assert [first.outcome, second.outcome, restored.outcome] == ["ran", "unchanged", "restored"]
    assert "prior of dog begins" in lines


@pytest.mark.slow
def test_only_what_reads_something_else_has_changed(dvc_project: Path) -> None:
    stages = ["train@dog", "train@dog2"]
    run_stage("prior@dog", root=dvc_project, on_line=print)
    assert changed(stages, root=dvc_project) == stages
    run_stage("train@dog", root=dvc_project, on_line=print)
    assert changed(stages, root=dvc_project) == ["train@dog2"]
    shutil.rmtree(dvc_project / "out/train/dog")  # DVC's cache has it
    assert changed(stages, root=dvc_project) == ["train@dog2"]


@pytest.mark.slow
def test_groups_are_of_trainings_that_are_due_and_share_a_network(dvc_project: Path) -> None:
    from flows.orchestration.train import _groups

    values = load_config().model_dump(exclude_unset=True)
    run_stage("prior@dog", root=dvc_project, on_line=print)
    assert _groups(Config.model_validate(values), ["dog", "dog2"], 8, 1) == [["dog", "dog2"]]
    assert _groups(Config.model_validate(values), ["dog", "dog2"], 1, 1) == []
    values["concepts"]["dog2"]["train"] = {"rank": 2}
    assert _groups(Config.model_validate(values), ["dog", "dog2"], 8, 1) == []
    del values["concepts"]["dog2"]["train"]
    run_stage("train@dog", root=dvc_project, on_line=print)
    assert _groups(Config.model_validate(values), ["dog", "dog2"], 8, 1) == []


@pytest.mark.slow
def test_training_together_fails_with_the_reason(dvc_project: Path) -> None:
    lines: list[str] = []
    with pytest.raises(StageFailed, match=r"(?s)train dog, dog2 failed with status 2.*(prior images|models/base)"):
        train_together(["dog", "dog2"], root=dvc_project, on_line=lines.append)
    assert not (dvc_project / "out/train").exists()
    assert lines


@pytest.mark.slow
def test_each_stage_goes_on_where_a_killed_batch_was(dvc_project: Path) -> None:
    """The real trainer, on the embedded base."""
    steps, names = 30, ["dog", "dog2"]
    settings = {"steps": steps, "batch_size": 1, "prior_weight": 0.0, "save_every": 1, "validate_every": steps}
    write_params(
        dvc_project,
        *names,
        base={"model": str(Path(__file__).parents[2] / "models/base")},
        train=settings | {"validation_prompts": ["a {subject}"], "validation_seeds": [0]},
        sample={"prompts": ["a {subject}"], "steps": 1},
        tracking={"live": "none"},
    )
    pipeline = DVC_YAML.replace("python stage.py train ${key}", "python -m svdiff.cli train ${key}")
    (dvc_project / "dvc.yaml").write_text(pipeline)
    run_stage("prior@dog", root=dvc_project, on_line=print)

    def states() -> list[Path]:
        return sorted((dvc_project / ".svdiff").rglob("state.pt"))

    def kill() -> None:
        until(lambda: len(states()) == 2)
        *_, batch = [p for p in psutil.Process().children(recursive=True) if p.cmdline()[-3:] == ["train", *names]]
        batch.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(StageFailed, match="train dog, dog2 was killed by signal 9"):
        train_together(names, root=dvc_project, on_line=print)
    killer.join()
    before = [torch.load(path, weights_only=True)["rows"] for path in states()]
    assert all(0 < len(rows) < steps for rows in before)
    for name in names:
        run_stage(f"train@{name}", root=dvc_project, on_line=print)
        curve = pd.read_csv(dvc_project / f"out/train/{name}/curve.csv")
        assert len(curve) == steps
        # Its first steps are the batch's, times included.
        assert any(rows == curve[list(rows[0])].head(len(rows)).to_dict("records") for rows in before)


@pytest.mark.slow
def test_a_failure_carries_stage_status_and_last_lines(dvc_project: Path) -> None:
    run_stage("prior@dog", root=dvc_project, on_line=print)
    (dvc_project / ".marks/train-dog-fail").touch()
    with pytest.raises(StageFailed, match=r"(?s)stage train@dog failed.*cannot train dog: the moon is wrong") as caught:
        run_stage("train@dog", root=dvc_project, on_line=print)
    assert caught.value.stage == "train@dog"
    assert not isinstance(caught.value, StageBusy)


def test_a_stage_that_is_not_there(dvc_project: Path) -> None:
    with pytest.raises(StageFailed, match="train@cow"):
        run_stage("train@cow", root=dvc_project, on_line=print)


@pytest.mark.slow
def test_timeout_ends_the_whole_tree(dvc_project: Path) -> None:
    run_stage("prior@dog", root=dvc_project, on_line=print)
    (dvc_project / ".marks/train-dog-hang").touch()
    with pytest.raises(StageTimeout, match="took longer than 30 s"):
        run_stage("train@dog", root=dvc_project, on_line=print, timeout=30)
    assert not any(runs(pid) for pid in pids(dvc_project, 1))


def hanging(root: Path) -> tuple[threading.Thread, list[BaseException], list[int]]:
    """A stage that hangs in a thread, what it raised once it ended, and its processes."""
    run_stage("prior@dog", root=root, on_line=print)
    (root / ".marks/train-dog-hang").touch()
    raised: list[BaseException] = []

    def work() -> None:
        try:
            run_stage("train@dog", root=root, on_line=print)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised, pids(root)


@pytest.mark.slow
def test_killed_dvc_leaves_no_orphan_that_a_rerun_would_race(dvc_project: Path) -> None:
    """kill -9 of dvc alone: its stage would run on, unrecorded, while the next attempt starts another."""
    thread, raised, started = hanging(dvc_project)
    dvc_of(started[0]).kill()
    thread.join(120)
    assert [str(error) for error in raised if "killed by signal 9" in str(error)]
    assert not any(runs(pid) for pid in started)
    (dvc_project / ".marks/train-dog-hang").unlink()
    assert run_stage("train@dog", root=dvc_project, on_line=print).outcome == "ran"


@pytest.mark.slow
def test_killed_stage_is_a_failure_and_runs_again(dvc_project: Path) -> None:
    thread, raised, started = hanging(dvc_project)
    os.kill(started[0], signal.SIGKILL)
    thread.join(120)
    assert len(raised) == 1
    assert isinstance(raised[0], StageFailed)
    assert not any(runs(pid) for pid in started)
    (dvc_project / ".marks/train-dog-hang").unlink()
    assert run_stage("train@dog", root=dvc_project, on_line=print).outcome == "ran"


@pytest.mark.slow
@pytest.mark.parametrize("name", [".dvc/tmp/rwlock", "dvc.lock"])
def test_what_a_killed_dvc_left_half_written_stops_no_stage(dvc_project: Path, name: str) -> None:
    run_stage("prior@dog", root=dvc_project, on_line=print)
    path, lines = dvc_project / name, list[str]()
    path.write_bytes(path.read_bytes()[:1])
    assert run_stage("train@dog", root=dvc_project, on_line=lines.append).outcome == "ran"
    assert f"{path.name}: unreadable, as a killed command leaves it" in "\n".join(lines)


@pytest.mark.slow
def test_the_same_stage_twice_is_busy(dvc_project: Path) -> None:
    thread, raised, started = hanging(dvc_project)
    with pytest.raises(StageBusy, match="is busy"):
        run_stage("train@dog", root=dvc_project, on_line=print)
    os.kill(started[0], signal.SIGKILL)
    thread.join(120)
    assert raised


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupting_or_killing_the_caller_ends_the_stage(dvc_project: Path, by: signal.Signals) -> None:
    """What Prefect does on cancel: the signal goes to the process group of the engine, which raises from it.

    An engine that is killed cannot do anything any more; its guard does.
    """
    run_stage("prior@dog", root=dvc_project, on_line=print)
    (dvc_project / ".marks/train-dog-hang").touch()
    code = (
        "import signal, sys; from pathlib import Path; from flows.pipeline.stages import run_stage\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run_stage('train@dog', root=Path.cwd(), on_line=print)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=dvc_project, start_new_session=True)
    started = pids(dvc_project)
    os.kill(caller.pid, by)  # the caller alone: the rest is its own work
    caller.wait(120)
    end = time.monotonic() + (30 if by == signal.SIGKILL else 0)
    while any(runs(pid) for pid in started):
        assert time.monotonic() < end, "the stage outlives its caller"
        time.sleep(0.1)


@pytest.mark.slow
def test_progress_bars_do_not_flood(dvc_project: Path) -> None:
    """A bar redrawn a hundred times is passed on once in a while; lines between arrive, all of them."""
    script = dvc_project / "bar.py"
    script.write_text(
        "import sys\n"
        "for i in range(100): sys.stderr.write(f'\\r{i}%|bar'); sys.stderr.flush()\n"
        "sys.stderr.write('\\n')\nprint('\\x1b[31mred\\x1b[0m')\n"
    )
    subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "add", "-q", "-n", "bar", sys.executable, "bar.py"], check=True
    )
    lines: list[str] = []
    bars: list[str] = []
    run_stage("bar", root=dvc_project, on_line=lines.append, on_progress=bars.append)
    assert len(bars) <= 2
    assert "99%|bar" in lines
    assert "red" in lines
    assert not [line for line in lines if re.search(r"^[0-9]%", line)]

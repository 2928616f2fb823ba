"""Several processes train one concept as one process would at the same total batch: two of them here, by gloo on the CPU."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from svdiff.config import load_config
from svdiff.training import train
from svdiff.training.loop import Trainer
from tests.training.test_stage import checkout, write_params  # noqa: F401 (a fixture)

SETTINGS: dict[str, Any] = {"steps": 4, "save_every": 1, "schedule": "cosine", "single_subject_weight": 0.5}

pytestmark = pytest.mark.slow


def work(rank: int, port: int, home: str, output: str, settings: dict[str, Any], dies_at: int | None) -> None:
    """One of two processes, as `torchrun --nproc_per_node 2` and `accelerate launch` on GPUs start them."""
    from accelerate.state import AcceleratorState, PartialState

    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ["SVDIFF_HOME"] = home
    PartialState._reset_state()
    AcceleratorState._reset_state(True)
    torch.set_num_threads(1)
    original = Trainer._loss

    def dying(self: Trainer, number: int) -> Any:
        if number == dies_at:
            os._exit(9)
        return original(self, number)

    Trainer._loss = dying  # type: ignore[method-assign]
    train(load_config(), "pet", Path(output), settings)


def in_two_processes(home: str, output: str, dies_at: int | None = None, **settings: Any) -> list[int | None]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # autograd that ran before a fork may refuse to run after it
    both = [
        context.Process(target=work, args=(rank, port, home, output, SETTINGS | settings, dies_at)) for rank in (0, 1)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(600)
    return [process.exitcode for process in both]


def difference(a: Path, b: Path) -> float:
    """Of two deltas, as a share of the first one's length."""
    first, second = load_file(a / "delta.safetensors"), load_file(b / "delta.safetensors")
    assert first.keys() == second.keys()
    squares = [((first[n] - second[n]).double().square().sum(), first[n].double().square().sum()) for n in first]
    return float((sum(d for d, _ in squares) / sum(n for _, n in squares)).sqrt())


@pytest.mark.parametrize("method", ["svdiff", "lora"])
def test_two_processes_learn_what_one_does_at_the_same_total_batch(
    checkout: Path,  # noqa: F811
    tiny_base: Path,
    method: str,
) -> None:
    write_params(checkout, tiny_base, method=method)
    train(load_config(), "pet", Path("alone"), SETTINGS | {"batch_size": 2, "method": method})
    assert in_two_processes("two", "together", batch_size=1, method=method) == [0, 0]
    assert difference(Path("alone"), Path("together")) < 1e-3
    alone, together = (pd.read_csv(f"{folder}/curve.csv").drop(columns="seconds") for folder in ("alone", "together"))
    pd.testing.assert_frame_equal(alone, together, rtol=1e-4, atol=1e-6)  # rates too: the schedule is stepped once
    assert sorted(p.name for p in Path("together/validation").iterdir()) == sorted(
        p.name for p in Path("alone/validation").iterdir()
    )
    # A training that two processes began is the same training to one, which takes it up.
    keys = [json.loads((Path(folder) / "train.json").read_text())["train_key"] for folder in ("alone", "together")]
    assert keys[0] == keys[1]


def test_two_processes_resume_exactly(checkout: Path) -> None:  # noqa: F811
    assert in_two_processes("straight-home", "straight", batch_size=1) == [0, 0]
    assert in_two_processes("home", "resumed", dies_at=2, batch_size=1) == [9, 9]
    assert not Path("resumed").exists()
    [state] = Path("home").rglob("state.pt")
    assert torch.load(state, weights_only=True)["trainer"]["step"] == 2
    assert in_two_processes("home", "resumed", batch_size=1) == [0, 0]
    assert difference(Path("straight"), Path("resumed")) == 0

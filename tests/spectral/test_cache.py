"""The cache of decompositions: content-addressed, safe with several processes, self-healing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from svdiff.errors import SvdiffError
from svdiff.spectral import cache, list_cache, load_basis, prune_cache, weights_hash
from svdiff.spectral.cpu import threads
from svdiff.spectral.shifts import attach


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30), nn.Conv1d(30, 6, 1), nn.Embedding(9, 4))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that are decomposed."""
    done: list[str] = []
    original = cache._checked

    def checked(name: str, *args: object) -> object:
        done.append(name)
        return original(name, *args)

    monkeypatch.setattr(cache, "_checked", checked)
    return done


def test_is_computed_once_and_mapped_afterwards(tmp_path: Path, counted: list[str]) -> None:
    first = load_basis(model(), tmp_path, progress=False)
    second = load_basis(model(), tmp_path, progress=False)
    assert sorted(counted) == ["0.weight", "2.weight", "3.weight"] == list(second)
    assert first.id == second.id == load_basis(model(), None, progress=False).id
    assert first.base_hash == second.base_hash == weights_hash(model())
    for name in second:
        assert torch.equal(second[name].u, first[name].u)
        assert torch.equal(second[name].base_weight(), model().get_parameter(name))
    entry = list_cache(tmp_path)[0]
    assert (entry.base_hash, entry.weights) == (first.base_hash, 3)


def test_other_weights_are_another_entry(tmp_path: Path) -> None:
    assert load_basis(model(0), tmp_path).base_hash != load_basis(model(1), tmp_path).base_hash
    half = model().half()
    assert weights_hash(half) != weights_hash(model())
    load_basis(half, tmp_path)
    assert len(list_cache(tmp_path)) == 3
    assert len(prune_cache(tmp_path, keep=1)) == 2
    assert len(list_cache(tmp_path)) == 1


def test_an_interrupted_decomposition_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    write, before = cache._write, torch.get_num_threads()

    def dies(path: Path, factors: object) -> None:
        if path.name == "2.weight.safetensors":
            raise KeyboardInterrupt
        write(path, factors)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        load_basis(model(), tmp_path, progress=False)
    monkeypatch.setattr(cache, "_write", write)
    written = {path.name.removesuffix(".safetensors") for path in tmp_path.rglob("*.safetensors")}
    assert written  # by whoever was not interrupted
    counted.clear()
    load_basis(model(), tmp_path, progress=False)
    assert set(counted) == {"0.weight", "2.weight", "3.weight"} - written
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("stored", [True, False])
def test_factors_are_the_same_on_any_number_of_threads(tmp_path: Path, stored: bool) -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.Linear(300, 400), nn.Conv2d(40, 300, 3))
    found = []
    for count in (1, 2, 4):
        with threads(count):
            found.append(load_basis(large, tmp_path / str(count) if stored else None, progress=False).id)
            assert torch.get_num_threads() == count
    assert len(set(found)) == 1


@pytest.mark.parametrize("tensor", ["u", "sigma", "vh", "weight"])
def test_an_edited_file_is_noticed_and_made_again(tmp_path: Path, tensor: str, counted: list[str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    good = load_basis(model(), tmp_path, progress=False)
    path = tmp_path / good.base_hash / "2.weight.safetensors"
    with safe_open(path, "pt") as stream:
        tensors = {key: stream.get_tensor(key).clone() for key in stream.keys()}  # noqa: SIM118
        metadata = stream.metadata()
    tensors[tensor].view(-1)[0] += 1e-3
    path.unlink()
    save_file(tensors, path, metadata)
    again = load_basis(model(), tmp_path, progress=False)
    assert counted[3:] == ["2.weight"]
    assert again.id == good.id


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_truncated_file_is_noticed_and_made_again(tmp_path: Path, size: int, counted: list[str]) -> None:
    good = load_basis(model(), tmp_path, progress=False)
    path = tmp_path / good.base_hash / "0.weight.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:size])
    assert load_basis(model(), tmp_path, progress=False).id == good.id
    assert counted[3:] == ["0.weight"]


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    """Three real processes at once: the same basis for all, every weight decomposed once."""
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "from tests.spectral.test_cache import model\n"
        "from svdiff.spectral import cache\n"
        "write = cache._write\n"
        # One call a line: threads write at the same time, and print() writes its parts one by one.
        "say = lambda line: sys.stdout.write(line + '\\n')\n"
        "cache._write = lambda p, x: (say('wrote ' + p.name.removesuffix('.safetensors')), write(p, x))\n"
        "print('id', cache.load_basis(model(), sys.argv[1], progress=False).id)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parents[2])]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [line for process in running for line in process.communicate(timeout=600)[0].splitlines()]
    assert all(process.returncode == 0 for process in running)
    assert sorted(line for line in lines if line.startswith("wrote")) == [f"wrote {i}.weight" for i in (0, 2, 3)]
    ids = [line for line in lines if line.startswith("id")]
    assert len(ids) == 3
    assert len(set(ids)) == 1
    assert not list(tmp_path.rglob(".*")), "no temporary file is left"


def test_bad_models_are_refused() -> None:
    broken = model()
    with torch.no_grad():
        broken[0].weight[0, 0] = float("nan")
    with pytest.raises(SvdiffError, match=r"'0\.weight' has values that are not finite"):
        load_basis(broken, None, progress=False)
    with torch.device("meta"), pytest.raises(SvdiffError, match="meta device"):
        load_basis(nn.Sequential(nn.Linear(2, 2)), None)
    attached = model()
    attach(attached, load_basis(attached, None, progress=False), subset="0|1|2")
    with pytest.raises(SvdiffError, match="detach"):
        load_basis(attached, None)


def test_a_cache_may_be_pruned_while_something_uses_it(tmp_path: Path) -> None:
    unet = model()
    load_basis(unet, tmp_path)
    basis = load_basis(unet, tmp_path)  # mapped
    (gone,) = prune_cache(tmp_path)
    assert not (tmp_path / gone.base_hash).exists()
    for name in basis:
        assert torch.equal(basis[name].base_weight(), model().get_parameter(name))
    assert load_basis(unet, tmp_path).id == basis.id  # made anew


def test_what_is_being_decomposed_is_not_pruned(tmp_path: Path) -> None:
    load_basis(model(), tmp_path)
    (entry,) = list_cache(tmp_path)
    with FileLock(tmp_path / entry.base_hash / "lock"):  # as the process has that is at it
        assert prune_cache(tmp_path) == []
    assert list_cache(tmp_path) == [entry]
    assert prune_cache(tmp_path) == [entry]

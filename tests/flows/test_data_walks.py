"""Random walks of two people through one project: nothing that anybody added is ever lost, and nothing comes back by itself.

Each walk draws what is done next (add, replace, remove, rename, sync, commit, push, pull, go back, reproduce, kill) and keeps a model:
what each clone must hold, what each commit must give back, and which versions its registry must have.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from datawork import Catalogue, Clone, Pictures, some_pictures

STEPS = 14


class Walk:
    """Two clones, and what they must hold."""

    def __init__(self, folder: Path, seed: int, store: bytes | None) -> None:
        self.chance, self.store, self.names, self.log = random.Random(seed), store, 0, [f"seed {seed}"]
        one = Clone.origin(folder)
        two = one.clone("two")
        two.sync()
        self.clones = [one, two]
        start = {"first": {"0.png": b"first"}}
        self.holds: list[Catalogue] = [dict(start), dict(start)]
        self.commits = {one.git("rev-parse", "HEAD").stdout.strip(): dict(start)}
        self.versions: list[dict[str, set[float]]] = [{}, {}]
        for clone in self.clones if store else []:
            (clone.root / "mlruns").mkdir()
            (clone.root / "mlruns/mlflow.db").write_bytes(store or b"")

    def step(self) -> None:
        """One thing that one of them does; afterwards everything is as it must be."""
        who = self.chance.randrange(2)
        deeds = [self.add, self.replace, self.remove, self.rename, self.sync, self.commit, self.push, self.pull]
        deeds += [self.replace, self.go_back, self.reproduce, self.kill]
        deed: Callable[[Clone, int], None] = self.chance.choice(deeds)
        self.log.append(f"{'one' if who == 0 else 'two'}: {deed.__name__}")
        deed(self.clones[who], who)
        for clone, expected in zip(self.clones, self.holds, strict=True):
            assert clone.catalogue() == expected, self.log

    def some(self, who: int) -> str:
        return self.chance.choice(sorted(self.holds[who]))

    def new_name(self) -> str:
        self.names += 1
        return f"concept-{self.names}"

    def add(self, clone: Clone, who: int) -> None:
        name, pictures = self.new_name(), some_pictures(self.chance)
        clone.add(name, pictures)
        self.holds[who][name] = pictures

    def replace(self, clone: Clone, who: int) -> None:
        name, pictures = self.some(who), some_pictures(self.chance)
        clone.write(name, pictures)
        self.holds[who][name] = pictures

    def remove(self, clone: Clone, who: int) -> None:
        if len(self.holds[who]) > 1:
            name = self.some(who)
            clone.remove(name)
            del self.holds[who][name]

    def rename(self, clone: Clone, who: int) -> None:
        old, new = self.some(who), self.new_name()
        clone.rename(old, new)
        self.holds[who][new] = self.holds[who].pop(old)

    def sync(self, clone: Clone, who: int) -> None:
        clone.sync()

    def kill(self, clone: Clone, who: int) -> None:
        clone.sync_killed(self.chance.uniform(0, 0.6))
        clone.sync()

    def commit(self, clone: Clone, who: int) -> None:
        clone.sync()
        self.commits[clone.commit()] = dict(self.holds[who])

    def push(self, clone: Clone, who: int) -> None:
        self.commit(clone, who)
        clone.push()

    def pull(self, clone: Clone, who: int) -> None:
        self.commit(clone, who)
        clone.git("fetch", "--quiet", "origin")
        base, ours, theirs = (
            self.commits[clone.git(*command).stdout.strip()]
            for command in (["merge-base", "HEAD", "origin/main"], ["rev-parse", "HEAD"], ["rev-parse", "origin/main"])
        )
        if clone.pull():
            merged = {name: merge(base.get(name), ours.get(name), theirs.get(name)) for name in [*base, *ours, *theirs]}
            merged |= follow_renames(base, ours, theirs) | follow_renames(base, theirs, ours)
            self.holds[who] = {name: pictures for name, pictures in merged.items() if pictures is not None}
            self.commits[clone.git("rev-parse", "HEAD").stdout.strip()] = dict(self.holds[who])
            if self.chance.random() < 0.3:
                clone.sync_killed(self.chance.uniform(0, 0.6))
            clone.sync()
            self.commit(clone, who)

    def go_back(self, clone: Clone, who: int) -> None:
        """To any commit of either, and to the newest again: each gives what it had."""
        self.commit(clone, who)
        if clone.push():
            self.clones[1 - who].git("fetch", "--quiet", "origin")
        known = clone.git("rev-list", "--all").stdout.split()
        commit = self.chance.choice([one for one in known if one in self.commits])
        clone.git("checkout", "--quiet", commit)
        clone.sync()
        assert clone.catalogue() == self.commits[commit], [*self.log, commit]
        clone.git("checkout", "--quiet", "main")
        clone.sync()

    def reproduce(self, clone: Clone, who: int) -> None:
        clone.sync()
        clone.reproduce()
        for name, pictures in self.holds[who].items():
            assert clone.made(name) == b"".join(pictures[file] for file in sorted(pictures)), [*self.log, name]
            if self.store:
                self.versions[who].setdefault(name, set()).add(clone.register(name))
        if self.store:
            for name, values in self.versions[who].items():  # of removed concepts, too
                assert clone.versions(name) == len(values), [*self.log, name]

    def end(self) -> None:
        """Every commit that was pushed gives back everything, in a clone that has nothing yet."""
        for who, clone in enumerate(self.clones):
            self.push(clone, who)
        fresh = self.clones[0].clone("fresh")
        for commit in fresh.git("rev-list", "--all").stdout.split():
            fresh.git("checkout", "--quiet", commit)
            fresh.sync()
            assert fresh.catalogue() == self.commits[commit], [*self.log, commit]


def merge(base: object, ours: object, theirs: object) -> object:
    """What a merge without conflict leaves of one concept."""
    return theirs if ours == base else ours


def follow_renames(base: Catalogue, side: Catalogue, other: Catalogue) -> dict[str, Pictures | None]:
    """What git's merge makes of concepts that one side renamed and the other replaced: the new name, the new pictures."""
    followed: dict[str, Pictures | None] = {}
    for old in base.keys() - side.keys():
        new = next((name for name in side.keys() - base.keys() if side[name] == base[old]), None)
        if new and old in other and other[old] != base[old]:
            followed |= {old: None, new: other[old]}
    return followed


def walk(folder: Path, seed: int, store: bytes | None = None) -> None:
    made = Walk(folder, seed, store)
    for _ in range(STEPS):
        made.step()
    made.end()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_in_a_walk(tmp_path: Path, seed: int) -> None:
    walk(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 180))
def test_nothing_is_lost_in_many_walks(tmp_path: Path, seed: int) -> None:
    walk(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(180, 200))
def test_nothing_is_lost_in_walks_with_a_registry(tmp_path: Path, seed: int, empty_store: bytes) -> None:
    walk(tmp_path, seed, empty_store)

"""All of a server but its HTTP interface: it follows the registry, holds deltas, and queues pictures for whoever draws."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flows.registry.concepts import CHAMPION, BrokenVersion, fetch, model_version
from flows.registry.tracking import connect
from flows.serving.batches import Batcher, Order
from flows.serving.drawing import Drawer, Drawn, Facts, Picture, Result
from flows.serving.models import Models, Refusal, Version, Watch, read_models
from svdiff.config import Config, load_config
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from flows.registry.tracking import Tracking
    from svdiff.spectral import SpectralDelta


@dataclass(frozen=True)
class Settings:
    """What a server is started with."""

    params: Path  # params.yaml; its folder is the checkout
    batch_size: int = 8
    queue: int = 64  # pictures that wait or are drawn; more are refused
    max_steps: int = 100
    resident: int = 1000  # deltas in memory
    poll: float = 2.0  # seconds between two looks at the registry

    @property
    def root(self) -> Path:
        """The checkout."""
        return self.params.parent

    def open(self) -> Config:
        """The configuration, in a process whose folder becomes the checkout."""
        os.chdir(self.root)
        return load_config(self.params)


class Drawers(Protocol):
    """Who draws: a `Drawer` in this process, or several in others. Of a delta they are given what they `hold`."""

    at_once: int  # batches

    async def start(self) -> Facts:
        """Get ready to draw."""
        ...

    def hold(self, delta: SpectralDelta) -> Any:
        """What the others are given for a delta."""
        ...

    async def warm(self, held: Mapping[str, Any]) -> None:
        """See `Drawer`."""
        ...

    async def draw(self, pictures: list[Picture], held: Mapping[str, Any]) -> list[Result]:
        """See `Drawer`."""
        ...


class OneDrawer:
    """A `Drawer` in this process; see `Drawers`."""

    at_once = 1

    def __init__(self, config: Config, resident: int) -> None:
        self._drawer = Drawer(config, resident)

    async def start(self) -> Facts:
        """See `Drawers`."""
        return self._drawer.facts

    def hold(self, delta: SpectralDelta) -> SpectralDelta:
        """See `Drawers`."""
        return delta

    async def warm(self, held: Mapping[str, Any]) -> None:
        """See `Drawers`."""
        await asyncio.to_thread(self._drawer.warm, held)

    async def draw(self, pictures: list[Picture], held: Mapping[str, Any]) -> list[Result]:
        """See `Drawers`."""
        return await asyncio.to_thread(self._drawer.draw, pictures, held)


def one_process(settings: Settings) -> Server:
    """A server that draws in this process."""
    config = settings.open()
    return Server(settings, OneDrawer(config, settings.resident), connect(config.tracking, settings.root))


class Server:
    """Pictures of any registered versions, in common batches."""

    facts: Facts

    def __init__(self, settings: Settings, drawers: Drawers, tracking: Tracking) -> None:
        self._drawers, self._tracking, self._settings = drawers, tracking, settings
        self._batcher = Batcher(self._draw, settings.batch_size, drawers.at_once)
        self._held: OrderedDict[str, Any] = OrderedDict()  # deltas, the longest unused first
        self._lock = threading.Lock()
        self._brought: set[str] = set()

    async def start(self) -> None:
        """Wait for those that draw, and follow the registry."""
        self.facts = await self._drawers.start()
        self._watch = await asyncio.to_thread(
            Watch, lambda: read_models(self._tracking, self.facts.base_hash), self._settings.poll, self._bring_champions
        )
        await self._drawers.warm(dict(self._held))
        self._watch.start()

    def stop(self) -> None:
        """End the reading of the registry."""
        self._watch.stop()

    @property
    def models(self) -> Models:
        """What can be asked for now."""
        return self._watch.models

    async def draw(self, picture: Picture) -> Drawn:
        """Draw it in company. Raises Refusal for a prompt that is too long or a version that is broken."""
        held = {}
        for version, _ in picture.mix:  # read before it queues: nobody waits for what another asks for
            there = version.delta in self._held
            held[version.delta] = self._bring(version) if there else await asyncio.to_thread(self._bring, version)
        return await self._batcher(Order(picture, held))

    async def _draw(self, orders: list[Order]) -> list[Result]:
        held = {delta: what for order in orders for delta, what in order.held.items()}
        return await self._drawers.draw([order.picture for order in orders], held)

    def _bring(self, version: Version) -> Any:
        """What is held of a version's delta, read from the registry where it is not. Raises Refusal if it is broken."""
        with self._lock:
            if version.delta in self._held:
                self._held.move_to_end(version.delta)
                return self._held[version.delta]
        held = self._drawers.hold(self._read(version))
        with self._lock:
            self._held[version.delta] = held
            while len(self._held) > self._settings.resident:
                self._held.popitem(last=False)
        return held

    def _read(self, version: Version) -> SpectralDelta:
        from svdiff.spectral import SpectralDelta

        try:
            with tempfile.TemporaryDirectory() as folder:
                registered = model_version(self._tracking, version.concept, version.number)
                path, _ = fetch(self._tracking, registered, Path(folder))
                return SpectralDelta.load(path)
        except SvdiffError as error:
            broken = isinstance(error, BrokenVersion)
            code = "model_unavailable" if broken else "model_not_found"
            raise Refusal(
                f"{version.name}: {error}", status=503 if broken else 404, param="model", code=code
            ) from error

    def _bring_champions(self, models: Models) -> None:
        """Read deltas that came into use before anybody asks for them, as many as fit."""
        ending = f"@{CHAMPION}"
        champions = [version for name, version in models.named.items() if name.endswith(ending)]
        for version in champions[: self._settings.resident]:
            if version.delta not in self._brought:
                self._brought.add(version.delta)
                with suppress(Refusal):  # whoever asks for it is told
                    self._bring(version)

"""The server on Ray Serve: an HTTP front, and replicas that draw, on this machine or on those of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.registry.tracking import connect
from flows.serving.api import make_app
from flows.serving.drawing import Drawer, Facts, Picture, Result
from flows.serving.models import Refusal
from flows.serving.server import Server, Settings
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from svdiff.spectral import SpectralDelta

APPLICATION = "svdiff"
PATIENCE = 120.0  # seconds in which a batch finds another replica after its own died

logger = logging.getLogger(__name__)


class Replica:
    """A `Drawer` in a process of its own."""

    def __init__(self, settings: Settings) -> None:
        self._drawer = Drawer(settings.open(), settings.resident)

    async def describe(self) -> Facts:
        """What requests are checked against."""
        return self._drawer.facts

    async def warm(self, held: dict[str, Any]) -> None:
        """See `Drawer`."""
        await asyncio.to_thread(self._drawer.warm, Fetched(held))

    async def draw(self, pictures: list[Picture], held: dict[str, Any]) -> list[Result]:
        """See `Drawer`."""
        return await asyncio.to_thread(self._drawer.draw, pictures, Fetched(held))


class Fetched(Mapping[str, Any]):
    """Deltas by name, fetched from wherever the front put them when they are asked for."""

    def __init__(self, held: dict[str, Any]) -> None:
        self._held = held

    def __getitem__(self, name: str) -> Any:
        import ray

        return ray.get(self._held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Replicas:
    """All replicas; see `Drawers`. A batch whose replica dies is drawn by another."""

    def __init__(self, count: int) -> None:
        self.at_once = count

    async def start(self) -> Facts:
        """See `Drawers`: asks the first one that is there."""
        from ray import serve

        self._replicas = serve.get_deployment_handle("Replica", app_name=APPLICATION)
        facts: Facts = await self._replicas.describe.remote()
        return facts

    def hold(self, delta: SpectralDelta) -> Any:
        """See `Drawers`: where every replica can fetch it."""
        import ray

        return ray.put(delta)

    async def warm(self, held: Mapping[str, Any]) -> None:
        """See `Drawers`. Each has one call at a time, so that none has two of these."""
        await asyncio.gather(*(self._replicas.warm.remote(dict(held)) for _ in range(self.at_once)))

    async def draw(self, pictures: list[Picture], held: Mapping[str, Any]) -> list[Result]:
        """See `Drawers`. Raises Refusal if no replica is left."""
        from ray.exceptions import RayActorError

        until = time.monotonic() + PATIENCE
        while True:
            try:
                results: list[Result] = await self._replicas.draw.remote(pictures, dict(held))
                return results
            except RayActorError as error:
                if time.monotonic() > until:
                    raise Refusal("no replica is there to draw: try again later", status=503) from error
                logger.warning("a replica died with a batch, which goes to another: %s", type(error).__name__)
                await asyncio.sleep(0.5)


def run(settings: Settings, host: str, port: int, replicas: int, gpus: float) -> None:
    """Serve until interrupted. Raises SvdiffError for more replicas than the cluster has processors or GPUs for."""
    # Ten looks a second at the replicas, as by default, take a sixth of a core from drawing.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")
    import ray
    from ray import serve

    ray.init(log_to_driver=True, configure_logging=False)
    try:
        _check_room(ray.cluster_resources(), replicas, gpus)
        serve.start(http_options={"host": host, "port": port})
        serve.run(application(settings, replicas, gpus), name=APPLICATION, blocking=True)
    finally:
        serve.shutdown()
        ray.shutdown()


def application(settings: Settings, replicas: int, gpus: float) -> Any:
    """The front and its replicas, for `serve.run`."""
    from ray import serve

    def build() -> FastAPI:
        config = settings.open()
        return make_app(Server(settings, Replicas(replicas), connect(config.tracking, settings.root)), settings)

    drawing = serve.deployment(
        name="Replica",
        num_replicas=replicas,
        max_ongoing_requests=1,  # a batch
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )(Replica)

    @serve.deployment(name="Front", max_ongoing_requests=2 * settings.queue + 100, ray_actor_options={"num_cpus": 0})
    @serve.ingress(build)
    class Front:
        """The HTTP interface; bound to the replicas, so that they start first."""

        def __init__(self, replicas: Any) -> None:
            self.replicas = replicas

    return Front.bind(drawing.bind(settings))  # type: ignore[attr-defined]


def _check_room(resources: dict[str, float], replicas: int, gpus: float) -> None:
    for what, each in (("CPU", 1.0), ("GPU", gpus)):
        there = resources.get(what, 0)
        if each * replicas > there:
            raise SvdiffError(
                f"{replicas} replicas need {each * replicas:g} {what}s, the Ray cluster has {there:g}: ask for fewer, or "
                "start Ray on more machines (`ray start --address …`) and set RAY_ADDRESS"
            )

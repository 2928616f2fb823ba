"""The server on Ray Serve: an HTTP front, and replicas that draw, on this machine or on those of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from flows.serving.api import make_app
from flows.serving.drawing import Drawn, Facts, Picture, Replica, Settings
from flows.serving.models import Models, Refusal, Watch, read_models
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from fastapi import FastAPI

APPLICATION = "svdiff"
PATIENCE = 120.0  # seconds in which a picture finds another replica after its own died

logger = logging.getLogger(__name__)


class Fleet:
    """Replicas in other processes as one backend. A picture whose replica dies is drawn by another."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def start(self) -> None:
        """Meet the first replica, and read the registry."""
        from ray import serve

        self._replicas = serve.get_deployment_handle("Replica", app_name=APPLICATION)
        self.facts: Facts = await self._replicas.describe.remote()
        self._watch = await asyncio.to_thread(self._look)

    def _look(self) -> Watch:
        _, tracking = self._settings.open()
        return Watch(lambda: read_models(tracking, self.facts.base_hash), self._settings.poll).start()

    @property
    def models(self) -> Models:
        """What can be asked for now."""
        return self._watch.models

    async def draw(self, picture: Picture) -> Drawn:
        """Draw it on any replica. Raises Refusal if it cannot be drawn as asked, or no replica is left."""
        from ray.exceptions import RayActorError, RayTaskError

        until = time.monotonic() + PATIENCE
        while True:
            try:
                drawn: Drawn = await self._replicas.draw.remote(picture)
                return drawn
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, Refusal) else error) from None
            except RayActorError as error:
                if time.monotonic() > until:
                    raise Refusal("no replica is there to draw: try again later", status=503) from error
                logger.warning("a replica died with a picture, which goes to another: %s", type(error).__name__)
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
        return make_app(Fleet(settings), settings)

    ongoing = settings.queue
    drawing = serve.deployment(
        name="Replica",
        num_replicas=replicas,
        max_ongoing_requests=ongoing,
        ray_actor_options={"num_cpus": 1, "num_gpus": gpus},
    )(Replica)

    @serve.deployment(name="Front", max_ongoing_requests=2 * ongoing + 100, ray_actor_options={"num_cpus": 0})
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

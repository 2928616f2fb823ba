"""Draws pictures of any registered versions in common batches: the pipeline, its deltas, and the queue before it."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.registry.concepts import CHAMPION, BrokenVersion, fetch, model_version
from flows.registry.tracking import connect
from flows.serving.models import Mix, Models, Refusal, Version, Watch, read_models
from svdiff.config import Config, load_config
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from PIL.Image import Image

    from flows.registry.tracking import Tracking
    from svdiff.spectral import SpectralDelta

logger = logging.getLogger(__name__)

GATHERING = 0.02  # seconds that a batch with free places waits for company
# And this share of the time of the last one, while fewer wait than were here then: whoever got a picture asks for the next.
# Without it a server's pictures part into two halves that wait for each other.
RETURN = 0.1


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

    def open(self) -> tuple[Config, Tracking]:
        """Configuration and registry, in a process whose folder becomes the checkout."""
        os.chdir(self.root)
        config = load_config(self.params)
        return config, connect(config.tracking, self.root)


@dataclass(frozen=True)
class Picture:
    """One picture to draw; it depends on nothing else."""

    prompt: str
    seed: int
    mix: Mix
    steps: int
    guidance: float

    @property
    def kind(self) -> tuple[int, float]:
        """What all pictures of a batch have in common."""
        return self.steps, self.guidance


@dataclass(frozen=True)
class Drawn:
    """A picture as PNG, and how many were in its batch."""

    png: bytes
    batch: int


Result = Drawn | Exception


class Batcher:
    """Collects single pictures into batches of one kind, the oldest first."""

    def __init__(self, draw: Callable[[list[Picture]], list[Result]], size: int) -> None:
        self._draw, self._size = draw, size
        self._waiting: list[tuple[Picture, asyncio.Future[Drawn]]] = []
        self._task: asyncio.Task[None] | None = None
        self._here, self._took = 0, 0.0  # pictures drawn or waiting when the last batch ended, and its seconds

    async def __call__(self, picture: Picture) -> Drawn:
        """The picture, once a batch with it is drawn. Raises what drawing it raised."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((picture, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        while self._waiting:
            await self._company()
            batch = self._next()
            if not batch:
                continue
            start = time.monotonic()
            try:
                results = await asyncio.to_thread(self._draw, [picture for picture, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            self._here, self._took = len(batch) + len(self._waiting), time.monotonic() - start
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(result, Drawn):
                    future.set_result(result)
                else:
                    future.set_exception(result)

    async def _company(self) -> None:
        """Wait for others where places are free: `GATHERING`, and `RETURN`."""
        start = time.monotonic()
        while len(self._waiting) < self._size:
            waited, fewer = time.monotonic() - start, len(self._waiting) < self._here
            if waited >= (max(GATHERING, RETURN * self._took) if fewer else GATHERING):
                return
            await asyncio.sleep(GATHERING / 4)

    def _next(self) -> list[tuple[Picture, asyncio.Future[Drawn]]]:
        """Take the next batch out of those that wait."""
        wanted = [entry for entry in self._waiting if not entry[1].done()]
        batch = [entry for entry in wanted if entry[0].kind == wanted[0][0].kind][: self._size]
        taken = {id(future) for _, future in batch}
        self._waiting = [entry for entry in wanted if id(entry[1]) not in taken]
        return batch


class Drawer:
    """The base with the deltas that it was asked for; `draw` is called by one thread at a time."""

    def __init__(self, config: Config, tracking: Tracking, resident: int) -> None:
        from svdiff.models import family_of, load_pipeline, scratch
        from svdiff.spectral import SpectralPipeline, weights_hash

        pipe = load_pipeline(config.base)
        self.family = family_of(pipe)
        self.base_hash = weights_hash(self.family.network)
        self._personal = SpectralPipeline(pipe, cache=scratch() / "bases")
        self._tracking, self._eta, self._limit = tracking, config.sample.eta, resident
        self._read: dict[str, SpectralDelta] = {}  # not yet on the pipeline
        self._resident: OrderedDict[str, None] = OrderedDict()  # on it, the longest unused first

    def bring(self, version: Version) -> None:
        """Read a version's delta from the registry, beside whatever is being drawn. Raises Refusal if it is broken."""
        from svdiff.spectral import SpectralDelta

        if version.delta in self._read or version.delta in self._resident:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                registered = model_version(self._tracking, version.concept, version.number)
                path, _ = fetch(self._tracking, registered, Path(folder))
                self._read[version.delta] = SpectralDelta.load(path)
        except SvdiffError as error:
            broken = isinstance(error, BrokenVersion)
            code = "model_unavailable" if broken else "model_not_found"
            raise Refusal(
                f"{version.name}: {error}", status=503 if broken else 404, param="model", code=code
            ) from error

    def warm(self, versions: Iterable[Version]) -> None:
        """Put deltas on the pipeline before the first picture: the first one needs the base's decomposition."""
        for version in versions:
            try:
                self._place(version)
            except SvdiffError as error:
                logger.warning("cannot be served: %s", error)

    def draw(self, pictures: Sequence[Picture]) -> list[Result]:
        """One batch of pictures of one kind, in order; what cannot be drawn is its error, and the others are drawn."""
        from svdiff.sampling import Job, sample_images

        errors: dict[int, Exception] = {}
        for place, picture in enumerate(pictures):
            try:
                for version, _ in picture.mix:
                    self._place(version)
            except Exception as error:
                errors[place] = error
        sound = [picture for place, picture in enumerate(pictures) if place not in errors]
        self._evict(keep={version.delta for picture in sound for version, _ in picture.mix})
        images: list[Image] = []
        if sound:
            mixes = [{version.delta: weight for version, weight in picture.mix} or None for picture in sound]
            steps, guidance = sound[0].kind
            with self._personal.concepts(mixes) as pipe:
                images = sample_images(
                    pipe,
                    [Job(picture.prompt, picture.seed) for picture in sound],
                    steps=steps,
                    guidance=guidance,
                    eta=self._eta,
                    batch_size=len(sound),
                )
        drawn = iter(images)
        return [errors.get(place) or Drawn(_png(next(drawn)), len(sound)) for place in range(len(pictures))]

    def _place(self, version: Version) -> None:
        """Put a delta on the pipeline, if it is not there."""
        if version.delta not in self._resident:
            self.bring(version)
            self._personal.load_delta(self._read[version.delta], version.delta)
            self._personal.set_deltas([])  # the first is active by itself
            self._resident[version.delta] = None
        self._read.pop(version.delta, None)
        self._resident.move_to_end(version.delta)

    def _evict(self, keep: set[str]) -> None:
        while len(self._resident) > max(self._limit, len(keep)):
            oldest, _ = self._resident.popitem(last=False)
            self._personal.delete_delta(oldest)


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


@dataclass(frozen=True)
class Facts:
    """What requests are checked against."""

    base_hash: str
    base: str  # folder or Hub id
    side: int  # of every picture, in pixels
    steps: int  # where a request says nothing
    guidance: float


class Replica:
    """All of a server but its HTTP interface, in one process: registry, deltas, queue and pipeline."""

    def __init__(self, settings: Settings) -> None:
        config, tracking = settings.open()
        self._drawer = Drawer(config, tracking, settings.resident)
        family, base_hash = self._drawer.family, self._drawer.base_hash
        self._words = family.words()
        self.facts = Facts(base_hash, config.base.model, family.image_size, config.sample.steps, config.sample.guidance)
        self._batcher = Batcher(self._drawer.draw, settings.batch_size)
        self._room, self._seen = settings.resident, set[str]()
        self._watch = Watch(lambda: read_models(tracking, base_hash), settings.poll, self._bring)
        self._drawer.warm(self._in_use(self.models))

    async def start(self) -> None:
        """Follow the registry, where no front does: it reads all of it, which takes time from drawing."""
        self._watch.start()

    @property
    def models(self) -> Models:
        """What can be asked for now."""
        return self._watch.models

    async def describe(self) -> Facts:
        """`facts`, for a caller in another process."""
        return self.facts

    async def draw(self, picture: Picture) -> Drawn:
        """Draw it in company. Raises Refusal for a prompt that is too long or a version that is broken."""
        try:
            self._words.check_prompt(picture.prompt)
        except SvdiffError as error:
            raise Refusal(str(error), param="prompt") from None
        for version, _ in picture.mix:
            await asyncio.to_thread(self._drawer.bring, version)
        return await self._batcher(picture)

    def stop(self) -> None:
        """End the reading of the registry."""
        self._watch.stop()

    def _bring(self, models: Models) -> None:
        """Read deltas that came into use before anybody asks for them."""
        for version in self._in_use(models):
            if version.delta not in self._seen:
                self._seen.add(version.delta)
                with suppress(Refusal):  # whoever asks for it is told
                    self._drawer.bring(version)

    def _in_use(self, models: Models) -> list[Version]:
        """Champions, as many as fit."""
        ending = f"@{CHAMPION}"
        return [version for name, version in models.named.items() if name.endswith(ending)][: self._room]

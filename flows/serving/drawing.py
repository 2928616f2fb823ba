"""Draws pictures of any concepts in one batch: the pipeline and the deltas on it."""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flows.serving.models import Mix, Refusal
from svdiff.errors import SvdiffError

if TYPE_CHECKING:
    from PIL.Image import Image

    from svdiff.config import Config
    from svdiff.spectral import SpectralDelta

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Facts:
    """What requests are checked against."""

    base_hash: str
    base: str  # folder or Hub id
    side: int  # of every picture, in pixels
    steps: int  # where a request says nothing
    guidance: float


class Drawer:
    """The base with the deltas that it was asked for; `draw` is called by one thread at a time."""

    def __init__(self, config: Config, resident: int) -> None:
        from svdiff.models import family_of, load_pipeline, scratch
        from svdiff.spectral import SpectralPipeline, weights_hash

        pipe, sample = load_pipeline(config.base), config.sample
        self._family, self._eta, self._limit = family_of(pipe), sample.eta, resident
        network = self._family.network
        self.facts = Facts(
            weights_hash(network), config.base.model, self._family.image_size, sample.steps, sample.guidance
        )
        self._personal = SpectralPipeline(pipe, cache=scratch() / "bases")
        self._resident: OrderedDict[str, None] = OrderedDict()  # deltas on the pipeline, the longest unused first

    def warm(self, deltas: Mapping[str, SpectralDelta]) -> None:
        """Put deltas on the pipeline before the first picture, which would wait for the base's decomposition."""
        for name in list(deltas)[: self._limit]:
            try:
                self._place(name, deltas)
            except SvdiffError as error:
                logger.warning("cannot be served: %s", error)

    def draw(self, pictures: Sequence[Picture], deltas: Mapping[str, SpectralDelta]) -> list[Result]:
        """One batch of pictures of one kind, in order; what cannot be drawn is its error, and the others are drawn.

        `deltas` has those that the pictures want.
        """
        errors: dict[int, Exception] = {}
        for place, picture in enumerate(pictures):
            try:
                self._check(picture)
                for version, _ in picture.mix:
                    self._place(version.delta, deltas)
            except Exception as error:
                errors[place] = error
        sound = [picture for place, picture in enumerate(pictures) if place not in errors]
        self._evict(keep={version.delta for picture in sound for version, _ in picture.mix})
        drawn = iter(self._drawn(sound))
        return [errors.get(place) or next(drawn) for place in range(len(pictures))]

    def _drawn(self, pictures: Sequence[Picture]) -> list[Result]:
        """Pictures whose deltas are in place, as one batch; each alone where one of them spoils it."""
        from svdiff.sampling import Job, sample_images

        if not pictures:
            return []
        mixes = [{version.delta: weight for version, weight in picture.mix} or None for picture in pictures]
        steps, guidance = pictures[0].kind
        try:
            with self._personal.concepts(mixes) as pipe:
                images = sample_images(
                    pipe,
                    [Job(picture.prompt, picture.seed) for picture in pictures],
                    steps=steps,
                    guidance=guidance,
                    eta=self._eta,
                    batch_size=len(pictures),
                )
        except SvdiffError as error:  # weights so large that pixels are no numbers
            if len(pictures) > 1:
                return [one for picture in pictures for one in self._drawn([picture])]
            return [Refusal(str(error), param="model")]
        return [Drawn(_png(image), len(pictures)) for image in images]

    def _check(self, picture: Picture) -> None:
        try:
            self._family.check_prompt(picture.prompt)
        except SvdiffError as error:
            raise Refusal(str(error), param="prompt") from None

    def _place(self, name: str, deltas: Mapping[str, SpectralDelta]) -> None:
        """Put a delta on the pipeline, if it is not there."""
        if name not in self._resident:
            self._personal.load_delta(deltas[name], name)
            self._personal.set_deltas([])  # the first is active by itself
            self._resident[name] = None
        self._resident.move_to_end(name)

    def _evict(self, keep: set[str]) -> None:
        while len(self._resident) > max(self._limit, len(keep)):
            oldest, _ = self._resident.popitem(last=False)
            self._personal.delete_delta(oldest)


def _png(image: Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()

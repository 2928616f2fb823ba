"""The queue before whoever draws: single pictures become batches of one kind, the oldest first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flows.serving.drawing import Drawn, Picture, Result

GATHERING = 0.02  # seconds that a batch with free places waits for company
# And this share of the time of the last one, while fewer wait than were here then: whoever got a picture asks for the next.
# Without it a server's pictures part into two halves that wait for each other.
RETURN = 0.1


@dataclass(frozen=True)
class Order:
    """A picture, and what is held of its deltas."""

    picture: Picture
    held: Mapping[str, Any]


Waiting = tuple[Order, "asyncio.Future[Drawn]"]


class Batcher:
    """Collects pictures and deals them out in batches of at most `size`, to as many as can `draw` at once."""

    def __init__(self, draw: Callable[[list[Order]], Awaitable[list[Result]]], size: int, at_once: int = 1) -> None:
        self._draw, self._size, self._free = draw, size, at_once
        self._waiting: list[Waiting] = []
        self._dealing: asyncio.Task[None] | None = None
        self._drawing: set[asyncio.Task[None]] = set()
        self._here, self._return = 0, 0.0  # how many were here when a batch ended, and until when they are waited for

    async def __call__(self, order: Order) -> Drawn:
        """The picture, once a batch with it is drawn. Raises what drawing it raised."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((order, future))
        self._deal()
        return await future

    def _deal(self) -> None:
        if self._waiting and self._free and (self._dealing is None or self._dealing.done()):
            self._dealing = asyncio.create_task(self._deal_out())

    async def _deal_out(self) -> None:
        """Give everybody who is free a batch, while there are pictures."""
        while self._waiting and self._free:
            await self._company()
            batch = self._next()
            self._here = 0
            if batch:
                self._free -= 1
                task = asyncio.create_task(self._finish(batch))
                self._drawing.add(task)
                task.add_done_callback(self._drawing.discard)

    async def _finish(self, batch: list[Waiting]) -> None:
        start = time.monotonic()
        try:
            results = await self._draw([order for order, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        end = time.monotonic()
        self._free += 1
        self._here = max(self._here, len(self._waiting)) + len(batch)
        self._return = end + RETURN * (end - start)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():  # nobody waits for it any more
                continue
            if isinstance(result, Drawn):
                future.set_result(result)
            else:
                future.set_exception(result)
        self._deal()

    async def _company(self) -> None:
        """Wait for others where places are free: `GATHERING`, and `RETURN`."""
        gathered = time.monotonic() + GATHERING
        while len(self._waiting) < self._free * self._size:
            fewer = len(self._waiting) < self._here
            if time.monotonic() >= (max(gathered, self._return) if fewer else gathered):
                return
            await asyncio.sleep(GATHERING / 4)

    def _next(self) -> list[Waiting]:
        """Take the next batch out of those that wait: all of a kind, or an equal share of all that are free."""
        wanted = [entry for entry in self._waiting if not entry[1].done()]
        share = min(self._size, -(-len(wanted) // self._free))
        batch = [entry for entry in wanted if entry[0].picture.kind == wanted[0][0].picture.kind][:share]
        taken = {id(future) for _, future in batch}
        self._waiting = [entry for entry in wanted if id(entry[1]) not in taken]
        return batch

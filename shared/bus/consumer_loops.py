"""Loops of a stage that consumes work: one reads new entries, the others go on while the stage drains."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from shared.bus.consumer import Consumer

Loop = Callable[[], Coroutine[Any, Any, None]]


class ConsumerLoops:
    """The phases of `shared.service.Service`, for a stage with one consumer."""

    def __init__(self, consumer: Consumer[Any]) -> None:
        self._consumer = consumer
        self._background: asyncio.Task[None] | None = None

    @property
    def started(self) -> bool:
        """True from the end of `start`."""
        return self._background is not None

    async def start(self, *own: Loop) -> None:
        """Join the stream, and start the loops that look after its entries, with the stage's own."""
        await self._consumer.join()
        self._background = asyncio.create_task(self._run(own), name="background")

    async def serve(self) -> None:
        """Read work until cancelled. Requests in flight then go on; `drain` waits for them."""
        self._consumer.start_reading()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._consumer.read_entries())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        """Read nothing new, and wait until no request is in flight."""
        self._consumer.stop_reading()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            await self._consumer.wait_until_empty()
            watch.cancel()

    async def stop(self) -> None:
        """End all loops. What one of them has raised, `serve` or `drain` has raised."""
        if self._background is not None:
            self._background.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._background

    async def _watch(self) -> None:
        """Raise the exception that ended the loops."""
        assert self._background is not None
        await asyncio.shield(self._background)

    async def _run(self, own: tuple[Loop, ...]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for loop in (self._consumer.claim_entries, self._consumer.listen_control, *own):
                tasks.create_task(loop())

"""Life cycle of the engine: asyncio tasks talk to Redis, one thread computes; they share a mailbox and an outbox.

startup  join the stream, load the model
serve    read work and run it
drain    read nothing new; requests in flight run to their end
close    stop computing: other engines claim what is left as soon as our lease is released
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from redis.asyncio import Redis

from services.engine.loop.mailbox import Mailbox
from services.engine.loop.thread import ModelThread
from services.engine.metrics import EngineMetrics
from services.engine.transport.handler import GenerateHandler
from services.engine.transport.outbox import Outbox
from shared.bus.consumer_loops import ConsumerLoops
from shared.segments import Reader
from shared.watchdog import Watchdog

T = TypeVar("T")


class EngineService(Generic[T]):
    """`shared.service.Service` of this service.

    The model's thread calls `load`, then `run` with the result, which returns once the mailbox is closed. `capacity` is
    the number of requests that run at once, as the lease publishes it. `own_clients` and `reader` are closed with the
    service.
    """

    def __init__(
        self,
        *,
        handler: GenerateHandler,
        mailbox: Mailbox,
        outbox: Outbox,
        load: Callable[[], T],
        run: Callable[[T], None],
        metrics: EngineMetrics,
        capacity: int,
        own_clients: Sequence[Redis],
        watchdog: Watchdog | None = None,
        reader: Reader | None = None,
    ) -> None:
        self._reader = reader
        self._watchdog = watchdog
        self._handler = handler
        self._consumer = handler.consumer
        self._mailbox = mailbox
        self._outbox = outbox
        self._load = load
        self._run = run
        self._metrics = metrics
        self._capacity = capacity
        self._own_clients = own_clients
        self._loops = ConsumerLoops(handler.consumer)

    async def startup(self) -> None:
        self._outbox.open()
        self._thread = ModelThread(self._load, self._run)
        await self._thread.start()
        if self._watchdog is not None:
            self._watchdog.start()
        await self._loops.start(self._outbox.run, self._handler.admit, self._handler.expire, self._thread.watch)

    async def serve(self) -> None:
        await self._loops.serve()

    async def drain(self) -> None:
        await self._loops.drain()

    async def close(self) -> None:
        self._mailbox.close()
        self._outbox.close()
        if self._loops.started:
            with contextlib.suppress(Exception):  # `serve` or `drain` has raised it
                await self._thread.watch()
            await self._loops.stop()
            await self._consumer.leave()
        if self._watchdog is not None:
            self._watchdog.stop()
        for client in self._own_clients:
            await client.aclose()
        if self._reader is not None:
            self._reader.close()

    def load(self) -> dict[str, float]:
        self._metrics.update_waiting(len(self._consumer))
        in_flight = {"held": float(len(self._consumer)), "capacity": float(self._capacity)}
        return in_flight | self._metrics.load()

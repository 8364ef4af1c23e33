"""The life of the mm_encoder: its consumer's loops run beside the vision tower's thread.

startup  join the stream
serve    take work
drain    take nothing new; requests in hand go on to their end
close    cancel what is left: its entries are other replicas' as soon as our lease is released
"""

import asyncio
import contextlib
from collections.abc import Sequence

from redis.asyncio import Redis

from services.mm_encoder.handler import EncodeHandler
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from shared.bus.retry import retry_until_available


class MmEncoder:
    """See `shared.service.Service`. `own_clients` are closed with it; locks of dead replicas are released every
    `sweep_every_s`."""

    def __init__(
        self,
        *,
        handler: EncodeHandler,
        encode_locks: EncodeLocks,
        preparer: Preparer,
        batcher: Batcher,
        metrics: Metrics,
        capacity: int,
        sweep_every_s: float,
        own_clients: Sequence[Redis],
    ) -> None:
        self._handler = handler
        self._consumer = handler.consumer
        self._encode_locks = encode_locks
        self._preparer = preparer
        self._batcher = batcher
        self._metrics = metrics
        self._capacity = capacity
        self._sweep_every_s = sweep_every_s
        self._own_clients = own_clients
        self._background: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        self._batcher.start()
        await retry_until_available("begin", self._encode_locks.begin)
        await self._consumer.join()
        self._background = asyncio.create_task(self._run_background(), name="mm_encoder background")

    async def serve(self) -> None:
        """Take work until cancelled. Requests in hand then go on, for `drain` to wait for."""
        self._consumer.open()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._consumer.take())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        self._consumer.close()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            await self._consumer.empty()
            watch.cancel()

    async def close(self) -> None:
        await self._handler.close()
        if self._background is not None:
            self._background.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # `serve` or `drain` has raised it
                await self._background
        await self._preparer.close()
        await self._batcher.close()
        await self._consumer.leave()
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        return {"running": len(self._consumer), "limit": self._capacity, **self._metrics.figures()}

    async def _watch(self) -> None:
        """Raise what was raised in the background."""
        assert self._background is not None
        await asyncio.shield(self._background)

    async def _run_background(self) -> None:
        """Run what goes on while the service drains."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self._consumer.claim, self._consumer.listen, self._sweep, self._handler.watch):
                tasks.create_task(loop())

    async def _sweep(self) -> None:
        while True:
            await retry_until_available("sweep", self._encode_locks.sweep)
            await asyncio.sleep(self._sweep_every_s)

"""Life cycle of the mm_encoder: its consumer's loops run beside the vision tower's thread.

startup  join the stream
serve    read work
drain    read nothing new; requests in flight run to their end
close    cancel those that are left: other replicas claim their entries as soon as our lease is released
"""

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial

from redis.asyncio import Redis

from services.mm_encoder.handler import EncodeHandler
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.store.cache import Embeds
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from shared.bus.eviction import check_eviction_of_blobs
from shared.bus.retry import retry_until_available

SWEEP_SEGMENTS_S = 60.0  # between two; listing a directory of 4,096 takes 35 ms


class MmEncoder:
    """`shared.service.Service` of this service.

    `own_clients` are closed with it; locks of dead replicas are released every `sweep_every_s`.
    """

    def __init__(
        self,
        *,
        handler: EncodeHandler,
        encode_locks: EncodeLocks,
        preparer: Preparer,
        batcher: Batcher,
        metrics: Metrics,
        embeds: Embeds,
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
        self._embeds = embeds
        self._capacity = capacity
        self._sweep_every_s = sweep_every_s
        self._own_clients = own_clients
        self._background: asyncio.Task[None] | None = None

    async def startup(self) -> None:
        self._batcher.start()
        self._preparer.start()
        await retry_until_available("release locks", self._encode_locks.release_own)
        await self._consumer.join()
        self._background = asyncio.create_task(self._run_background(), name="mm_encoder background")

    async def serve(self) -> None:
        """Read work until cancelled. Requests in flight then go on; `drain` waits for them."""
        self._consumer.start_reading()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._consumer.read_entries())
            tasks.create_task(self._watch())

    async def drain(self) -> None:
        self._consumer.stop_reading()
        async with asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(self._watch())
            await self._consumer.wait_until_empty()
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
        return {"running": len(self._consumer), "limit": self._capacity, **self._metrics.load()}

    async def _watch(self) -> None:
        """Raise the exception that ended the background tasks."""
        assert self._background is not None
        await asyncio.shield(self._background)

    async def _run_background(self) -> None:
        """Run the loops that go on while the service drains."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._consumer.claim_entries())
            tasks.create_task(self._consumer.listen_control())
            tasks.create_task(self._sweep())
            tasks.create_task(self._sweep_segments())
            tasks.create_task(self._handler.watch())
            tasks.create_task(self._handler.helper.run())
            for client in self._own_clients:  # a Redis for blobs, which may be away
                asked = retry_until_available("eviction of blobs", partial(check_eviction_of_blobs, client))
                tasks.create_task(asked)

    async def _sweep(self) -> None:
        while True:
            await retry_until_available("sweep locks", self._encode_locks.release_dead)
            await asyncio.sleep(self._sweep_every_s)

    async def _sweep_segments(self) -> None:
        while True:
            await self._embeds.sweep()
            await asyncio.sleep(SWEEP_SEGMENTS_S)

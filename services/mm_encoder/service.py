"""Life cycle of the mm_encoder: its consumer's loops run beside the vision tower's thread.

startup  join the stream
serve    read work
drain    read nothing new; requests in flight run to their end
close    cancel those that are left: other replicas claim their entries as soon as our lease is released
"""

import asyncio
from collections.abc import Sequence
from functools import partial

from redis.asyncio import Redis

from services.mm_encoder.handler import EncodeHandler
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Preparer
from services.mm_encoder.store.cache import Embeds
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from shared.bus.consumer_loops import ConsumerLoops
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
        self._loops = ConsumerLoops(handler.consumer)

    async def startup(self) -> None:
        self._batcher.start()
        self._preparer.start()
        await retry_until_available("release locks", self._encode_locks.release_own)
        handler = self._handler
        own = (self._sweep, self._sweep_segments, self._check_eviction, handler.watch, handler.helper.run)
        await self._loops.start(*own)

    async def serve(self) -> None:
        await self._loops.serve()

    async def drain(self) -> None:
        await self._loops.drain()

    async def close(self) -> None:
        await self._handler.close()
        await self._loops.stop()
        await self._preparer.close()
        await self._batcher.close()
        await self._consumer.leave()
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        return {"running": len(self._consumer), "limit": self._capacity, **self._metrics.load()}

    async def _check_eviction(self) -> None:
        for client in self._own_clients:  # a Redis for blobs, which may be away
            await retry_until_available("eviction of blobs", partial(check_eviction_of_blobs, client))

    async def _sweep(self) -> None:
        while True:
            await retry_until_available("sweep locks", self._encode_locks.release_dead)
            await asyncio.sleep(self._sweep_every_s)

    async def _sweep_segments(self) -> None:
        while True:
            await self._embeds.sweep()
            await asyncio.sleep(SWEEP_SEGMENTS_S)

"""Back-pressure: a limit on the work in the pipeline, so that Redis holds no more than it should."""

import asyncio
import time
from collections.abc import Callable

from prometheus_client import Counter
from redis.asyncio import Redis

from services.gateway.errors import too_many
from shared.bus.keys import ENCODE, GENERATE, Keys

FRESH_S = 0.25  # age up to which a count is used; until then, requests that other gateways accept are not counted


class Backlog:
    """Number of entries of `encode` and `generate`, waiting and running, counted at most once every FRESH_S."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        limit: int,
        rejections: Counter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._redis = redis
        self._streams = [keys.stream(ENCODE), keys.stream(GENERATE)]
        self._limit = limit
        self._rejections = rejections
        self._clock = clock
        self._counted_at = -FRESH_S
        self._length = 0
        self._counting = asyncio.Lock()

    async def admit(self, count: int) -> None:
        """Add `count` to the backlog.

        Raises:
            RequestError: 429, there is no room for them.
            RedisError: the backlog cannot be counted.
        """
        async with self._counting:
            if self._clock() - self._counted_at >= FRESH_S:
                await self._count()
        if self._length + count > self._limit:
            self._rejections.labels("max_queue").inc()
            raise too_many(f"The queue is full: {self._length} requests are waiting or running, of {self._limit}.")
        self._length += count

    async def _count(self) -> None:
        async with self._redis.pipeline(transaction=False) as pipe:
            for stream in self._streams:
                pipe.xlen(stream)
            self._length = sum(await pipe.execute())
        self._counted_at = self._clock()

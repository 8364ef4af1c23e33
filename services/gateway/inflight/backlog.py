"""Count of the requests in the pipeline, and refusal of new ones that would be too many, or answered too late."""

import asyncio
import math
import time
from collections.abc import Callable

from prometheus_client import Counter
from redis.asyncio import Redis

from services.gateway.errors import TooLateError, too_many
from services.gateway.inflight.pace import Pace
from shared.bus.client import command
from shared.bus.keys import ENCODE, GENERATE, WAITING, Keys
from shared.bus.lua import read_script
from shared.bus.pipeline_view import QUEUES
from shared.messages import BATCH_PRIORITY, Share

FRESH_S = 0.25  # age up to which a count is used; until then, requests that other gateways accept are not counted

_GROUP = {stream: service for service, stream in QUEUES.items()}


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
        self._keys = keys
        self._view = redis.register_script(read_script("queue_view"))
        self._limit = limit
        self._rejections = rejections
        self._clock = clock
        self._counted_at = -FRESH_S
        self._length = 0
        self._waiting = 0  # of `generate`
        self._pace = Pace()
        self._counting = asyncio.Lock()

    async def admit(self, count: int, rest_s: float = math.inf, share: Share | None = None) -> None:
        """Add `count` to the backlog, of requests whose deadline is in `rest_s` seconds.

        Raises:
            RequestError: 429, there is no room for them; 503, the engines would begin them after their deadline.
            RedisError: the backlog cannot be counted.
        """
        async with self._counting:
            if self._clock() - self._counted_at >= FRESH_S:
                await self._count()
        if self._length + count > self._limit:
            self._rejections.labels("max_queue").inc()
            raise too_many(
                f"The queue is full: {self._length} requests are waiting or running; the limit is {self._limit}."
            )
        wait_s = await self._wait_s(rest_s, share)
        if wait_s is not None and wait_s > rest_s:
            self._rejections.labels("deadline").inc()
            raise TooLateError(wait_s, rest_s)
        self._length += count

    async def _wait_s(self, rest_s: float, share: Share | None) -> float | None:
        """Return the seconds until a new request begins; None if nobody knows.

        A tenant passes the queues of others; without a key file all pass the lines of batches.
        """
        wait_s = self._pace.wait_s(self._waiting)
        if wait_s is None or wait_s <= rest_s:
            return wait_s
        if share is None:  # nor need others be in a queue: without tenants nobody takes turns
            lines = await command(self._redis, "LLEN", self._keys.turn(GENERATE, BATCH_PRIORITY, ""))
            return self._pace.wait_s(max(0, self._waiting - lines))
        own = await command(self._redis, "LLEN", self._keys.turn(GENERATE, share.priority, share.name))
        return self._pace.wait_s(min(self._waiting, own))

    async def _count(self) -> None:
        lengths = {}
        for stream in (ENCODE, GENERATE):
            view = await self._view(keys=[self._keys.stream(stream)], args=[_GROUP[stream], WAITING])
            lengths[stream], _, pending, _, added = view
        self._length = sum(lengths.values())
        self._waiting = max(0, lengths[GENERATE] - pending)
        self._counted_at = self._clock()
        self._pace.note(self._counted_at, added - lengths[GENERATE])

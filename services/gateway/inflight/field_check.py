"""Refusal of requests that a replica of an older build would serve as something else than what was asked for."""

import asyncio
import time
from collections.abc import Callable

from redis.asyncio import Redis

from services.gateway.errors import older_build
from shared.bus.keys import Keys
from shared.bus.leases import heeded_fields
from shared.message_fields import GENERATION, generation_of
from shared.messages import Encode, Generate

FRESH_S = 0.25  # age up to which a look at the leases is used


class FieldCheck:
    """Generation of fields that all living replicas behind the gateway heed, looked for when a request needs one.

    A stage that is asleep has no replica to ask. It wakes in the newest build in an upgrade, and in the older one in a
    rollback, where this is blind until an older replica of some stage has a lease (docs/operations.md).
    """

    def __init__(self, redis: Redis, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._looked_at = -FRESH_S
        self._heeded = GENERATION
        self._looking = asyncio.Lock()

    async def check(self, work: Encode | Generate) -> None:
        """
        Raises:
            RequestError: 503, a replica lives that would leave out what this request asks for.
            RedisError: the leases cannot be read.
        """
        needed, names = generation_of(work)
        if needed == 0:
            return
        async with self._looking:
            if self._clock() - self._looked_at >= FRESH_S:
                self._heeded = await heeded_fields(self._redis, self._keys)
                self._looked_at = self._clock()
        if needed > self._heeded:
            raise older_build(names)

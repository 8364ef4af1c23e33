"""Refusal of requests that a replica of an older build would serve as something else than what was asked for."""

import asyncio
import time
from collections.abc import Callable

from redis.asyncio import Redis

from services.gateway.errors import older_build
from shared.bus import leases
from shared.bus.keys import Keys
from shared.message_fields import GENERATION, generation_of
from shared.messages import Output, Sampling

FRESH_S = 0.25  # age up to which a look at the leases is used
STAGES = ("mm_encoder", "engine", "postproc")  # one that is asleep has no replica, and will wake in the newest build


class FieldCheck:
    """Generation of fields that all living replicas behind the gateway heed, looked for when a request needs one."""

    def __init__(self, redis: Redis, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._redis = redis
        self._keys = keys
        self._clock = clock
        self._looked_at = -FRESH_S
        self._heeded = GENERATION
        self._looking = asyncio.Lock()

    async def check(self, sampling: Sampling, output: Output) -> None:
        """
        Raises:
            RequestError: 503, a replica lives that would leave out what this request asks for.
            RedisError: the leases cannot be read.
        """
        needed, names = generation_of(sampling, output)
        if needed == 0:
            return
        async with self._looking:
            if self._clock() - self._looked_at >= FRESH_S:
                self._heeded = await self._look()
                self._looked_at = self._clock()
        if needed > self._heeded:
            raise older_build(names)

    async def _look(self) -> int:
        fleet = [replica for stage in STAGES for replica in await leases.live(self._redis, self._keys, stage)]
        return min((each.fields for each in fleet if each.state != leases.UNREADABLE), default=GENERATION)

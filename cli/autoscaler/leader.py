"""Leader election: of several autoscalers one acts, whose name is in a key of Redis that it renews before it expires.

A leader that stalls may wake up after another has begun. It checks its own clock before each change, and each change
carries the version of the object that was read, so that Kubernetes refuses a late one.
"""

import time
from collections.abc import Callable
from pathlib import Path

from redis.asyncio import Redis

from shared.bus.keys import Keys
from shared.bus.lua import read_script

HERE = Path(__file__).parent  # where the scripts are

ROLE = "autoscaler"


class Leadership:
    """Claim of this replica to leadership."""

    def __init__(
        self, redis: Redis, keys: Keys, name: str, ttl_ms: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = keys.leader(ROLE)
        self._name = name
        self._ttl_ms = ttl_ms
        self._clock = clock
        self._until = 0.0
        self._hold = redis.register_script(read_script("hold_leadership", HERE))
        self._release = redis.register_script(read_script("release_leadership", HERE))

    @property
    def valid(self) -> bool:
        """True while no other replica can be leader."""
        return self._clock() < self._until

    async def hold(self) -> bool:
        """Become or stay the leader, unless another is."""
        asked = self._clock()
        leads = bool(await self._hold(keys=[self._key], args=[self._name, self._ttl_ms]))
        self._until = asked + self._ttl_ms / 1000 if leads else 0.0
        return leads

    async def release(self) -> None:
        """Give leadership up, so that another replica can take it at once."""
        self._until = 0.0
        await self._release(keys=[self._key], args=[self._name])

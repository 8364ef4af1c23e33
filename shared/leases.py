"""Liveness: one lease per replica, renewed by one command; and ownership of shards, decided in Lua."""

import msgspec
from redis.asyncio import Redis

from shared.keys import Keys


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a replica says of itself in its lease."""

    service: str
    name: str
    state: str  # starting, ready, draining
    version: str = ""
    load: dict[str, float] = {}


class Lease:
    """This replica's lease."""

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, ttl_ms: int) -> None:
        raise NotImplementedError

    async def renew(self, state: str, load: dict[str, float] | None = None) -> None:
        """Write status and expiry: one command (SET PX), plus SADD to the index on the first call."""
        raise NotImplementedError

    async def release(self) -> None:
        """Gone at once, so that others need not wait for expiry."""
        raise NotImplementedError


async def live(redis: Redis, keys: Keys, service: str) -> list[Replica]:
    """The replicas whose lease has not expired; prunes the index of the others' names."""
    raise NotImplementedError


class Shards:
    """Which tokens streams this postproc owns. A shard whose owner's lease has expired is free."""

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, count: int) -> None:
        raise NotImplementedError

    async def check_count(self) -> None:
        """Record the number of shards, once per deployment.

        Raises:
            ConfigError: the deployment already runs with another number.
        """
        raise NotImplementedError

    async def acquire(self, limit: int) -> dict[int, int]:
        """Take free shards while we own fewer than `limit`; returns {shard: epoch} of all we own now."""
        raise NotImplementedError

    async def release(self, shards: list[int]) -> None:
        raise NotImplementedError

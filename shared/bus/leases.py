"""Liveness: one lease per replica, renewed by one command; and ownership of shards, decided in Lua.

Who owns a shard writes under a fence: the script that writes first asks whether the shard is still ours under our
epoch, so a replica that was thought dead and wakes up changes nothing, however late its command arrives.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.lua import read_script
from shared.config import variable
from shared.errors import ConfigError, FencedError, ProtocolError

COUNT = "count"  # the field of the shards hash that holds their number

_FENCED = "FENCED"


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a replica says of itself in its lease."""

    service: str
    name: str
    state: str  # starting, ready, draining
    version: str = ""
    load: dict[str, float] = {}  # figures of now: docs/operations-monitoring.md has their names
    started: float = 0.0  # unix seconds


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Replica)


class Lease:
    """This replica's lease."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        service: str,
        name: str,
        ttl_ms: int,
        version: str = "",
        started: float = 0.0,
    ) -> None:
        self._redis = redis
        self._key = keys.replica(service, name)
        self._index = keys.replicas(service)
        self._service = service
        self._name = name
        self._ttl_ms = ttl_ms
        self._version = version
        self._started = started
        self._renew = redis.register_script(read_script("renew_lease"))

    async def renew(self, state: str, load: dict[str, float] | None = None) -> None:
        """Write status and expiry, and the name into the index, in one command."""
        status = _encoder.encode(Replica(self._service, self._name, state, self._version, load or {}, self._started))
        await self._renew(keys=[self._key, self._index], args=[status, self._ttl_ms, self._name])

    async def release(self) -> None:
        """Gone at once, so that others need not wait for expiry."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key)
            pipe.srem(self._index, self._name)
            await pipe.execute()


async def live(redis: Redis, keys: Keys, service: str) -> list[Replica]:
    """The replicas whose lease has not expired, by name; prunes the index of the others' names.

    Raises:
        ProtocolError: a replica of another version wrote a status that cannot be read.
    """
    found = await redis.register_script(read_script("live_replicas"))(
        keys=[keys.replicas(service)], args=[keys.replica_prefix(service)]
    )
    try:
        return sorted((_decoder.decode(status) for status in found), key=lambda replica: replica.name)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable lease of a {service}: {error}") from error


class Fence:
    """What a write counts under: that all these shards are ours, each under its epoch. Without shards: always."""

    __slots__ = ("_key", "_words")

    def __init__(self, keys: Keys, name: str, epochs: Mapping[int, int]) -> None:
        self._key = keys.shards()
        self._words: list[str | int] = [len(epochs)]
        for shard, epoch in epochs.items():
            self._words += [shard, f"{epoch} {name}"]

    async def run(
        self, script: Callable[..., Awaitable[Any]], keys: Sequence[str], args: Sequence[str | bytes | int]
    ) -> Any:
        """Run a script that begins with FENCE: called as redis-py's registered ones are.

        Raises:
            FencedError: one of the shards is not ours any more; nothing was written.
        """
        try:
            return await script(keys=[self._key, *keys], args=[*self._words, *args])
        except ResponseError as error:
            if str(error).startswith(_FENCED):
                raise FencedError(str(error)) from None
            raise


class Shards:
    """Which tokens streams this postproc owns. A shard whose owner's lease has expired is free.

    Renew the lease before the first `balance`. An owner that calls `balance` and does not see a shard, or sees it with
    another epoch than before, has lost it meanwhile.
    """

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, count: int) -> None:
        self._redis = redis
        self._key = keys.shards()
        self._leases = keys.replica_prefix(service)
        self._name = name
        self._count = count
        self._balance = redis.register_script(read_script("balance_shards"))
        self._release = redis.register_script(read_script("release_shards"))

    async def check_count(self) -> None:
        """Record the number of shards, once per deployment.

        Raises:
            ConfigError: the deployment already runs with another number.
        """
        await command(self._redis, "HSETNX", self._key, COUNT, self._count)
        recorded = int(await command(self._redis, "HGET", self._key, COUNT))
        if recorded != self._count:
            raise ConfigError(
                f"{variable('shards')} is {self._count}, but this deployment has {recorded}; to change it, stop every "
                f"service and delete the key {self._key}"
            )

    async def balance(self, ready: Collection[str], held: Collection[int] = ()) -> dict[int, int]:
        """Take or give up shards towards a fair share among us and the replicas named `ready`; returns {shard: epoch}
        of all we own now.

        `held` are those we go on with. One that is ours without our holding it, because we start anew, gets a higher
        epoch, so that what we wrote before and has not arrived is void.
        """
        others = [name for name in ready if name != self._name]
        args: list[str | int] = [self._leases, self._name, self._count, len(others), *others, *held]
        flat = await self._balance(keys=[self._key], args=args)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def release(self, shards: list[int]) -> None:
        """Let others have them at once. What we do not own is left alone."""
        await self._release(keys=[self._key], args=[self._name, *shards])

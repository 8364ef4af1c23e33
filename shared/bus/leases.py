"""Leases, by which replicas are known to be alive, and ownership of shards with fencing tokens.

The owner of a shard writes under a fencing token: the script that writes checks first that the shard still has this
owner and epoch. A replica that was declared dead and wakes up changes nothing, however late its command arrives.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import command
from shared.bus.keys import ENCODE, GENERATE, SERVICES, Keys
from shared.bus.lua import read_script
from shared.config import variable
from shared.errors import ConfigError, FencedError
from shared.message_fields import GENERATION
from shared.message_versions import OLDEST, VERSION, WRITES

COUNT = "count"  # the field of the shards hash that holds their number

UNREADABLE = "unreadable"  # state of a replica whose lease says nothing that we understand

_DRAINING = "draining"
_FENCED = "FENCED"


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """Status of a replica, as its lease publishes it."""

    service: str
    name: str
    state: str  # starting, ready, draining; for its readers also: unreadable
    version: str = ""
    load: dict[str, float] = {}  # current load by name: docs/operations-monitoring.md lists the names
    started: float = 0.0  # unix seconds
    facts: dict[str, str] = {}  # on which all replicas must agree (shared/fingerprint.py)
    oldest: int = 1  # version of the messages that it reads, and
    newest: int = 1
    writes: int = 1  # the newest version in which anything of this process may still come
    fields: int = 0  # generation up to which it heeds fields (shared/message_fields.py)


class Difference(msgspec.Struct, frozen=True):
    """Fact in which a living replica differs from one that would join."""

    replica: str
    fact: str
    value: str  # over there


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Replica)


class Lease:
    """Lease of this replica."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        service: str,
        name: str,
        ttl_ms: int,
        version: str = "",
        started: float = 0.0,
        facts: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._facts = dict(facts)
        self.writes = WRITES.number
        self._key = keys.replica(service, name)
        self._index = keys.replicas(service)
        self._service = service
        self._name = name
        self._ttl_ms = ttl_ms
        self._version = version
        self._started = started
        self._renew = redis.register_script(read_script("renew_lease"))
        self._join = redis.register_script(read_script("join_fleet"))

    async def fleet(self) -> list[Replica]:
        """Return all other living replicas."""
        found = [replica for service in SERVICES for replica in await live(self._redis, self._keys, service)]
        return [each for each in found if (each.service, each.name) != (self._service, self._name)]

    async def join(self, state: str) -> list[Difference]:
        """Write the first lease, unless a living replica has other facts; return in what they differ."""
        flat = await self._join(
            keys=[self._key, self._index, *map(self._keys.replicas, SERVICES)],
            args=[self._status(state, {}), self._ttl_ms, self._name, *map(self._keys.replica_prefix, SERVICES)],
        )
        words = [str(word, "utf-8", "replace") for word in flat]
        prefix = len(self._keys.replica("", "")) - 1
        return [Difference(words[i][prefix:], words[i + 1], words[i + 2]) for i in range(0, len(words), 3)]

    async def renew(self, state: str, load: dict[str, float] | None = None) -> None:
        """Write status and expiry, and the name into the index, in one script."""
        await self._renew(
            keys=[self._key, self._index], args=[self._status(state, load or {}), self._ttl_ms, self._name]
        )

    def _status(self, state: str, load: dict[str, float]) -> bytes:
        return _encoder.encode(
            Replica(
                self._service,
                self._name,
                state,
                self._version,
                load,
                self._started,
                self._facts,
                OLDEST,
                VERSION,
                self.writes,
                GENERATION,
            )
        )

    async def release(self) -> None:
        """Delete the lease, so that others need not wait for its expiry."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(self._key)
            pipe.srem(self._index, self._name)
            await pipe.execute()


async def live(redis: Redis, keys: Keys, service: str) -> list[Replica]:
    """Return the replicas whose lease has not expired, by name; remove the other names from the index.

    One whose status cannot be read is alive, in the state UNREADABLE.
    """
    found = await redis.register_script(read_script("live_replicas"))(
        keys=[keys.replicas(service)], args=[keys.replica_prefix(service)]
    )
    replicas = [_replica(service, str(name, "utf-8", "replace"), status) for name, status in _pairs(found)]
    return sorted(replicas, key=lambda replica: replica.name)


async def heeded_fields(redis: Redis, keys: Keys) -> int:
    """Return the generation up to which fields are heeded by all living replicas that may read a new request.

    Engines and encoders that drain read none; a postproc that does may still own the request's shard.
    """
    fleet = [replica for service in SERVICES if service != "gateway" for replica in await live(redis, keys, service)]
    readers = [each for each in fleet if each.state != _DRAINING or each.service == "postproc"]
    return min((each.fields for each in readers if each.state != UNREADABLE), default=GENERATION)


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _replica(service: str, name: str, status: bytes) -> Replica:
    try:
        return _decoder.decode(status)
    except msgspec.MsgspecError:
        return Replica(service, name, UNREADABLE)


class Fence:
    """Fencing token of a write: it takes effect only while `name` owns all these shards, each under its epoch.

    A write under a fence without shards always takes effect.
    """

    __slots__ = ("_args", "_key")

    def __init__(self, keys: Keys, name: str, epochs: Mapping[int, int]) -> None:
        self._key = keys.shards()
        self._args: list[str | int] = [len(epochs)]
        for shard, epoch in epochs.items():
            self._args += [shard, f"{epoch} {name}"]

    async def run(
        self, script: Callable[..., Awaitable[Any]], keys: Sequence[str], args: Sequence[str | bytes | int]
    ) -> Any:
        """Run a script that requires `fence`; it is called as a registered script of redis-py is.

        Raises:
            FencedError: another replica owns one of the shards; nothing was written.
        """
        try:
            return await script(keys=[self._key, *keys], args=[*self._args, *args])
        except ResponseError as error:
            if str(error).startswith(_FENCED):
                raise FencedError(str(error)) from None
            raise


class Shards:
    """Shards (tokens streams) of this postproc replica. A shard whose owner's lease has expired is free.

    Renew the lease before the first `balance`. If a later result lacks a shard, or has it under another epoch, this
    replica has lost the shard in between.
    """

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, count: int) -> None:
        self._redis = redis
        self._key = keys.shards()
        self._work = [keys.stream(ENCODE), keys.stream(GENERATE)]
        self._leases = keys.replica_prefix(service)
        self._name = name
        self._count = count
        self._balance = redis.register_script(read_script("balance_shards"))
        self._release = redis.register_script(read_script("release_shards"))

    async def check_count(self) -> None:
        """Record the number of shards, with which all living replicas agree.

        Raises:
            ConfigError: requests are under way that were distributed over another number.
        """
        recorded = await command(self._redis, "HGET", self._key, COUNT)
        if recorded is not None and int(recorded) != self._count:
            under_way = sum([await command(self._redis, "XLEN", stream) for stream in self._work])
            if under_way:
                raise ConfigError(
                    f"{variable('shards')} is {self._count}, but {under_way} requests are under way that were "
                    f"distributed over {int(recorded)}; let them end first"
                )
        await command(self._redis, "HSET", self._key, COUNT, self._count)

    async def balance(self, ready: Collection[str], held: Collection[int] = ()) -> dict[int, int]:
        """Take or give up shards towards a fair share among this replica and those named `ready`.

        Returns {shard: epoch} of all shards that this replica owns now. `held` are those it works on. A shard that it
        owns without holding it, after a restart under its name, gets a higher epoch, which fences off late writes of
        the process before.
        """
        others = [name for name in ready if name != self._name]
        args: list[str | int] = [self._leases, self._name, self._count, len(others), *others, *held]
        flat = await self._balance(keys=[self._key], args=args)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def release(self, shards: list[int]) -> None:
        """Give up those of these shards that this replica owns, so that others take them at once."""
        await self._release(keys=[self._key], args=[self._name, *shards])

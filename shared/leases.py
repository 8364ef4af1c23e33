"""Liveness: one lease per replica, renewed by one command; and ownership of shards, decided in Lua."""

import msgspec
from redis.asyncio import Redis

from shared.bus import command
from shared.config import variable
from shared.errors import ConfigError, ProtocolError
from shared.keys import Keys

COUNT = "count"  # the field of the shards hash that holds their number

# KEYS index; ARGV prefix of lease keys. Pruned in the same step as looked at: else a replica that renews in between
# would be alive and in no index.
_LIVE = """
local leases = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local lease = redis.call('GET', ARGV[1] .. name)
  if lease then
    leases[#leases + 1] = lease
  else
    redis.call('SREM', KEYS[1], name)
  end
end
return leases
"""

# KEYS shards; ARGV prefix of lease keys, me, number of shards, how many to own. Returns {shard, epoch, ...}.
_ACQUIRE = """
local mine, free = {}, {}
for shard = 0, ARGV[3] - 1 do
  local epoch, owner = string.match(redis.call('HGET', KEYS[1], shard) or '0 ', '^(%d+) (.*)$')
  if owner == ARGV[2] then
    mine[#mine + 1], mine[#mine + 2] = shard, tonumber(epoch)
  elseif owner == '' or redis.call('EXISTS', ARGV[1] .. owner) == 0 then
    free[#free + 1] = {shard, epoch + 1}
  end
end
for _, taken in ipairs(free) do
  if #mine / 2 >= tonumber(ARGV[4]) then break end
  redis.call('HSET', KEYS[1], taken[1], string.format('%d %s', taken[2], ARGV[2]))
  mine[#mine + 1], mine[#mine + 2] = taken[1], taken[2]
end
return mine
"""

# KEYS shards; ARGV me, shard... The epoch stays, so that the next owner's is higher.
_RELEASE = """
for i = 2, #ARGV do
  local epoch, owner = string.match(redis.call('HGET', KEYS[1], ARGV[i]) or '0 ', '^(%d+) (.*)$')
  if owner == ARGV[1] then redis.call('HSET', KEYS[1], ARGV[i], epoch .. ' ') end
end
"""


class Replica(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a replica says of itself in its lease."""

    service: str
    name: str
    state: str  # starting, ready, draining
    version: str = ""
    load: dict[str, float] = {}


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Replica)


class Lease:
    """This replica's lease."""

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, ttl_ms: int, version: str = "") -> None:
        self._redis = redis
        self._key = keys.replica(service, name)
        self._index = keys.replicas(service)
        self._service = service
        self._name = name
        self._ttl_ms = ttl_ms
        self._version = version

    async def renew(self, state: str, load: dict[str, float] | None = None) -> None:
        """Write status and expiry: one command (SET PX), plus SADD to the index when there was no lease before."""
        status = _encoder.encode(Replica(self._service, self._name, state, self._version, load or {}))
        before = await command(self._redis, "SET", self._key, status, "PX", self._ttl_ms, "GET")
        if before is None:
            await command(self._redis, "SADD", self._index, self._name)

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
    found = await redis.register_script(_LIVE)(keys=[keys.replicas(service)], args=[keys.replica_prefix(service)])
    try:
        return sorted((_decoder.decode(status) for status in found), key=lambda replica: replica.name)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"unreadable lease of a {service}: {error}") from error


class Shards:
    """Which tokens streams this postproc owns. A shard whose owner's lease has expired is free.

    Renew the lease before the first `acquire`. An owner that calls `acquire` and does not see a shard, or sees it with
    a higher epoch than before, has lost it meanwhile.
    """

    def __init__(self, redis: Redis, keys: Keys, service: str, name: str, count: int) -> None:
        self._redis = redis
        self._key = keys.shards()
        self._leases = keys.replica_prefix(service)
        self._name = name
        self._count = count
        self._acquire = redis.register_script(_ACQUIRE)
        self._release = redis.register_script(_RELEASE)

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

    async def acquire(self, limit: int) -> dict[int, int]:
        """Take free shards while we own fewer than `limit`; returns {shard: epoch} of all we own now."""
        flat = await self._acquire(keys=[self._key], args=[self._leases, self._name, self._count, limit])
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def release(self, shards: list[int]) -> None:
        """Let others have them at once. What we do not own is left alone."""
        await self._release(keys=[self._key], args=[self._name, *shards])

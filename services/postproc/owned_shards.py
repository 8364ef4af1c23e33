"""Shards of `tokens` that this replica owns, the fence that its writes are under, and its place in each stream."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from redis.asyncio import Redis

from services.postproc.request_state import EntryId
from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.leases import Fence, Shards, live
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogReader
from shared.log import logger
from shared.message_versions import VERSION

SERVICE = "postproc"

_LOOKS_A_LEASE = 12  # so that a dead replica's shards are taken over soon after its lease has expired

_log = logger(__name__)


class OwnedShard:
    """Place of this replica in the stream of one shard."""

    __slots__ = ("epoch", "last", "replay_until", "steps", "trimmed_at")

    def __init__(self, epoch: int, newest: EntryId) -> None:
        self.epoch = epoch
        self.replay_until = newest  # a former owner may have sent deltas of entries up to this one
        self.last: EntryId = (0, 0)  # the last entry folded
        self.steps = 0  # folded since the last trim
        self.trimmed_at: EntryId = (0, 0)  # `last` at the last trim


class OwnedShards:
    """This replica's fair share of the shards. A shard that it gains is read from the beginning of its stream."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        name: str,
        shards: Shards,
        reader: LogReader,
        on_lost: Callable[[int], None],
        lease_ms: int,
        clock: Callable[[], float],
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._name = name
        self._shards = shards
        self._reader = reader
        self._on_lost = on_lost
        self._clock = clock
        self._owned: dict[int, OwnedShard] = {}
        self.fence = Fence(keys, name, {})
        self.look_ms = max(1, lease_ms // _LOOKS_A_LEASE)
        self._look_at = -math.inf

    def __len__(self) -> int:
        return len(self._owned)

    def __getitem__(self, shard: int) -> OwnedShard:
        return self._owned[shard]

    def items(self) -> Iterable[tuple[int, OwnedShard]]:
        return self._owned.items()

    async def check_count(self) -> None:
        """
        Raises:
            ConfigError: the deployment has another number of shards.
        """
        await self._shards.check_count()

    async def rebalance(self) -> None:
        """Several times a lease, look which replicas are there, and take or give up shards towards a fair share."""
        if self._clock() < self._look_at:
            return
        looked_at = self._clock()
        replicas = await retry_until_available("replicas", lambda: live(self._redis, self._keys, SERVICE))
        if any(replica.state == "ready" and replica.newest > VERSION for replica in replicas):
            # What was written for newer replicas only they can read, so the shards are theirs.
            await retry_until_available("hand over", self.hand_over)
            self.fence = Fence(self._keys, self._name, {})
            self._look_at = looked_at + self.look_ms / 1000
            return
        ready = {replica.name for replica in replicas if replica.state == "ready" and replica.newest == VERSION}
        epochs = await retry_until_available("shards", lambda: self._shards.balance(ready, self._owned))
        self._drop([shard for shard, owned in self._owned.items() if epochs.get(shard) != owned.epoch])
        for shard, epoch in epochs.items():
            if shard not in self._owned:
                await self._add(shard, epoch)
        self.fence = Fence(self._keys, self._name, epochs)
        self._look_at = looked_at + self.look_ms / 1000

    def start_over(self) -> None:
        """Drop all shards and rebalance in the next turn."""
        self._drop(list(self._owned))
        self._look_at = -math.inf

    async def hand_over(self) -> None:
        """Release all shards. Their new owners find all that they need in the streams and journals."""
        await self._shards.release(list(self._owned))
        self._drop(list(self._owned))

    async def _add(self, shard: int, epoch: int) -> None:
        key = self._keys.tokens(shard)
        newest: list[Any] = await retry_until_available(
            "newest", lambda: command(self._redis, "XREVRANGE", key, "+", "-", "COUNT", 1)
        )
        self._owned[shard] = OwnedShard(epoch, parse_entry_id(str(newest[0][0], "ascii")) if newest else (0, 0))
        self._reader.positions[key] = "0"
        _log.info("shard gained", extra={"shard": shard, "epoch": epoch})

    def _drop(self, shards: list[int]) -> None:
        for shard in shards:
            del self._owned[shard]
            del self._reader.positions[self._keys.tokens(shard)]
            self._on_lost(shard)
            _log.info("shard given up", extra={"shard": shard})


def parse_entry_id(entry_id: str) -> EntryId:
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)


def next_entry(entry: EntryId) -> EntryId:
    """Return the smallest id behind `entry`."""
    return entry[0], entry[1] + 1

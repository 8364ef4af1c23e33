"""Work streams (consumer groups, at least once) and logs (plain XREAD, replayable)."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import MAX_BLOCK_MS, command
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.lua import read_script
from shared.bus.ownership import EntryOwnership, Poison
from shared.bus.wire import Wire
from shared.errors import ProtocolError
from shared.log import logger
from shared.messages import Encode, Generate, Message, from_entry, to_entry
from shared.metrics import Hop

_MOST_PENDING = 10_000  # more entries than one replica ever holds

_log = logger(__name__)

_KINDS: Mapping[str, type[Encode | Generate]] = {ENCODE: Encode, GENERATE: Generate}

_Entry = tuple[str, int, Mapping[bytes, bytes]]  # id, attempts, fields


class Delivery(msgspec.Struct, frozen=True):
    """One entry of a work stream, ours until acked."""

    entry_id: str
    message: Encode | Generate
    attempts: int  # 1 on first delivery


class Look(NamedTuple):
    """What a look at everyone's pending entries found."""

    ours: list[Delivery]  # now
    poisoned: list[Delivery]  # ours too, but delivered too often: answer their requests, then quarantine them
    lost: set[str]  # ids that were delivered to us and are no longer ours: another's, or nobody's any more
    left: int  # entries of dead replicas for which we had no room


class WorkStream:
    """One replica's membership in the consumer group of `encode` or `generate`.

    An entry is acked and deleted in one step when its work has ended (shared/bus/ownership.py), so XLEN is the stage's
    backlog: waiting plus running. Entries of consumers whose lease has expired are claimed by whoever looks next; idle
    time is never the criterion, since long work is not dead work. Renew the lease before the first `take`.

    A reply that was lost on its way, or a process that died and came back under its name, leaves entries in our own
    list that nobody works on; `claim_abandoned` finds these too. So it must be called now and then by a replica that
    is alone, and calls of `take` must not overlap.
    """

    def __init__(self, redis: Redis, keys: Keys, stream: str, service: str, name: str, max_deliveries: int) -> None:
        self._redis = redis
        self._key = keys.stream(stream)
        self._kind = _KINDS[stream]
        self._leases = keys.replica_prefix(service)
        self._group = service
        self._name = name
        self._max_deliveries = max_deliveries
        self._ownership = EntryOwnership(redis, keys, stream, service, name)
        self._hop = Hop(stream)
        self._claim_dead = redis.register_script(read_script("claim_dead"))
        self._claim_lost = redis.register_script(read_script("claim_lost"))
        self._leave = redis.register_script(read_script("leave"))
        self._claiming = asyncio.Lock()
        self._held: set[str] = set()  # delivered to our caller and, as far as we know, not finished
        self._taking = False
        self._takes = 0
        self._suspects: dict[str, int] = {}  # ours but not held -> value of _takes when first seen so

    async def join(self) -> None:
        """Create stream, group (from id 0) and consumer where absent."""
        try:
            await command(self._redis, "XGROUP", "CREATE", self._key, self._group, "0", "MKSTREAM")
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        await command(self._redis, "XGROUP", "CREATECONSUMER", self._key, self._group, self._name)

    async def take(self, count: int, block_ms: int) -> list[Delivery]:
        """Up to `count` new entries, waiting at most `block_ms` (0: do not wait) for the first.

        An entry that cannot be decoded is quarantined.
        """
        assert not self._taking, "calls of take must not overlap"
        self._taking = True
        try:
            entries = await self._read(count, block_ms)
            self._hop.read(entry_id for entry_id, _ in entries)
            return await self._deliver([(entry_id, 1, fields) for entry_id, fields in entries])
        finally:
            self._taking = False
            self._takes += 1

    async def claim_abandoned(self, count: int) -> Look:
        """Take over up to `count` entries of dead consumers, and delete consumers that have none left.

        What was delivered more than `max_deliveries` times is poison. Such an entry stays pending under our name until
        the caller has answered its request and quarantined it: if this process dies first, the next one answers.
        """
        async with self._claiming:
            lost, claimed, left = await self._claim(count)
            deliveries = await self._deliver(claimed)
        ours = [delivery for delivery in deliveries if delivery.attempts <= self._max_deliveries]
        return Look(ours, [delivery for delivery in deliveries if delivery.attempts > self._max_deliveries], lost, left)

    async def finish(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete those that are still ours, in one step."""
        await self._ownership.finish(entry_ids)
        self._held.difference_update(entry_ids)

    async def leave(self) -> None:
        """Delete our consumer if it owns nothing. What it still owns is claimed by others as soon as our lease is gone,
        and none of it is the worse for having been here."""
        await self._leave(keys=[self._key], args=[self._group, self._name, _MOST_PENDING])

    async def backlog(self) -> int:
        """Waiting plus running."""
        return int(await command(self._redis, "XLEN", self._key))

    async def _read(self, count: int, block_ms: int) -> list[tuple[str, Mapping[bytes, bytes]]]:
        # In Redis, BLOCK 0 is for ever.
        wait = ("BLOCK", min(block_ms, MAX_BLOCK_MS)) if block_ms > 0 else ()
        words = ("XREADGROUP", "GROUP", self._group, self._name, "COUNT", count, *wait, "STREAMS", self._key, ">")
        try:
            reply = await command(self._redis, *words)
        except ResponseError as error:
            # A Redis that came back without our stream, or lost it while we waited.
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            _log.warning("the consumer group is gone; joining again", extra={"stream": self._key})
            await self.join()
            return []
        return [(str(entry_id, "ascii"), fields) for _, entries in reply for entry_id, fields in entries]

    async def _claim(self, count: int) -> tuple[set[str], list[_Entry], int]:
        """(what we have lost, what we take over, how many entries of the dead are left)"""
        who: list[str | int] = [self._group, self._name]
        taken: list[Any] = []
        lost, forgotten = await self._compare()
        if forgotten[:count]:
            taken += await self._claim_lost(keys=[self._key], args=[*who, *forgotten[:count]])
        found, left = await self._claim_dead(keys=[self._key], args=[*who, self._leases, count - len(taken)])
        entries: list[_Entry] = [
            (str(entry_id, "ascii"), attempts, _pairs(fields)) for entry_id, attempts, fields in [*taken, *found]
        ]
        return lost, entries, int(left)

    async def _deliver(self, entries: Sequence[_Entry]) -> list[Delivery]:
        """Hold what can be read, before anything is awaited; quarantine the rest."""
        deliveries, unreadable = [], []
        for entry_id, attempts, fields in entries:
            self._held.add(entry_id)
            try:
                deliveries.append(Delivery(entry_id, self._work(fields), attempts))
            except ProtocolError as error:
                unreadable.append((entry_id, Poison(attempts, str(error))))
        for entry_id, poison in unreadable:
            await self._ownership.quarantine(entry_id, poison)
            self._held.discard(entry_id)
        return deliveries

    def _work(self, fields: Mapping[bytes, bytes]) -> Encode | Generate:
        message = from_entry(fields)
        if not isinstance(message, self._kind):
            raise ProtocolError(f"a {type(message).__name__} in {self._key}")
        return message

    async def _compare(self) -> tuple[set[str], list[str]]:
        """(entries delivered here that are no longer pending under our name; entries pending under our name that no
        call has delivered here and none under way can deliver)"""
        held_before = set(self._held)
        pending = await self._pending()
        # Finished meanwhile, or taken from us while we were paused, or lost by Redis.
        lost = held_before - pending if len(pending) < _MOST_PENDING else set()
        self._held -= lost
        unheld = pending - self._held
        # A reply to the call of `take` that is under way may carry them; once that call has returned, none will.
        self._suspects = {entry_id: self._suspects.get(entry_id, self._takes) for entry_id in unheld}
        ripe = [entry_id for entry_id, seen in self._suspects.items() if not self._taking or seen < self._takes]
        return lost, sorted(ripe)

    async def _pending(self) -> set[str]:
        words = ("XPENDING", self._key, self._group, "-", "+", _MOST_PENDING, self._name)
        try:
            reply = await self._redis.execute_command(*words, parse_detail=True)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return set()
        return {str(entry["message_id"], "ascii") for entry in reply}


def _flat(message: Message) -> list[bytes]:
    return [word for pair in to_entry(message).items() for word in pair]


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))


async def send(redis: Redis, key: str, message: Message, *, max_len: int | None = None) -> str:
    """XADD one message, trimming approximately to `max_len`; returns the entry id."""
    trim = () if max_len is None else ("MAXLEN", "~", max_len)
    return str(await command(redis, "XADD", key, *trim, "*", *_flat(message)), "ascii")


async def reply(redis: Redis, key: str, message: Message, max_len: int) -> bool:
    """The same into a stream that its reader has made: one that is gone leaves nothing behind. Returns whether it was
    there."""
    fields = _flat(message)
    return await command(redis, "XADD", key, "NOMKSTREAM", "MAXLEN", "~", max_len, "*", *fields) is not None


class LogWriter:
    """Sends message after message to one stream, over a connection of its own. Calls must not overlap."""

    def __init__(self, redis: Redis, key: str) -> None:
        self._wire = Wire(redis)
        self._key = key

    async def send(self, message: Message) -> None:
        """XADD one message; twice, when the connection breaks at the wrong moment."""
        await self._wire.call("XADD", self._key, "*", *_flat(message))


class LogReader:
    """Reads one or more plain streams from a position on: `tokens:{shard}`, `deltas:{gateway}`, `control`.

    Reading never consumes: `positions` (stream key -> id of the last entry seen) lives here, may be changed between
    reads, and may start anywhere: "0" is the first entry, "$" whatever comes after the first read began. It has a
    connection of its own from its first read on; reads must not overlap.
    """

    def __init__(self, redis: Redis, positions: dict[str, str], hop: str | None = None) -> None:
        """`hop`: what metrics call the streams' way to this reader; None where it is no stage of a request's."""
        self._wire = Wire(redis)
        self._hop = None if hop is None else Hop(hop)
        self.positions = dict(positions)

    async def read(self, count: int, block_ms: int) -> list[tuple[str, str, Message]]:
        """(stream key, entry id, message) of at most `count` entries a stream, after the current positions.

        Waits at most `block_ms` (0: does not wait) while there are none.

        Raises:
            ProtocolError: the next entry is of another version. What came before it has been returned, and the next
                call goes on behind it.
        """
        if not self.positions:
            await asyncio.sleep(block_ms / 1000)
            return []
        await self._pin()
        block_ms = min(block_ms, MAX_BLOCK_MS)
        wait = ("BLOCK", block_ms) if block_ms > 0 else ()
        words = ("XREAD", "COUNT", count, *wait, "STREAMS", *self.positions, *self.positions.values())
        messages: list[tuple[str, str, Message]] = []
        for stream, entries in await self._wire.call(*words, wait_s=block_ms / 1000) or ():
            self._decode(str(stream, "utf-8"), entries, messages)
        if self._hop is not None:
            self._hop.read(entry_id for _, entry_id, _ in messages)
        return messages

    async def close(self) -> None:
        """Give the connection back. Who reads as long as the client is open need not."""
        await self._wire.close()

    def _decode(
        self, stream: str, entries: Iterable[tuple[bytes, Sequence[bytes]]], into: list[tuple[str, str, Message]]
    ) -> None:
        """Append to `into` up to an unreadable entry, which is left for the next read unless it is the first of all."""
        for raw_id, fields in entries:
            entry_id = str(raw_id, "ascii")
            try:
                message = from_entry(_pairs(fields))
            except ProtocolError:
                if into:
                    return
                self.positions[stream] = entry_id
                raise
            into.append((stream, entry_id, message))
            self.positions[stream] = entry_id

    async def _pin(self) -> None:
        """Turn "$" into the id it means now: asked again by every read it would skip what comes between two."""
        for stream, position in self.positions.items():
            if position == "$":
                newest = await self._wire.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
                self.positions[stream] = str(newest[0][0], "ascii") if newest else "0-0"

"""Work streams, `encode` and `generate`: each entry goes to one replica of a consumer group, at least once."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import MAX_BLOCK_MS, command
from shared.bus.keys import ENCODE, GENERATE, NEWER, WAITING, Keys
from shared.bus.lua import read_script
from shared.bus.ownership import Ended, EntryOwnership, Poison
from shared.bus.retry import retry_until_available
from shared.bus.streams import pairs
from shared.bus.translation import translate_entries
from shared.errors import NewerVersionError, ProtocolError, unreadable
from shared.log import logger
from shared.message_codec import from_entry
from shared.message_versions import VERSION, WRITES
from shared.messages import Encode, Failed, Generate
from shared.metrics import Hop

TURNS_PAGE = 64  # entries that one script puts among those that wait
TURNS_BLOCK_MS = 50  # wait of a replica with room, while others may put entries among those that wait
_MOST_PENDING = 10_000  # more entries than one replica ever holds

_log = logger(__name__)

_KINDS: Mapping[str, type[Encode | Generate]] = {ENCODE: Encode, GENERATE: Generate}

_Entry = tuple[str, int, Mapping[bytes, bytes]]  # id, attempts, fields


class Delivery(msgspec.Struct, frozen=True):
    """One entry of a work stream, owned by this replica until acked."""

    entry_id: str
    message: Encode | Generate
    attempts: int  # 1 on first delivery


class ClaimResult(NamedTuple):
    """Result of comparing everyone's pending entries with leases and with what was delivered to this replica."""

    claimed: list[Delivery]  # owned by this replica now
    poisoned: list[Delivery]  # owned too, but delivered too often: fail their requests, then quarantine them
    lost: set[str]  # ids that were delivered to this replica and that it no longer owns
    left: int  # claimable entries beyond the number asked for


class WorkStream:
    """One replica's membership in the consumer group of `encode` or `generate`.

    An entry is acked and deleted in one step when its work has ended (shared/bus/ownership.py), so XLEN is the stage's
    backlog: waiting plus running. Entries of consumers whose lease has expired are claimed by the first replica that
    looks; idle time is never the criterion, since long work is not dead work. Renew the lease before the first read.

    A lost reply, or a process that died and restarted under its name, leaves entries pending under this replica's own
    name that it does not work on; `claim_abandoned` finds these too. So even a replica that is alone must call it now
    and then, and calls of `read_new` must not overlap.

    Entries of tenants are read in the order of shared/bus/scripts/turns.lua instead of that of their arrival. While any
    are there, whoever has room first takes those whose turn it is. They wait as entries that are pending for the
    consumer WAITING, which the index of turns only orders: what it lacks is taken all the same.
    """

    def __init__(self, redis: Redis, keys: Keys, stream: str, service: str, name: str, max_deliveries: int) -> None:
        self.ownership = EntryOwnership(redis, keys, stream, service, name)
        self._redis = redis
        self._keys = keys
        self._key = keys.stream(stream)
        self._kind = _KINDS[stream]
        self._leases = keys.replica_prefix(service)
        self._group = service
        self._name = name
        self._max_deliveries = max_deliveries
        self._hop = Hop(stream)
        self._claim_dead = redis.register_script(read_script("claim_dead"))
        self._take_turns = redis.register_script(read_script("take_turns"))
        self._records = keys.request("")
        self.takes_turns = False  # True while entries of tenants may be there
        self._claim_undelivered = redis.register_script(read_script("claim_undelivered"))
        self._leave_newer = redis.register_script(read_script("leave_newer"))
        self._replicas = keys.replicas(service)
        self._delete_consumer = redis.register_script(read_script("delete_consumer"))
        self._claiming = asyncio.Lock()
        self._reading = False
        self._reads = 0  # calls of `read_new` that have ended
        self._undelivered: dict[str, int] = {}  # pending under our name, never delivered -> `_reads` when first seen

    async def join(self) -> None:
        """Create stream, group (from id 0) and consumer where absent."""
        try:
            await command(self._redis, "XGROUP", "CREATE", self._key, self._group, "0", "MKSTREAM")
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        await command(self._redis, "XGROUP", "CREATECONSUMER", self._key, self._group, self._name)

    async def read_new(self, count: int, block_ms: int) -> list[Delivery]:
        """Return up to `count` new entries, waiting at most `block_ms` (0: do not wait) for the first.

        An entry that cannot be decoded is quarantined, and its request answered with an error if it names one.
        """
        assert not self._reading, "calls of read_new must not overlap"
        assert count > 0, "Redis takes a COUNT of 0 for no limit"
        self._reading = True
        try:
            entries = await self._read_in_turn(count, block_ms)
            self._hop.read(entry_id for entry_id, _ in entries)
            return await self._deliver([(entry_id, 1, fields) for entry_id, fields in entries])
        finally:
            self._reading = False
            self._reads += 1

    async def claim_abandoned(self, count: int) -> ClaimResult:
        """Claim up to `count` entries of dead consumers, and delete consumers that have none left.

        An entry that was delivered more than `max_deliveries` times is poison. It stays pending under our name until
        the caller has answered its request and quarantined it: if this process dies first, the next replica answers.
        """
        async with self._claiming:
            lost, claimed, left = await self._claim(count)
            deliveries = await self._deliver(claimed)
        good = [delivery for delivery in deliveries if delivery.attempts <= self._max_deliveries]
        poisoned = [delivery for delivery in deliveries if delivery.attempts > self._max_deliveries]
        return ClaimResult(good, poisoned, lost, left)

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete those of these entries that this replica owns, in one step."""
        await self.ownership.ack(entry_ids)

    async def finish(self, entries: Sequence[Ended]) -> None:
        """End those of these entries that this replica owns: their Finish is in the tokens stream."""
        await self.ownership.finish(entries)

    async def leave(self) -> None:
        """Delete our consumer if it owns no entries.

        Other replicas claim its entries as soon as our lease is gone, and this delivery does not count as an attempt.
        Entries that they could not read are translated.
        """
        if WRITES.number < VERSION:
            await translate_entries(self._redis, self._keys, self._group, self._name)
        await self._delete_consumer(keys=[self._key], args=[self._group, self._name, _MOST_PENDING])

    async def backlog(self) -> int:
        """Return the number of entries, waiting and running."""
        return int(await command(self._redis, "XLEN", self._key))

    async def _read_in_turn(self, count: int, block_ms: int) -> list[tuple[str, Mapping[bytes, bytes]]]:
        """Read what is next among tenants, or without any, in the order of arrival."""
        if self.takes_turns:
            if entries := await self._take(count):
                return entries
            block_ms = min(block_ms, TURNS_BLOCK_MS)
        entries = await self._read(count, block_ms)
        charged = [part for _, fields in entries if b"k" in fields for part in (fields[b"k"], fields.get(b"r", b""))]
        if charged:
            await self._run_turns(0, charged)
        self.takes_turns = bool(charged)
        return entries

    async def _take(self, count: int) -> list[tuple[str, Mapping[bytes, bytes]]]:
        """Take the entries whose turn it is, after all others have been put among those that wait."""
        while True:
            more, taken = await self._run_turns(count)
            if not more:
                break
        return [(str(entry_id, "ascii"), pairs(fields)) for entry_id, fields in taken]

    async def _run_turns(self, count: int, charged: Sequence[bytes] = ()) -> tuple[int, Sequence[Any]]:
        args: list[str | bytes | int] = [self._group, self._name, count, TURNS_PAGE, WAITING, self._records, *charged]
        try:
            more, taken = await self._take_turns(keys=[self._key], args=args)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            await self.join()
            return 0, ()
        return more, taken

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
        """Return (entries lost, entries claimed, number of claimable entries left)."""
        consumer: list[str | int] = [self._group, self._name]
        claimed: list[Any] = []
        lost, undelivered = await self._compare()
        if undelivered[:count]:
            claimed += await self._claim_undelivered(keys=[self._key], args=[*consumer, *undelivered[:count]])
        found, left, waiting = await self._claim_dead(
            keys=[self._key, self._replicas],
            args=[*consumer, self._leases, count - len(claimed), NEWER, VERSION, WAITING],
        )
        self.takes_turns |= waiting > 0
        entries: list[_Entry] = [
            (str(entry_id, "ascii"), attempts, pairs(fields)) for entry_id, attempts, fields in [*claimed, *found]
        ]
        return lost, entries, int(left) + len(undelivered[count:])

    async def _deliver(self, entries: Sequence[_Entry]) -> list[Delivery]:
        """Record as delivered what can be decoded, before anything is awaited; leave what is newer, and end the rest.

        That waits for Redis rather than fail: the caller would lose the other entries, which count as delivered.
        """
        deliveries, damaged, newer = [], [], []
        for entry_id, attempts, fields in entries:
            self.ownership.delivered.add(entry_id)
            try:
                deliveries.append(Delivery(entry_id, self._decode(fields), attempts))
            except NewerVersionError as error:
                newer.append((entry_id, fields, attempts, error.version))
            except ProtocolError as error:
                damaged.append((entry_id, fields, Poison(attempts, str(error))))
        for entry_id, fields, attempts, version in newer:
            if await retry_until_available("leave", partial(self._leave, entry_id, version)) == b"nobody":
                damaged.append((entry_id, fields, Poison(attempts, f"of version {version}, which nobody reads")))
            else:
                self.ownership.delivered.discard(entry_id)
        for entry_id, fields, poison in damaged:
            await retry_until_available("quarantine", partial(self._end_damaged, entry_id, fields, poison))
            self.ownership.delivered.discard(entry_id)
        return deliveries

    async def _leave(self, entry_id: str, version: int) -> bytes:
        """Leave an entry to newer replicas; return b"nobody" if none lives."""
        args: list[str | int] = [self._group, self._name, entry_id, version, self._leases, NEWER]
        return bytes(await self._leave_newer(keys=[self._key, self._replicas], args=args))

    async def _end_damaged(self, entry_id: str, fields: Mapping[bytes, bytes], poison: Poison) -> None:
        """Quarantine an entry, and answer the request that it names."""
        request_id = fields.get(b"r", b"").decode(errors="replace")
        if not request_id:
            await self.ownership.quarantine(entry_id, poison)
            return
        failed = Failed(request_id, unreadable("the work entry"))
        await self.ownership.end_with_failed(entry_id, failed, poison=poison)

    def _decode(self, fields: Mapping[bytes, bytes]) -> Encode | Generate:
        message = from_entry(fields)
        if not isinstance(message, self._kind):
            raise ProtocolError(f"a {type(message).__name__} in {self._key}")
        return message

    async def _compare(self) -> tuple[set[str], list[str]]:
        """Compare the entries delivered here with those pending under our name.

        Returns (delivered and no longer pending: lost; pending and not delivered, by no read under way either).
        """
        ownership = self.ownership
        delivered_before = set(ownership.delivered)
        pending = await self._pending()
        # Taken from us while we were paused, or lost by Redis. Those of a longer list may be behind its end.
        lost = delivered_before & ownership.delivered if len(pending) < _MOST_PENDING else set()
        lost -= pending | ownership.ending
        ownership.delivered -= lost
        # The reply to a read that is under way may deliver them; once that read has ended, none will.
        self._undelivered = {
            entry_id: self._undelivered.get(entry_id, self._reads) for entry_id in pending - ownership.delivered
        }
        return lost, sorted(
            entry_id for entry_id, seen in self._undelivered.items() if not self._reading or seen < self._reads
        )

    async def _pending(self) -> set[str]:
        words = ("XPENDING", self._key, self._group, "-", "+", _MOST_PENDING, self._name)
        try:
            reply = await self._redis.execute_command(*words, parse_detail=True)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            return set()
        return {str(entry["message_id"], "ascii") for entry in reply}

"""What Redis knows of one request: its record (a hash) and its token journal (a string of uint32).

The record is born with the request's first work entry, in one transaction, and dies with the request. A stage that
takes an entry and finds no record, or a cancelled one, drops the entry. No journal is written without its record, so
a late writer leaves nothing behind.
"""

from collections.abc import Sequence

import msgspec
from redis.asyncio import Redis

from shared.keys import GENERATE, Keys
from shared.messages import (
    Begin,
    Cancel,
    Encode,
    Failed,
    Generate,
    Request,
    decode_begin,
    decode_request,
    encode_begin,
    encode_request,
    pack_ids,
    to_entry,
    unpack_ids,
)

CONTROL_LENGTH = 10_000  # entries the control stream keeps, about; the record says the same to whoever missed one
TOKEN_BYTES = 4

# KEYS record, stream done, generate; ARGV group, entry id, v, m. Of two replicas that finish the same entry, the
# first appends: XACK tells it.
_HAND_ON = """
local alive = redis.call('EXISTS', KEYS[1]) == 1 and not redis.call('HGET', KEYS[1], 'cancelled')
local first = redis.call('XACK', KEYS[2], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[2], ARGV[2])
if alive and first == 1 then
  redis.call('XADD', KEYS[3], '*', 'v', ARGV[3], 'm', ARGV[4])
end
return alive and 1 or 0
"""

# KEYS record, journal, stream done, deltas; ARGV group, entry id, v, m, length of deltas. The first decides here too: a
# replica that lost the entry while it was paused must not fail a request that is in the engine's hands.
_REFUSE = """
local first = redis.call('XACK', KEYS[3], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[3], ARGV[2])
if first == 1 then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'v', ARGV[3], 'm', ARGV[4])
  redis.call('UNLINK', KEYS[1], KEYS[2])
end
return first
"""

# KEYS record. A claim of a request that has ended must not bring a record without a request to life.
_CLAIM = """
if redis.call('EXISTS', KEYS[1]) == 0 then return false end
redis.call('HINCRBY', KEYS[1], 'epoch', 1)
return redis.call('HMGET', KEYS[1], 'request', 'epoch', 'cancelled', 'begin')
"""

# KEYS control, record...; ARGV length of control, v, m.
_CANCEL = """
local marked = 0
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    marked = marked + redis.call('HSET', KEYS[i], 'cancelled', '1')
  end
end
if marked > 0 then
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', 'v', ARGV[2], 'm', ARGV[3])
end
return marked
"""

# KEYS (record, journal)...; ARGV (offset, bytes)... Returns the places, from 1, of the writes that left a hole.
_WRITE_JOURNAL = """
local refused = {}
for i = 1, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    if redis.call('STRLEN', KEYS[i + 1]) < tonumber(ARGV[i]) then
      refused[#refused + 1] = (i + 1) / 2
    else
      redis.call('SETRANGE', KEYS[i + 1], ARGV[i], ARGV[i + 1])
    end
  end
end
return refused
"""

# KEYS record...; ARGV begin...
_WRITE_BEGINS = """
for i = 1, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then redis.call('HSET', KEYS[i], 'begin', ARGV[i]) end
end
"""


class Record(msgspec.Struct, frozen=True):
    """A request as its record has it now."""

    request: Request
    epoch: int
    cancelled: bool
    begin: Begin | None = None  # of the newest epoch whose tokens the journal may hold; set once there is a journal


class Records:
    """All reading and writing of records and journals."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._hand_on = redis.register_script(_HAND_ON)
        self._refuse = redis.register_script(_REFUSE)
        self._claim = redis.register_script(_CLAIM)
        self._cancel = redis.register_script(_CANCEL)
        self._write_journal = redis.register_script(_WRITE_JOURNAL)
        self._write_begins = redis.register_script(_WRITE_BEGINS)

    async def submit(self, stream: str, message: Encode | Generate) -> None:
        """Create the record and append the work entry to `stream`, in one transaction (gateway)."""
        request = message.request
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(self._keys.request(request.id), mapping={b"request": encode_request(request), b"epoch": b"0"})
            pipe.xadd(self._keys.stream(stream), to_entry(message))  # type: ignore[arg-type]  # dict is invariant
            await pipe.execute()

    async def hand_on(self, message: Generate, stream_done: str, entry_id: str, group: str) -> bool:
        """Append `message` to `generate` and ack and delete the entry of `stream_done`, in one go (mm_encoder).

        Returns False, and only acks and deletes, when the record is gone or cancelled. An entry that another replica
        has handed on already is not handed on again; that is True, since the request is in the engine's hands.
        """
        entry = to_entry(message)
        return bool(
            await self._hand_on(
                keys=[
                    self._keys.request(message.request.id),
                    self._keys.stream(stream_done),
                    self._keys.stream(GENERATE),
                ],
                args=[group, entry_id, entry[b"v"], entry[b"m"]],
            )
        )

    async def refuse(
        self, message: Failed, gateway: str, stream_done: str, entry_id: str, group: str, max_len: int
    ) -> bool:
        """Tell `gateway`, ack and delete the entry of `stream_done`, and delete the record, in one go (mm_encoder).

        Returns False, and does none of it, when another replica has ended the entry.
        """
        entry = to_entry(message)
        return bool(
            await self._refuse(
                keys=[
                    self._keys.request(message.request_id),
                    self._keys.journal(message.request_id),
                    self._keys.stream(stream_done),
                    self._keys.deltas(gateway),
                ],
                args=[group, entry_id, entry[b"v"], entry[b"m"], max_len],
            )
        )

    async def claim(self, request_id: str) -> Record | None:
        """Become the request's owner: raise its epoch by one and return it; None if the record is gone (engine)."""
        fields = await self._claim(keys=[self._keys.request(request_id)])
        return _record(fields) if fields else None

    async def get(self, request_ids: Sequence[str]) -> dict[str, Record]:
        """The records that exist, in one round trip (postproc)."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hmget(self._keys.request(request_id), ["request", "epoch", "cancelled", "begin"])
            found = await pipe.execute()
        return {request_id: _record(fields) for request_id, fields in zip(request_ids, found, strict=True) if fields[0]}

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Mark existing records cancelled and broadcast `Cancel` if any was not yet."""
        entry = to_entry(Cancel(tuple(request_ids)))
        await self._cancel(
            keys=[self._keys.control(), *map(self._keys.request, request_ids)],
            args=[CONTROL_LENGTH, entry[b"v"], entry[b"m"]],
        )

    async def write_journal(self, writes: Sequence[tuple[str, int, Sequence[int]]]) -> list[str]:
        """(request id, index, tokens): idempotent writes at their place, in one round trip (postproc).

        A request without a record is passed over. Returns the ids whose write would have left a hole, after a Redis
        that lost its last second: nothing of it was written, and the writer starts again from token 0.
        """
        if not writes:
            return []
        refused = await self._write_journal(
            keys=[name for write in writes for name in (self._keys.request(write[0]), self._keys.journal(write[0]))],
            args=[part for _, index, tokens in writes for part in (TOKEN_BYTES * index, pack_ids(tokens))],
        )
        return [writes[place - 1][0] for place in refused]

    async def write_begins(self, begins: Sequence[Begin]) -> None:
        """Keep what usage needs, and the epoch, once the journal holds the tokens before them (postproc).

        A request without a record is passed over.
        """
        if begins:
            names = [self._keys.request(begin.request_id) for begin in begins]
            await self._write_begins(keys=names, args=[encode_begin(begin) for begin in begins])

    async def read_journal(self, request_id: str) -> list[int]:
        """The generated tokens journaled so far. (The tail may still be in the tokens stream only.)"""
        data = await self._redis.get(self._keys.journal(request_id))
        return unpack_ids(data) if isinstance(data, bytes) else []

    async def delete(self, request_ids: Sequence[str]) -> None:
        """Remove record and journal."""
        names = [key(request_id) for request_id in request_ids for key in (self._keys.request, self._keys.journal)]
        if names:
            await self._redis.unlink(*names)


def _record(fields: Sequence[bytes | None]) -> Record:
    request, epoch, cancelled, begin = fields
    assert request is not None
    assert epoch is not None
    return Record(
        decode_request(request), int(epoch), cancelled is not None, None if begin is None else decode_begin(begin)
    )

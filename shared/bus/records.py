"""What Redis knows of one request: its record (a hash) and its token journal (a string of uint32).

The record is born with the request's first work entry, in one transaction, and dies with the request, or some time
after an answer that a client may come back for. A stage that takes an entry and finds no record, or a cancelled one,
drops the entry. No journal is written without its record, so a late writer leaves nothing behind.
"""

from collections.abc import Iterable, Sequence

import msgspec
from redis.asyncio import Redis

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.leases import FENCE, Fence
from shared.messages import (
    VERSION,
    Begin,
    Cancel,
    Encode,
    Finish,
    Generate,
    Request,
    TokenLogprob,
    decode_begin,
    decode_finish,
    decode_logprob,
    decode_request,
    encode_begin,
    encode_finish,
    encode_logprob,
    encode_request,
    pack_ids,
    to_entry,
    unpack_ids,
)

CONTROL_LENGTH = 10_000  # entries the control stream keeps, about; the record says the same to whoever missed one
TOKEN_BYTES = 4

# KEYS idempotency, stream, record...; ARGV what we submit, expiry in s, prefix of records, v, gateway, then
# (request, m)...
# Earlier requests of which one is gone (refused, cancelled, failed, or past their time) do not stand in the way.
_SUBMIT_ONCE = """
local known = redis.call('GET', KEYS[1])
if known then
  local alive = true
  for _, id in ipairs(cjson.decode(known).request_ids) do
    alive = alive and redis.call('EXISTS', ARGV[3] .. id) == 1
  end
  if alive then return known end
end
for i = 3, #KEYS do
  redis.call('HSET', KEYS[i], 'request', ARGV[2 * i], 'epoch', '0', 'gateways', ARGV[5])
  redis.call('XADD', KEYS[2], '*', 'v', ARGV[4], 'm', ARGV[2 * i + 1])
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return false
"""

# KEYS shards, control, record...; ARGV fence, length of control, v, m.
_CANCEL = (
    FENCE
    + """
local marked = 0
for i = 3, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 and redis.call('HEXISTS', KEYS[i], 'finish') == 0 then
    marked = marked + redis.call('HSET', KEYS[i], 'cancelled', '1')
  end
end
if marked > 0 then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[at], '*', 'v', ARGV[at + 1], 'm', ARGV[at + 2])
end
return marked
"""
)

# KEYS shards, (record, journal, logprobs)...; ARGV fence, (index, tokens, begin or '', number of logprobs,
# logprobs...)... Returns the places, from 1, of the writes that left a hole.
_WRITE_JOURNAL = (
    FENCE
    + f"""
local refused = {{}}
for i = 2, #KEYS, 3 do
  local index, tokens, begin, logprobs = tonumber(ARGV[at]), ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3])
  at = at + 4
  if redis.call('EXISTS', KEYS[i]) == 1 then
    local kept = logprobs > 0 and redis.call('LLEN', KEYS[i + 2]) or index
    if redis.call('STRLEN', KEYS[i + 1]) < {TOKEN_BYTES} * index or kept < index then
      refused[#refused + 1] = (i + 1) / 3
    else
      redis.call('SETRANGE', KEYS[i + 1], {TOKEN_BYTES} * index, tokens)
      for n = kept - index, logprobs - 1 do redis.call('RPUSH', KEYS[i + 2], ARGV[at + n]) end
      if begin ~= '' then redis.call('HSET', KEYS[i], 'begin', begin) end
    end
  end
  at = at + logprobs
end
return refused
"""
)

# KEYS shards, (record, journal, logprobs)...; ARGV fence, (finish, expiry in ms)...
_RETAIN = (
    FENCE
    + """
for i = 2, #KEYS, 3 do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    redis.call('HSET', KEYS[i], 'finish', ARGV[at])
    for n = i, i + 2 do redis.call('PEXPIRE', KEYS[n], ARGV[at + 1]) end
  end
  at = at + 2
end
"""
)

# KEYS shards, keys...; ARGV fence.
_DELETE = FENCE + "for i = 2, #KEYS do redis.call('UNLINK', KEYS[i]) end"

# The names in a record's `gateways`, but for one.
_OTHERS = """
local function others(record, gateway)
  local names = {}
  for name in string.gmatch(redis.call('HGET', record, 'gateways') or '', '%S+') do
    if name ~= gateway then names[#names + 1] = name end
  end
  return names
end
"""

# KEYS record...; ARGV gateway.
_ATTACH = (
    _OTHERS
    + """
for _, record in ipairs(KEYS) do
  if redis.call('EXISTS', record) == 1 then
    local names = others(record, ARGV[1])
    names[#names + 1] = ARGV[1]
    redis.call('HSET', record, 'gateways', table.concat(names, ' '))
  end
end
"""
)

# KEYS record...; ARGV gateway, prefix of deltas. A gateway is there while its stream is. Returns the places, from 1, of
# those without a reader now.
_DETACH = (
    _OTHERS
    + """
local alone = {}
for i, record in ipairs(KEYS) do
  if redis.call('EXISTS', record) == 1 then
    local names, read = others(record, ARGV[1]), false
    for _, name in ipairs(names) do read = read or redis.call('EXISTS', ARGV[2] .. name) == 1 end
    redis.call('HSET', record, 'gateways', table.concat(names, ' '))
    if not read then alone[#alone + 1] = i end
  end
end
return alone
"""
)

_FIELDS = ("request", "epoch", "cancelled", "begin", "finish", "gateways")


class Record(msgspec.Struct, frozen=True):
    """A request as its record has it now."""

    request: Request
    epoch: int
    cancelled: bool  # nothing more is to be generated: nobody waits for it, or a stop string has ended the answer
    gateways: tuple[str, ...]  # where deltas go: usually one, more while several clients read the same answer
    begin: Begin | None = None  # of the newest epoch whose tokens the journal may hold; set once there is a journal
    finish: Finish | None = None  # the answer has ended well, the journal holds all of it, and both will expire


class Submission(msgspec.Struct, frozen=True):
    """What was sent under an idempotency key."""

    body_hash: str
    request_ids: tuple[str, ...]


class Records:
    """All reading and writing of records and journals. A write that is given a fence raises FencedError, having done
    nothing, when the fence's shards are not the writer's any more."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._unfenced = Fence(keys, "", {})
        self._submit_once = redis.register_script(_SUBMIT_ONCE)
        self._cancel = redis.register_script(_CANCEL)
        self._write_journal = redis.register_script(_WRITE_JOURNAL)
        self._retain = redis.register_script(_RETAIN)
        self._delete = redis.register_script(_DELETE)
        self._attach = redis.register_script(_ATTACH)
        self._detach = redis.register_script(_DETACH)

    async def submit(self, stream: str, message: Encode | Generate) -> None:
        """Create the record and append the work entry to `stream`, in one transaction (gateway)."""
        request = message.request
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(
                self._keys.request(request.id),
                mapping={b"request": encode_request(request), b"epoch": b"0", b"gateways": request.gateway.encode()},
            )
            pipe.xadd(self._keys.stream(stream), to_entry(message))  # type: ignore[arg-type]  # dict is invariant
            await pipe.execute()

    async def submit_once(
        self, stream: str, messages: Sequence[Encode | Generate], digest: str, body_hash: str, ttl_s: int
    ) -> Submission | None:
        """`submit` all of `messages` (the choices of one HTTP request) in one go, unless the idempotency key `digest`
        was used before: then nothing is done and what was submitted under it is returned (gateway).

        The key is forgotten after `ttl_s`, which should reach `retain_s` past the deadline, and counts no longer when
        a record of its requests is gone.
        """
        mine = Submission(body_hash, tuple(message.request.id for message in messages))
        entries = [(encode_request(message.request), to_entry(message)) for message in messages]
        fields = [part for request, entry in entries for part in (request, entry[b"m"])]
        known = await self._submit_once(
            keys=[
                self._keys.idempotency(digest),
                self._keys.stream(stream),
                *(self._keys.request(request_id) for request_id in mine.request_ids),
            ],
            args=[
                msgspec.json.encode(mine),
                ttl_s,
                self._keys.request(""),
                VERSION,
                messages[0].request.gateway,
                *fields,
            ],
        )
        earlier = msgspec.json.decode(known, type=Submission) if known else None
        return None if earlier == mine else earlier  # equal: our own, sent again because its reply was lost

    async def get(self, request_ids: Sequence[str]) -> dict[str, Record]:
        """The records that exist, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hmget(self._keys.request(request_id), _FIELDS)
            found = await pipe.execute()
        return {request_id: _record(fields) for request_id, fields in zip(request_ids, found, strict=True) if fields[0]}

    async def exists(self, request_ids: Sequence[str]) -> set[str]:
        """Those that have a record, in one round trip (gateway, postproc)."""
        if not request_ids:
            return set()
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.exists(self._keys.request(request_id))
            found = await pipe.execute()
        return {request_id for request_id, there in zip(request_ids, found, strict=True) if there}

    async def cancel(self, request_ids: Sequence[str], fence: Fence | None = None) -> None:
        """Mark existing records that have no finish cancelled, and broadcast `Cancel` if any was not yet."""
        entry = to_entry(Cancel(tuple(request_ids)))
        await self._under(fence).run(
            self._cancel,
            [self._keys.control(), *map(self._keys.request, request_ids)],
            [CONTROL_LENGTH, entry[b"v"], entry[b"m"]],
        )

    async def attach(self, request_ids: Sequence[str], gateway: str) -> None:
        """Write down that clients of `gateway` read these answers (gateway)."""
        await self._attach(keys=[*map(self._keys.request, request_ids)], args=[gateway])

    async def detach(self, request_ids: Sequence[str], gateway: str) -> list[str]:
        """Write down that none does any more. Returns the requests that no living gateway has a reader of now."""
        args = [gateway, self._keys.deltas("")]
        alone = await self._detach(keys=[*map(self._keys.request, request_ids)], args=args)
        return [request_ids[place - 1] for place in alone]

    # ------------------------------------------------------------------------------------------- postproc's part

    async def write_journal(
        self,
        writes: Sequence[tuple[str, int, Sequence[int]]],
        begins: Sequence[Begin] = (),
        logprobs: Sequence[tuple[str, Sequence[TokenLogprob | None]]] = (),
        fence: Fence | None = None,
    ) -> list[str]:
        """(request id, index, tokens): idempotent writes at their place, in one round trip.

        `begins` and `logprobs` belong to some of these requests: what usage needs and the epoch; and the
        log-probabilities of the very tokens. A request without a record is passed over. Returns the ids whose write
        would have left a hole, after a Redis that lost its last second: nothing of it was written, and the writer
        starts again from token 0.
        """
        if not writes:
            return []
        begin_of = {begin.request_id: encode_begin(begin) for begin in begins}
        logprobs_of = dict(logprobs)
        args: list[str | bytes | int] = []
        for request_id, index, tokens in writes:
            packed = [encode_logprob(logprob) for logprob in logprobs_of.get(request_id, ())]
            args += [index, pack_ids(tokens), begin_of.get(request_id, b""), len(packed), *packed]
        names = self._names(request_id for request_id, _, _ in writes)
        refused = await self._under(fence).run(self._write_journal, names, args)
        return [writes[place - 1][0] for place in refused]

    async def read_journal(self, request_id: str) -> list[int]:
        """The generated tokens journaled so far. (The tail may still be in the tokens stream only.)"""
        data = await self._redis.get(self._keys.journal(request_id))
        return unpack_ids(data) if isinstance(data, bytes) else []

    async def read_logprobs(self, request_id: str) -> list[TokenLogprob | None]:
        """What was journaled beside the tokens, for a request that asked for log-probabilities."""
        found = await command(self._redis, "LRANGE", self._keys.logprobs(request_id), 0, -1)
        return [decode_logprob(data) for data in found]

    async def retain(self, ended: Sequence[tuple[str, Finish, float]], fence: Fence) -> None:
        """(request id, finish, seconds): keep the answer, whose journal is complete, for that long."""
        args = [part for _, finish, s in ended for part in (encode_finish(finish), max(1, int(1000 * s)))]
        await fence.run(self._retain, self._names(request_id for request_id, _, _ in ended), args)

    async def delete(self, request_ids: Sequence[str], fence: Fence | None = None) -> None:
        """Remove record and journal, also of a request that no engine ever had (any stage)."""
        if request_ids:
            await self._under(fence).run(self._delete, self._names(request_ids), [])

    def _under(self, fence: Fence | None) -> Fence:
        return self._unfenced if fence is None else fence

    def _names(self, request_ids: Iterable[str]) -> list[str]:
        keys = (self._keys.request, self._keys.journal, self._keys.logprobs)
        return [key(request_id) for request_id in request_ids for key in keys]


def _record(fields: Sequence[bytes | None]) -> Record:
    request, epoch, cancelled, begin, finish, gateways = fields
    assert request is not None
    assert epoch is not None
    assert gateways is not None
    return Record(
        decode_request(request),
        int(epoch),
        cancelled is not None,
        tuple(str(gateways, "utf-8").split()),
        None if begin is None else decode_begin(begin),
        None if finish is None else decode_finish(finish),
    )

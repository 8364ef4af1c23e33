"""What a replica may do with a work entry it has taken: only while the entry is pending under its name.

A replica that was paused for longer than its lease wakes up and goes on, but another has its entries by then. So each
step here looks in Redis whose the entry is and does all it has to do in the same script, or nothing. Nothing is done
either for an entry that is gone: ended by someone, or lost by Redis.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec
from redis.asyncio import Redis

from shared.bus.client import command
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.errors import Failure
from shared.log import logger
from shared.messages import VERSION, Encode, Failed, Generate, Request, Tokens, to_entry

QUARANTINE_LENGTH = 1000  # poison entries kept for inspection, about
DELTAS_LENGTH = 10_000  # entries a gateway's stream keeps, about
MOST_RETURNS = 3  # how often embeddings are made again for one request

_log = logger(__name__)

# KEYS stream, ...; ARGV group, me, ...
_OURS = """
local function ours(id)
  local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], id, id, 1, ARGV[2])
  return not pending.err and #pending == 1
end

local function let_go(id)
  redis.call('XACK', KEYS[1], ARGV[1], id)
  redis.call('XDEL', KEYS[1], id)
end

local function keep(id, quarantine, length, reason, attempts)
  local entry = redis.call('XRANGE', KEYS[1], id, id)[1]
  if entry then
    redis.call('XADD', quarantine, 'MAXLEN', '~', length, '*', 'reason', reason, 'attempts', attempts, unpack(entry[2]))
  end
end
"""

# ARGV ..., entry id...
_OWNED = (
    _OURS + "local mine = {} for i = 3, #ARGV do if ours(ARGV[i]) then mine[#mine + 1] = ARGV[i] end end return mine"
)
_FINISH = _OURS + "for i = 3, #ARGV do if ours(ARGV[i]) then let_go(ARGV[i]) end end"

# KEYS ..., record...; ARGV ..., entry id... Returns epochs; 0 for a request without a record, -1 for a lost entry.
_CLAIM = (
    _OURS
    + """
local epochs = {}
for i = 3, #ARGV do
  local record = KEYS[i - 1]
  if not ours(ARGV[i]) then
    epochs[#epochs + 1] = -1
  elseif redis.call('EXISTS', record) == 0 then
    epochs[#epochs + 1] = 0
  else
    epochs[#epochs + 1] = redis.call('HINCRBY', record, 'epoch', 1)
  end
end
return epochs
"""
)

# KEYS ..., record; ARGV ..., entry id, tokens.
_PROGRESSED = (
    _OURS
    + """
if ours(ARGV[3]) and tonumber(redis.call('HGET', KEYS[2], 'reached') or 0) < tonumber(ARGV[4]) then
  if redis.call('EXISTS', KEYS[2]) == 1 then redis.call('HSET', KEYS[2], 'reached', ARGV[4]) end
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', 1, 'JUSTID')
end
"""
)

# KEYS ..., record, generate; ARGV ..., entry id, v, m, m of the Encode, fingerprint.
_HAND_ON = (
    _OURS
    + """
if not ours(ARGV[3]) then return 'lost' end
local request, cancelled, made = unpack(redis.call('HMGET', KEYS[2], 'request', 'cancelled', 'made'))
if not request or cancelled then return 'unwanted' end
if made and made ~= ARGV[7] then return 'changed' end
let_go(ARGV[3])
redis.call('HSET', KEYS[2], 'encode', ARGV[6], 'made', ARGV[7])
redis.call('XADD', KEYS[3], '*', 'v', ARGV[4], 'm', ARGV[5])
return 'done'
"""
)

# KEYS ..., record, encode; ARGV ..., entry id, v, limit.
_RETURN = (
    _OURS
    + """
if not ours(ARGV[3]) then return 'lost' end
local source = redis.call('HGET', KEYS[2], 'encode')
if not source or redis.call('HINCRBY', KEYS[2], 'returned', 1) > tonumber(ARGV[5]) then return 'never' end
let_go(ARGV[3])
redis.call('XADD', KEYS[3], '*', 'v', ARGV[4], 'm', source)
return 'done'
"""
)

# KEYS ..., record; ARGV ..., entry id, failure (or empty).
_CONDEMN = (
    _OURS
    + """
if not ours(ARGV[3]) then return 0 end
if ARGV[4] ~= '' and redis.call('EXISTS', KEYS[2]) == 1 then redis.call('HSET', KEYS[2], 'failed', ARGV[4]) end
return 1
"""
)

# KEYS ..., record; ARGV ..., entry id.
_DROP = (
    _OURS
    + """
if not ours(ARGV[3]) then return 0 end
let_go(ARGV[3])
redis.call('UNLINK', KEYS[2])
return 1
"""
)

# KEYS ..., record, quarantine; ARGV ..., entry id, v, m, prefix of deltas, first gateway, their length, length of the
# quarantine, attempts, reason (empty: not poison).
_REFUSE = (
    _OURS
    + """
if not ours(ARGV[3]) then return 0 end
for gateway in string.gmatch(redis.call('HGET', KEYS[2], 'gateways') or ARGV[7], '%S+') do
  redis.call('XADD', ARGV[6] .. gateway, 'NOMKSTREAM', 'MAXLEN', '~', ARGV[8], '*', 'v', ARGV[4], 'm', ARGV[5])
end
if ARGV[11] ~= '' then keep(ARGV[3], KEYS[3], ARGV[9], ARGV[11], ARGV[10]) end
let_go(ARGV[3])
redis.call('UNLINK', KEYS[2])
return 1
"""
)

# KEYS ..., tokens, quarantine; ARGV ..., entry id, v, m, length of the quarantine, attempts, reason (or empty).
_END = (
    _OURS
    + """
if not ours(ARGV[3]) then return 0 end
redis.call('XADD', KEYS[2], '*', 'v', ARGV[4], 'm', ARGV[5])
if ARGV[8] ~= '' then keep(ARGV[3], KEYS[3], ARGV[6], ARGV[8], ARGV[7]) end
let_go(ARGV[3])
return 1
"""
)

# KEYS ..., quarantine; ARGV ..., entry id, length of the quarantine, attempts, reason.
_QUARANTINE = (
    _OURS
    + """
if not ours(ARGV[3]) then return 0 end
keep(ARGV[3], KEYS[2], ARGV[4], ARGV[6], ARGV[5])
let_go(ARGV[3])
return 1
"""
)

_failures = msgspec.msgpack.Encoder()
_failure = msgspec.msgpack.Decoder(Failure)

HandedOn = Literal["done", "unwanted", "changed", "lost"]
Returned = Literal["done", "never", "lost"]


class Poison(msgspec.Struct, frozen=True):
    """Why an entry goes to the quarantine."""

    attempts: int
    reason: str


class EntryOwnership:
    """One replica's entries of `encode` or `generate`. What a lost reply makes a caller do again does nothing then."""

    def __init__(self, redis: Redis, keys: Keys, stream: str, service: str, name: str) -> None:
        self._redis = redis
        self._keys = keys
        self._key = keys.stream(stream)
        self._quarantine_key = keys.quarantine(stream)
        self._who: list[str | bytes | int] = [service, name]
        self._owned = redis.register_script(_OWNED)
        self._finish = redis.register_script(_FINISH)
        self._claim = redis.register_script(_CLAIM)
        self._progressed = redis.register_script(_PROGRESSED)
        self._hand_on = redis.register_script(_HAND_ON)
        self._return = redis.register_script(_RETURN)
        self._condemn = redis.register_script(_CONDEMN)
        self._drop = redis.register_script(_DROP)
        self._refuse = redis.register_script(_REFUSE)
        self._end = redis.register_script(_END)
        self._quarantine = redis.register_script(_QUARANTINE)

    async def owned(self, entry_ids: Sequence[str]) -> set[str]:
        """Which of these are ours."""
        return {
            str(entry_id, "ascii") for entry_id in await self._owned(keys=[self._key], args=[*self._who, *entry_ids])
        }

    async def finish(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete."""
        if entry_ids:
            await self._finish(keys=[self._key], args=[*self._who, *entry_ids])

    async def claim(self, entries: Sequence[tuple[str, str]]) -> dict[str, int | None]:
        """Become the owner of the requests of (entry id, request id) (engine): raise their records' epochs by one.

        Returns {request id: epoch}; None where the record is gone, and nothing where the entry is no longer ours.
        """
        if not entries:
            return {}
        epochs = await self._claim(
            keys=[self._key, *(self._keys.request(request_id) for _, request_id in entries)],
            args=[*self._who, *(entry_id for entry_id, _ in entries)],
        )
        pairs = zip(entries, epochs, strict=True)
        return {request_id: epoch or None for (_, request_id), epoch in pairs if epoch >= 0}

    async def progressed(self, entry_id: str, request_id: str, tokens: int) -> None:
        """A request that was delivered again has `tokens` tokens. If it had fewer the last time, whoever had it did not
        die of it, and its deliveries are counted from one again."""
        args = [*self._who, entry_id, tokens]
        await self._progressed(keys=[self._key, self._keys.request(request_id)], args=args)

    async def hand_on(self, entry_id: str, source: Encode, message: Generate) -> HandedOn:
        """Put `message` in the entry's place (mm_encoder). The record keeps `source`, so that the engine can have the
        embeddings made again.

        "unwanted": the record is gone or cancelled. "changed": it was handed on before with another prompt or other
        media, of which tokens may have been generated. The entry is kept in both cases.
        """
        entry, request_id = to_entry(message), message.request.id
        outcome: bytes = await self._hand_on(
            keys=[self._key, self._keys.request(request_id), self._keys.stream(GENERATE)],
            args=[*self._who, entry_id, entry[b"v"], entry[b"m"], to_entry(source)[b"m"], _fingerprint(message)],
        )
        return outcome.decode()  # type: ignore[return-value]

    async def send_back(self, entry_id: str, request_id: str) -> Returned:
        """Put what the record keeps in place of the entry: the embeddings are gone (engine).

        "never": it came without media, or has been back MOST_RETURNS times. The entry is kept then.
        """
        outcome: bytes = await self._return(
            keys=[self._key, self._keys.request(request_id), self._keys.stream(ENCODE)],
            args=[*self._who, entry_id, VERSION, MOST_RETURNS],
        )
        return outcome.decode()  # type: ignore[return-value]

    async def condemn(self, entry_id: str, request_id: str, failure: Failure | None) -> bool:
        """Write down how the request will end, before what it needs is deleted (mm_encoder): whoever takes the entry
        over then ends it in the same way. Returns whether the entry is ours."""
        args = [*self._who, entry_id, b"" if failure is None else _failures.encode(failure)]
        return bool(await self._condemn(keys=[self._key, self._keys.request(request_id)], args=args))

    async def condemned(self, request_id: str) -> Failure | None:
        """What has been written down so."""
        data = await command(self._redis, "HGET", self._keys.request(request_id), "failed")
        return None if data is None else _failure.decode(data)

    async def drop(self, entry_id: str, request_id: str) -> bool:
        """End an entry of which nothing need be said, and the record with it."""
        return bool(await self._drop(keys=[self._key, self._keys.request(request_id)], args=[*self._who, entry_id]))

    async def refuse(self, entry_id: str, request: Request, failed: Failed, poison: Poison | None = None) -> bool:
        """End an entry that no engine has had (mm_encoder): tell its gateways, and delete the record."""
        entry = to_entry(failed)
        return bool(
            await self._refuse(
                keys=[self._key, self._keys.request(request.id), self._quarantine_key],
                args=[
                    *self._who,
                    entry_id,
                    entry[b"v"],
                    entry[b"m"],
                    self._keys.deltas(""),
                    request.gateway,
                    DELTAS_LENGTH,
                    QUARANTINE_LENGTH,
                    *_told(entry_id, poison),
                ],
            )
        )

    async def end(self, entry_id: str, request: Request, last: Tokens, poison: Poison | None = None) -> bool:
        """End an entry of a request that an engine has had (mm_encoder), by the way of all such requests."""
        entry = to_entry(last)
        return bool(
            await self._end(
                keys=[self._key, self._keys.tokens(request.shard), self._quarantine_key],
                args=[
                    *self._who,
                    entry_id,
                    entry[b"v"],
                    entry[b"m"],
                    QUARANTINE_LENGTH,
                    *_told(entry_id, poison),
                ],
            )
        )

    async def quarantine(self, entry_id: str, poison: Poison) -> bool:
        """Move an entry whose request has been answered, or cannot be, to where people find it."""
        args = [*self._who, entry_id, QUARANTINE_LENGTH, *_told(entry_id, poison)]
        return bool(await self._quarantine(keys=[self._key, self._quarantine_key], args=args))


def _told(entry_id: str, poison: Poison | None) -> tuple[int, str]:
    if poison is None:
        return 0, ""
    _log.error("entry quarantined", extra={"entry": entry_id, "reason": poison.reason})
    return poison.attempts, poison.reason


def _fingerprint(message: Generate) -> bytes:
    """What the tokens of an answer depend on and a second look at the media could change."""
    digest = hashlib.sha256(message.prompt)
    for span in message.spans:
        digest.update(f"{span.key} {span.offset} ".encode())
    return digest.digest()

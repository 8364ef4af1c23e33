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
from shared.bus.lua import read_script
from shared.errors import Failure
from shared.log import logger
from shared.messages import VERSION, Encode, Failed, Generate, Request, Tokens, to_entry

QUARANTINE_LENGTH = 1000  # poison entries kept for inspection, about
DELTAS_LENGTH = 10_000  # entries a gateway's stream keeps, about
MOST_RETURNS = 3  # how often embeddings are made again for one request

_log = logger(__name__)


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
        self._owned = redis.register_script(read_script("owned"))
        self._finish = redis.register_script(read_script("finish"))
        self._claim = redis.register_script(read_script("claim"))
        self._progressed = redis.register_script(read_script("progressed"))
        self._hand_on = redis.register_script(read_script("hand_on"))
        self._return = redis.register_script(read_script("send_back"))
        self._condemn = redis.register_script(read_script("condemn"))
        self._drop = redis.register_script(read_script("drop"))
        self._refuse = redis.register_script(read_script("refuse"))
        self._end = redis.register_script(read_script("end"))
        self._quarantine = redis.register_script(read_script("quarantine"))

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

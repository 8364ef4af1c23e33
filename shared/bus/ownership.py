"""Writes that a replica may make for a work entry, each refused by Redis unless the replica still owns the entry.

A replica that was paused for longer than its lease wakes up and goes on, but another replica owns its entries by then.
So each script checks the owner and does all its work at once, or does nothing. It does nothing either for an entry that
is gone: ended by another replica, or lost by Redis. Every method is idempotent: safe to retry after a lost reply.
"""

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.client import command
from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.lua import read_script
from shared.errors import Failure, unreadable
from shared.log import logger
from shared.message_codec import to_entry, to_record_value
from shared.message_versions import versioned_write
from shared.messages import Encode, Failed, Generate, Request, Tokens
from shared.redis_errors import is_wrong_type

QUARANTINE_LENGTH = 1000  # poison entries kept for inspection, about
DELTAS_LENGTH = 10_000  # entries a gateway's stream keeps, about
MOST_RETURNS = 3  # how often embeddings are made again for one request

_log = logger(__name__)


_failures = msgspec.msgpack.Encoder()
_failure = msgspec.msgpack.Decoder(Failure)

ForwardOutcome = Literal["done", "unwanted", "changed", "lost"]
AheadOutcome = Literal["done", "later", "unwanted", "changed", "lost"]
EmbedsState = Literal["coming", "gone"]
SendBackOutcome = Literal["done", "never", "lost"]

_Arg = str | bytes | int
_REMOVED = (1, b"done")  # replies of a script that has removed its entry


class Poison(msgspec.Struct, frozen=True):
    """Reason why an entry goes to the quarantine."""

    attempts: int
    reason: str


class Ended(NamedTuple):
    """Entry whose request has said its last word."""

    entry_id: str
    request_id: str
    tokens: int | None  # of its answer, for its tenant; None: it has none


class EntryOwnership:
    """One replica's entries of `encode` or `generate`.

    `delivered` are the entries that this replica has received and not ended, as far as it knows. Those in `ending` may
    have been removed by a script of ours whose reply is still on its way.
    """

    def __init__(self, redis: Redis, keys: Keys, stream: str, service: str, name: str) -> None:
        self.delivered: set[str] = set()
        self.ending: set[str] = set()
        self._redis = redis
        self._keys = keys
        self._key = keys.stream(stream)
        self._quarantine_key = keys.quarantine(stream)
        self._consumer: list[_Arg] = [service, name]
        self._owned_entries = redis.register_script(read_script("owned_entries"))
        self._ack = redis.register_script(read_script("ack"))
        self._finish = redis.register_script(read_script("finish"))
        self._raise_epochs = redis.register_script(read_script("raise_epochs"))
        self._record_progress = redis.register_script(read_script("record_progress"))
        self._forward = redis.register_script(read_script("forward"))
        self._forward_ahead = redis.register_script(read_script("forward_ahead"))
        self._end_ahead = redis.register_script(read_script("end_ahead"))
        self._embeds_state = redis.register_script(read_script("embeds_state"))
        self._send_back = redis.register_script(read_script("send_back"))
        self._record_failure = redis.register_script(read_script("record_failure"))
        self._drop = redis.register_script(read_script("drop"))
        self._end_with_failed = redis.register_script(read_script("end_with_failed"))
        self._end_with_tokens = redis.register_script(read_script("end_with_tokens"))
        self._quarantine = redis.register_script(read_script("quarantine"))

    async def owned_entries(self, entry_ids: Sequence[str]) -> set[str]:
        """Return those of these entries that this replica owns."""
        args = [*self._consumer, *entry_ids]
        return {str(entry_id, "ascii") for entry_id in await self._owned_entries(keys=[self._key], args=args)}

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete those of these entries that this replica owns."""
        if not entry_ids:
            return
        self.ending.update(entry_ids)
        try:
            await self._ack(keys=[self._key], args=[*self._consumer, *entry_ids])
            self.delivered.difference_update(entry_ids)
        finally:
            self.ending.difference_update(entry_ids)

    async def finish(self, entries: Sequence["Ended"]) -> None:
        """End those of these entries that this replica owns: their Finish is in the tokens stream (engine)."""
        if not entries:
            return
        ids = [ended.entry_id for ended in entries]
        self.ending.update(ids)
        try:
            records = [self._keys.request(ended.request_id) for ended in entries]
            tokens = ["" if ended.tokens is None else ended.tokens for ended in entries]
            args = [part for pair in zip(ids, tokens, strict=True) for part in pair]
            await self._finish(keys=[self._key, *records], args=[*self._consumer, *args])
            self.delivered.difference_update(ids)
        finally:
            self.ending.difference_update(ids)

    async def raise_epochs(self, entries: Sequence[tuple[str, str]]) -> dict[str, int | None]:
        """Raise the epochs in the records of the requests of (entry id, request id) by one (engine).

        The epoch is a fencing token: tokens written under an older one no longer count. Returns {request id: epoch};
        None where there is no record, and nothing where another replica owns the entry.
        """
        if not entries:
            return {}
        epochs = await self._raise_epochs(
            keys=[self._key, *(self._keys.request(request_id) for _, request_id in entries)],
            args=[*self._consumer, *(entry_id for entry_id, _ in entries)],
        )
        pairs = zip(entries, epochs, strict=True)
        return {request_id: epoch or None for (_, request_id), epoch in pairs if epoch >= 0}

    async def record_progress(self, entry_id: str, request_id: str, tokens: int) -> None:
        """Record that a request that was delivered again has `tokens` tokens.

        If it had fewer at the last delivery, the replica that died made progress and the request did not kill it: its
        deliveries are counted from one again.
        """
        keys = [self._key, self._keys.request(request_id)]
        await self._record_progress(keys=keys, args=[*self._consumer, entry_id, tokens])

    @versioned_write
    async def forward(self, entry_id: str, source: Encode, message: Generate) -> ForwardOutcome:
        """Replace an entry of `encode` by `message` in `generate` (mm_encoder).

        The record keeps `source`, so that the engine can have the embeddings made again. "unwanted": the record is gone
        or cancelled. "changed": the request was forwarded before with another prompt or other media, from which tokens
        may have been generated. The entry stays in both cases. Of a prompt that went ahead the entry is only ended.
        """
        keys, args = self._forwarding(source, message)
        outcome: bytes = await self._run_ending(entry_id, self._forward, keys, args)
        return outcome.decode()  # type: ignore[return-value]

    @versioned_write
    async def forward_ahead(self, entry_id: str, source: Encode, message: Generate) -> AheadOutcome:
        """Append `message` to `generate` before its embeddings are stored, and keep the entry of `encode` (mm_encoder).

        The record notes the entry: as long as it is there, engines wait for the embeddings. "later": only `forward` may
        be used, as the request has been sent back before. The other outcomes are those of `forward`.
        """
        keys, args = self._forwarding(source, message)
        consumer = [*self._consumer, entry_id]
        outcome: bytes = await self._forward_ahead(keys=[self._key, *keys], args=[*consumer, *args])
        return outcome.decode()  # type: ignore[return-value]

    async def end_ahead(
        self, entry_id: str, request_id: str, failure: Failure | None, poison: Poison | None = None
    ) -> bool:
        """End an entry whose prompt went ahead and whose embeddings will not be made here (mm_encoder).

        `failure` is what the engine then ends the request with. With `poison` the entry goes to the quarantine. Returns
        False, and does nothing, if no prompt went ahead under this entry.
        """
        keys = [self._keys.request(request_id), self._quarantine_key]
        told = b"" if failure is None else _failures.encode(failure)
        fields = (0, "") if poison is None else (poison.attempts, poison.reason)
        ended = bool(await self._run_ending(entry_id, self._end_ahead, keys, [told, QUARANTINE_LENGTH, *fields]))
        if ended and poison is not None:
            _log_quarantined(entry_id, poison)
        return ended

    async def embeds_state(self, request_id: str) -> EmbedsState | Failure:
        """Return whether embeddings that a prompt lacks are still being made, or why they cannot be (engine)."""
        keys = [self._keys.request(request_id), self._keys.stream(ENCODE)]
        state: bytes = await self._embeds_state(keys=keys, args=[])
        if state in (b"coming", b"gone"):
            return state.decode()  # type: ignore[return-value]
        try:
            return _failure.decode(state)
        except msgspec.MsgspecError:
            return unreadable("the failure")

    def _forwarding(self, source: Encode, message: Generate) -> tuple[list[str], list[_Arg]]:
        """Return the keys and arguments that a script needs to forward a request, beside its entry's."""
        entry, request_id = to_entry(message), message.request.id
        args: list[_Arg] = [entry[b"v"], entry[b"m"], to_record_value(source), _fingerprint(message), request_id]
        return [self._keys.request(request_id), self._keys.stream(GENERATE)], [*args, entry.get(b"k", b"")]

    async def send_back(self, entry_id: str, request_id: str) -> SendBackOutcome:
        """Replace an entry of `generate` by the Encode that its record keeps: the embeddings are gone (engine).

        "never": the request has no media, or was sent back MOST_RETURNS times. The entry stays.
        """
        outcome: bytes = await self._run_ending(
            entry_id,
            self._send_back,
            [self._keys.request(request_id), self._keys.stream(ENCODE)],
            [MOST_RETURNS, request_id],
        )
        return outcome.decode()  # type: ignore[return-value]

    async def record_failure(self, entry_id: str, request_id: str, failure: Failure | None) -> bool:
        """Record the failure with which a request will end, before its uploads are deleted (mm_encoder).

        A replica that claims the entry later ends the request in the same way. Returns whether this replica owns the
        entry.
        """
        args = [*self._consumer, entry_id, b"" if failure is None else _failures.encode(failure)]
        return bool(await self._record_failure(keys=[self._key, self._keys.request(request_id)], args=args))

    async def recorded_failure(self, request_id: str) -> Failure | None:
        """Return the failure that `record_failure` has recorded; another one if it cannot be read."""
        try:
            data = await command(self._redis, "HGET", self._keys.request(request_id), "failed")
        except ResponseError as error:
            if not is_wrong_type(error):
                raise
            return unreadable("the record")
        try:
            return None if data is None else _failure.decode(data)
        except msgspec.MsgspecError:
            return unreadable("the failure")

    async def drop(self, entry_id: str, request_id: str) -> bool:
        """End an entry that needs no answer, and delete its record. Returns whether this replica owned the entry."""
        return bool(await self._run_ending(entry_id, self._drop, [self._keys.request(request_id)], []))

    @versioned_write
    async def end_with_failed(
        self, entry_id: str, failed: Failed, gateway: str = "", poison: Poison | None = None
    ) -> bool:
        """End an entry that no engine has read, or that nobody can: send `failed` to the request's gateways, and delete
        all that is kept of it.

        `gateway` is the receiver if there is no record. With `poison` the entry goes to the quarantine. Returns whether
        this replica owned the entry.
        """
        entry, keys, request_id = to_entry(failed), self._keys, failed.request_id
        names = [keys.request(request_id), self._quarantine_key, keys.journal(request_id), keys.logprobs(request_id)]
        args: list[_Arg] = [entry[b"v"], entry[b"m"], keys.deltas(""), gateway]
        args += [DELTAS_LENGTH, QUARANTINE_LENGTH, *_quarantine_fields(entry_id, poison)]
        return bool(await self._run_ending(entry_id, self._end_with_failed, names, args))

    @versioned_write
    async def end_with_tokens(
        self, entry_id: str, request: Request, last: Tokens, poison: Poison | None = None
    ) -> bool:
        """End an entry of a request that an engine has begun (mm_encoder): send `last` to its tokens stream, as engines
        do.

        With `poison` the entry goes to the quarantine. Returns whether this replica owned the entry.
        """
        entry = to_entry(last)
        keys = [self._keys.tokens(request.shard), self._quarantine_key, self._keys.request(request.id)]
        args: list[_Arg] = [entry[b"v"], entry[b"m"], QUARANTINE_LENGTH, *_quarantine_fields(entry_id, poison)]
        return bool(await self._run_ending(entry_id, self._end_with_tokens, keys, args))

    async def quarantine(self, entry_id: str, poison: Poison, finished: str | None = None) -> bool:
        """Move an entry to the quarantine, where operators find it.

        Its request cannot be answered, or is `finished`: its Finish is in the tokens stream.
        """
        args: list[_Arg] = [QUARANTINE_LENGTH, *_quarantine_fields(entry_id, poison)]
        keys = [self._quarantine_key, *([] if finished is None else [self._keys.request(finished)])]
        return bool(await self._run_ending(entry_id, self._quarantine, keys, args))

    async def _run_ending(
        self, entry_id: str, script: Callable[..., Awaitable[Any]], keys: Sequence[str], args: Sequence[_Arg]
    ) -> Any:
        """Run a script that removes an entry if this replica owns it; return the reply."""
        self.ending.add(entry_id)
        try:
            reply = await script(keys=[self._key, *keys], args=[*self._consumer, entry_id, *args])
            if reply in _REMOVED:
                self.delivered.discard(entry_id)
            return reply
        finally:
            self.ending.discard(entry_id)


def _quarantine_fields(entry_id: str, poison: Poison | None) -> tuple[int, str]:
    if poison is None:
        return 0, ""
    _log_quarantined(entry_id, poison)
    return poison.attempts, poison.reason


def _log_quarantined(entry_id: str, poison: Poison) -> None:
    _log.error("entry quarantined", extra={"entry": entry_id, "reason": poison.reason})


def _fingerprint(message: Generate) -> bytes:
    """Return a digest of all that the tokens of an answer depend on and that fetching media again could change."""
    digest = hashlib.sha256(message.prompt)
    for span in message.spans:
        digest.update(f"{span.key} {span.offset} ".encode())
    return digest.digest()

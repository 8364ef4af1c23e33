"""Observer of requests: their place in the pipeline and their timelines, read from Redis and from nothing else.

No stage is asked for anything and nothing is written. Of a work entry only the request's id, its age and the number of
its media are decoded, once; of tokens only their number is kept. Events between two observations may be missed, which
leaves a gap in a timeline and no more.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, WAITING, Keys
from shared.bus.lua import read_script
from shared.bus.pipeline_view import QUEUES
from shared.bus.records import TOKEN_BYTES, Record, Records
from shared.bus.streams import LogReader
from shared.messages import Begin, Cancel, Share, TokenRun, Tokens

HERE = Path(__file__).parent  # where the scripts are

MAX_TAKEN = 256  # taken entries observed, of each stream
MAX_WAITING = 64  # waiting entries observed, of each stream
BATCH = 1000  # messages of a tokens stream in one read
MAX_READS = 5  # reads in one observation; an observer that lags further catches up with the next ones
SETTLED_S = 10.0  # time after which nothing new is expected of a request that has left the streams
KEPT_S = 60.0  # time for which an ended request is shown
MAX_KEPT = 400

Place = Literal["encode", "generate", "ended"]


class _Request(msgspec.Struct, frozen=True):
    id: str
    created: float
    share: Share | None = None


class _Work(msgspec.Struct, frozen=True):
    """The decoded part of an `Encode`, which has media, or a `Generate`, which has spans."""

    request: _Request
    media: tuple[msgspec.Raw, ...] = ()
    spans: tuple[msgspec.Raw, ...] = ()


_work = msgspec.msgpack.Decoder(_Work)


class ObservedRequest(msgspec.Struct):
    """Timeline of one request, in unix seconds of Redis's clock; None for an event that has not happened or was missed.

    Its field names are those of GET /console/state.
    """

    id: str
    tenant: str | None = None  # name of its key in the key file; empty: it has none there; None: not known yet
    where: Place = "ended"
    waiting: bool = False  # its entry has not been delivered to a replica yet
    replica: str = ""  # the consumer of its entry, or the last one
    media: int = 0
    attempts: int = 0
    accepted: float | None = None  # it entered its first stream
    encode_taken: float | None = None  # its entry was delivered to an encoder, the last time
    encoded: float | None = None  # its media were handed on to the engine's stream
    taken: float | None = None  # its entry was delivered to an engine, the last time
    begun: float | None = None  # the engine began it, the last time
    first: float | None = None  # time of its first token
    last: float | None = None
    finished: float | None = None
    reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    seen: float = 0.0  # time of the newest event


class RequestObserver:
    """Every request that was observed, until some time after its end. Calls of `observe` must not overlap."""

    def __init__(self, redis: Redis, keys: Keys, shards: int) -> None:
        self._redis = redis
        self._keys = keys
        self._records = Records(redis, keys)
        self._work_entries = redis.register_script(read_script("work_entries", HERE))
        self._tokens = LogReader(redis, {**{keys.tokens(shard): "0" for shard in range(shards)}, keys.control(): "$"})
        self._requests: dict[str, ObservedRequest] = {}
        self._entries: dict[str, dict[str, _Work]] = {ENCODE: {}, GENERATE: {}}  # by entry id
        self._now = 0.0  # of the last observation

    async def observe(self, now: float) -> list[ObservedRequest]:
        """Read what has changed, `now` in unix seconds of Redis's clock; return all requests, newest first.

        Raises:
            RedisError: Redis cannot be read.
        """
        self._now = now
        present: set[str] = set()
        # Read in the order of the pipeline, so that a request that moves on meanwhile is seen at least once.
        await self._read_work("mm_encoder", present)
        await self._read_work("engine", present)
        await self._read_tokens()
        for request in self._requests.values():
            if request.id not in present:
                request.where, request.waiting = "ended", False
        await self._read_records()
        self._forget()
        return sorted(self._requests.values(), key=lambda one: one.accepted or one.begun or one.seen, reverse=True)

    async def _read_work(self, service: str, present: set[str]) -> None:
        stream = QUEUES[service]
        known = self._entries[stream]
        taken, waiting, new = await self._work_entries(
            keys=[self._keys.stream(stream)], args=[service, MAX_TAKEN, MAX_WAITING, WAITING, *known]
        )
        for entry, message in new:
            with contextlib.suppress(msgspec.MsgspecError):  # of another version, or broken: counted but not shown
                known[_text(entry)] = _work.decode(message)
        for entry, consumer, taken_ms, attempts in taken:
            if one := self._locate(stream, _text(entry), present):
                one.replica, one.waiting, one.attempts = _text(consumer), False, attempts
                _mark_taken(one, stream, taken_ms / 1000)
        for entry in waiting:
            self._locate(stream, _text(entry), present)
        there = [_text(entry) for entry in (*(each[0] for each in taken), *waiting)]
        self._entries[stream] = {entry: known[entry] for entry in there if entry in known}

    def _locate(self, stream: str, entry: str, present: set[str]) -> ObservedRequest | None:
        """Note that a request's entry waits in a stream; return None if the entry is gone again, or unreadable."""
        if entry not in self._entries[stream]:
            return None
        work = self._entries[stream][entry]
        one = self._get(work.request.id)
        one.tenant = _tenant(work.request.share)
        one.media = len(work.media or work.spans)
        if stream == GENERATE and one.media:
            one.encoded = _seconds(entry)
            one.accepted = one.accepted or work.request.created  # by the gateway's clock
        one.accepted = one.accepted or _seconds(entry)
        one.where = "encode" if stream == ENCODE else "generate"
        one.waiting = True
        one.seen = self._now
        present.add(one.id)
        return one

    # ------------------------------------------------------------------------------------------------ one request

    async def find(self, request_id: str, now: float) -> ObservedRequest | None:
        """Return a request that is observed, or has a record: it waits further back, or ended and is kept.

        Raises:
            RedisError: Redis cannot be read.
        """
        observed = self._requests.get(request_id)
        if observed is not None and observed.tenant is not None:
            return observed
        record = (await self._records.get([request_id])).get(request_id)
        if not isinstance(record, Record):
            return observed
        if observed is not None:
            observed.tenant = _tenant(record.request.share)
            return observed
        key = self._keys.request(request_id)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(key, "entry")
            pipe.strlen(self._keys.journal(request_id))
            pipe.pttl(key)
            place, journaled, left_ms = await pipe.execute()
        one = ObservedRequest(request_id, accepted=record.request.created, tokens=journaled // TOKEN_BYTES, seen=now)
        if record.finish is None:
            one.where = "encode" if _text(place or b"").startswith(self._keys.stream(ENCODE) + " ") else "generate"
            one.waiting = record.begin is None
        _apply_record(one, record, now, left_ms / 1000)
        return one

    # ------------------------------------------------------------------------------------------------ tokens

    async def _read_tokens(self) -> None:
        for _ in range(MAX_READS):
            messages = await self._tokens.read(BATCH, 0)
            for _, entry, message in messages:
                if isinstance(message, Tokens):
                    self._add_step(_seconds(entry), message.begins, message.runs)
                elif isinstance(message, Cancel):
                    self._cancel(message.request_ids)
            if not messages:
                return

    def _add_step(self, at: float, begins: Sequence[Begin], runs: Sequence[TokenRun]) -> None:
        for begin in begins:
            one = self._get(begin.request_id)
            one.begun = at
            one.prompt_tokens, one.cached_tokens = begin.prompt_tokens, begin.cached_tokens
            one.media = one.media or bool(begin.image_tokens or begin.video_tokens)
            one.seen = max(one.seen, at)
        for run in runs:
            one = self._get(run.request_id)
            if run.tokens:
                one.first = at if run.index == 0 and one.first is None else one.first
                one.last = at
                one.tokens = max(one.tokens, run.index + len(run.tokens))
            if run.finish is not None:
                one.finished, one.reason = at, run.finish.reason
            one.seen = max(one.seen, at)

    def _cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if request_id in self._requests:
                _mark_cancelled(self._requests[request_id])

    # ------------------------------------------------------------------------------------------------ records

    async def _read_records(self) -> None:
        """Read records and journals: the tokens streams are trimmed soon, and these have the same without the times."""
        unsettled = [one for one in self._requests.values() if self._is_unsettled(one)]
        if not unsettled:
            return
        records = await self._records.get([one.id for one in unsettled])
        async with self._redis.pipeline(transaction=False) as pipe:
            for one in unsettled:
                pipe.strlen(self._keys.journal(one.id))
                pipe.pttl(self._keys.request(one.id))
            replies = await pipe.execute()
        for one, journaled, left_ms in zip(unsettled, replies[::2], replies[1::2], strict=True):
            one.tokens = max(one.tokens, journaled // TOKEN_BYTES)
            if isinstance(record := records.get(one.id), Record):
                _apply_record(one, record, self._now, left_ms / 1000)

    def _is_unsettled(self, one: ObservedRequest) -> bool:
        if one.where == "ended":
            return (one.finished is None or one.tenant is None) and self._now - one.seen < SETTLED_S
        return one.where == "generate" and not one.waiting

    # ------------------------------------------------------------------------------------------------ all requests

    def _get(self, request_id: str) -> ObservedRequest:
        return self._requests.setdefault(request_id, ObservedRequest(request_id))

    def _forget(self) -> None:
        ended = sorted((one for one in self._requests.values() if one.where == "ended"), key=lambda one: one.seen)
        excess = len(self._requests) - MAX_KEPT
        for rank, one in enumerate(ended):
            if rank < excess or self._now - one.seen > KEPT_S:
                del self._requests[one.id]


def _mark_taken(one: ObservedRequest, stream: str, at: float) -> None:
    """Note when its entry was delivered, by Redis's clock; `accepted` may be by a gateway's that is ahead."""
    if stream == ENCODE:
        one.encode_taken = max(at, one.accepted or at)
    else:
        one.taken = max(at, one.encoded or one.accepted or at)


def _tenant(share: Share | None) -> str:
    return "" if share is None else share.name


def _apply_record(one: ObservedRequest, record: Record, now: float, left_s: float) -> None:
    """Take over what a record has. `left_s` is the time until it expires, which dates the finish."""
    one.tenant = _tenant(record.request.share)
    if record.begin is not None:
        one.prompt_tokens, one.cached_tokens = record.begin.prompt_tokens, record.begin.cached_tokens
    if record.finish is not None:
        one.reason = record.finish.reason
        if one.finished is None:  # the tokens stream has it to the millisecond
            one.finished = now - max(0.0, record.request.retain_s - left_s)
    elif record.cancelled:
        _mark_cancelled(one)


def _mark_cancelled(one: ObservedRequest) -> None:
    """Note a cancellation. A stop string causes one too, but then the stream or the record has the true reason."""
    if one.finished is None:
        one.reason = "cancelled"


def _seconds(entry: str) -> float:
    """Return the time at which an entry was written."""
    return int(entry.partition("-")[0]) / 1000


def _text(reply: Any) -> str:
    return str(reply, "utf-8")

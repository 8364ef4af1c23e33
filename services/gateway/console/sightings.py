"""What becomes of requests as Redis shows it from outside: which entry is where, and what is in the tokens streams.

Nothing is asked of the other stages and nothing is written. Of a work entry only its request's id, its age and how many
media it has are decoded, and that once; of the tokens, only how many they are is kept. What comes and goes between two
looks may be missed, which leaves a gap in a timeline and no more.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from redis.asyncio import Redis

from shared.bus.keys import ENCODE, GENERATE, Keys
from shared.bus.lua import read_script
from shared.bus.pipeline_view import QUEUES
from shared.bus.records import TOKEN_BYTES, Record, Records
from shared.bus.streams import LogReader
from shared.errors import ProtocolError
from shared.messages import Begin, Cancel, TokenRun, Tokens

HERE = Path(__file__).parent  # where the scripts are

MOST_TAKEN = 256  # entries in work that are looked at, a stream
MOST_WAITING = 64  # the same, of those that wait
STEPS = 1000  # messages of a tokens stream read at once
READS = 5  # of them at a look: whoever is further behind catches up with the next ones
SETTLED_S = 10.0  # after that, nothing more is learnt of a request that has left the streams
KEPT_S = 60.0  # how long an ended request is shown
MOST_KEPT = 400

Where = Literal["encode", "generate", "ended"]


class _Request(msgspec.Struct, frozen=True):
    id: str
    created: float


class _Work(msgspec.Struct, frozen=True):
    """What is read of an `Encode`, which has media, or a `Generate`, which has spans."""

    request: _Request
    media: tuple[msgspec.Raw, ...] = ()
    spans: tuple[msgspec.Raw, ...] = ()


_work = msgspec.msgpack.Decoder(_Work)


class Sighting(msgspec.Struct):
    """One request. Times are unix seconds of Redis's clock; None is what has not happened or was not seen."""

    id: str
    where: Where = "ended"
    waiting: bool = False  # nobody has taken its entry yet
    replica: str = ""  # who has it, or had it last
    media: int = 0
    attempts: int = 0
    accepted: float | None = None  # it entered its first stream
    encoded: float | None = None  # its media were handed on to the engine's stream
    begun: float | None = None  # the engine took it up, the last time
    first: float | None = None  # token
    last: float | None = None
    finished: float | None = None
    reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    seen: float = 0.0  # the newest time of all


class Sightings:
    """Every request that was seen, until some time after its end. Calls of `look` must not overlap."""

    def __init__(self, redis: Redis, keys: Keys, shards: int) -> None:
        self._redis = redis
        self._keys = keys
        self._records = Records(redis, keys)
        self._look = redis.register_script(read_script("sightings", HERE))
        self._steps = LogReader(redis, {**{keys.tokens(shard): "0" for shard in range(shards)}, keys.control(): "$"})
        self._seen: dict[str, Sighting] = {}
        self._entries: dict[str, dict[str, _Work]] = {ENCODE: {}, GENERATE: {}}  # by entry id
        self._now = 0.0  # of the last look

    async def look(self, now: float) -> list[Sighting]:
        """See what has changed, `now` in unix seconds of Redis's clock; all that is known, newest first.

        Raises:
            RedisError: nothing can be seen.
        """
        self._now = now
        present: set[str] = set()
        # In this order, in which no request on its way is in none of the places.
        await self._look_at("mm_encoder", present)
        await self._look_at("engine", present)
        await self._read_steps()
        for sighting in self._seen.values():
            if sighting.id not in present:
                sighting.where, sighting.waiting = "ended", False
        await self._read_records()
        self._forget()
        return sorted(self._seen.values(), key=lambda one: one.accepted or one.begun or one.seen, reverse=True)

    async def _look_at(self, service: str, present: set[str]) -> None:
        stream = QUEUES[service]
        known = self._entries[stream]
        taken, waiting, new = await self._look(
            keys=[self._keys.stream(stream)], args=[service, MOST_TAKEN, MOST_WAITING, *known]
        )
        for entry, message in new:
            with contextlib.suppress(msgspec.MsgspecError):  # of another version, or broken: counted and not shown
                known[_text(entry)] = _work.decode(message)
        for entry, consumer, attempts in taken:
            self._place(stream, _text(entry), present, replica=_text(consumer), attempts=attempts)
        for entry in waiting:
            self._place(stream, _text(entry), present)
        there = [_text(entry) for entry in (*(entry for entry, _, _ in taken), *waiting)]
        self._entries[stream] = {entry: known[entry] for entry in there if entry in known}

    def _place(self, stream: str, entry: str, present: set[str], replica: str = "", attempts: int = 0) -> None:
        if entry not in self._entries[stream]:
            return  # gone again, or unreadable
        work = self._entries[stream][entry]
        one = self._of(work.request.id)
        one.media = len(work.media or work.spans)
        if stream == GENERATE and one.media:
            one.encoded = _seconds(entry)
            one.accepted = one.accepted or work.request.created  # by the gateway's clock
        one.accepted = one.accepted or _seconds(entry)
        one.where = "encode" if stream == ENCODE else "generate"
        one.replica, one.waiting, one.attempts = replica or one.replica, not replica, attempts or one.attempts
        one.seen = self._now
        present.add(one.id)

    # ------------------------------------------------------------------------------------------------ tokens

    async def _read_steps(self) -> None:
        for _ in range(READS):
            try:
                messages = await self._steps.read(STEPS, 0)
            except ProtocolError:
                continue  # of another version; the next read goes on behind it
            for _, entry, message in messages:
                if isinstance(message, Tokens):
                    self._step(_seconds(entry), message.begins, message.runs)
                elif isinstance(message, Cancel):
                    self._cancel(message.request_ids)
            if not messages:
                return

    def _step(self, at: float, begins: Sequence[Begin], runs: Sequence[TokenRun]) -> None:
        for begin in begins:
            one = self._of(begin.request_id)
            one.begun = at
            one.prompt_tokens, one.cached_tokens = begin.prompt_tokens, begin.cached_tokens
            one.media = one.media or bool(begin.image_tokens or begin.video_tokens)
            one.seen = max(one.seen, at)
        for run in runs:
            one = self._of(run.request_id)
            if run.tokens:
                one.first = at if run.index == 0 and one.first is None else one.first
                one.last = at
                one.tokens = max(one.tokens, run.index + len(run.tokens))
            if run.finish is not None:
                one.finished, one.reason = at, run.finish.reason
            one.seen = max(one.seen, at)

    def _cancel(self, request_ids: Sequence[str]) -> None:
        """Nothing more is wanted; a stop string is a reason for that too, but then stream or record say so."""
        for request_id in request_ids:
            if request_id in self._seen and self._seen[request_id].finished is None:
                self._seen[request_id].reason = "cancelled"

    # ------------------------------------------------------------------------------------------------ records

    async def _read_records(self) -> None:
        """The tokens streams are trimmed soon; records and journals say without times what was in them."""
        asked = [one for one in self._seen.values() if self._is_open_question(one)]
        if not asked:
            return
        records = await self._records.get([one.id for one in asked])
        async with self._redis.pipeline(transaction=False) as pipe:
            for one in asked:
                pipe.strlen(self._keys.journal(one.id))
                pipe.pttl(self._keys.request(one.id))
            told = await pipe.execute()
        for one, journaled, left_ms in zip(asked, told[::2], told[1::2], strict=True):
            one.tokens = max(one.tokens, journaled // TOKEN_BYTES)
            if one.id in records:
                self._recall(one, records[one.id], left_ms / 1000)

    def _is_open_question(self, one: Sighting) -> bool:
        if one.where == "ended":
            return one.finished is None and self._now - one.seen < SETTLED_S
        return one.where == "generate" and not one.waiting

    def _recall(self, one: Sighting, record: Record, left_s: float) -> None:
        """`left_s`: how long the record will be there."""
        if record.begin is not None:
            one.prompt_tokens, one.cached_tokens = record.begin.prompt_tokens, record.begin.cached_tokens
        if record.finish is not None:
            one.reason = record.finish.reason
            one.finished = self._now - max(0.0, record.request.retain_s - left_s)
        elif record.cancelled:
            self._cancel([one.id])

    # ------------------------------------------------------------------------------------------------ all of them

    def _of(self, request_id: str) -> Sighting:
        return self._seen.setdefault(request_id, Sighting(request_id))

    def _forget(self) -> None:
        ended = sorted((one for one in self._seen.values() if one.where == "ended"), key=lambda one: one.seen)
        excess = len(self._seen) - MOST_KEPT
        for place, one in enumerate(ended):
            if place < excess or self._now - one.seen > KEPT_S:
                del self._seen[one.id]


def _seconds(entry: str) -> float:
    """When an entry was written."""
    return int(entry.partition("-")[0]) / 1000


def _text(reply: Any) -> str:
    return str(reply, "utf-8")

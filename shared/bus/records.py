"""Records of requests in Redis: a hash of state and a token journal (a string of uint32) each.

A record is created with the request's first work entry, in one transaction, and deleted when the request ends, or
`retain_s` after an answer that a client may come back for. A stage that reads an entry and finds no record, or a
cancelled one, drops the entry. No journal is written without its record, so a late writer leaves nothing behind. A
record that cannot be read is its own request's failure: whoever meets it ends that request, and goes on.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress

import msgspec
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from shared.bus.client import command
from shared.bus.keys import Keys
from shared.bus.leases import Fence
from shared.bus.lua import read_script
from shared.errors import ProtocolError
from shared.message_codec import (
    decode_logprob,
    encode_logprob,
    from_record_value,
    to_entries,
    to_entry,
    to_record_value,
)
from shared.message_versions import versioned_write
from shared.messages import Begin, Cancel, Encode, Finish, Generate, Request, TokenLogprob, pack_ids, unpack_ids
from shared.redis_errors import is_wrong_type

CONTROL_LENGTH = (
    10_000  # entries the control stream keeps, about; the record has the same for a replica that missed one
)
TOKEN_BYTES = 4


_FIELDS = ("request", "epoch", "cancelled", "begin", "finish", "gateways")


class Record(msgspec.Struct, frozen=True):
    """State of a request, as its record has it now."""

    request: Request
    epoch: int
    cancelled: bool  # generate nothing more: no client waits, or a stop string has ended the answer
    gateways: tuple[str, ...]  # receivers of deltas: usually one, more while several clients read the same answer
    begin: Begin | None = None  # of the newest epoch whose tokens the journal may hold; set once there is a journal
    finish: Finish | None = None  # the answer has ended well, the journal holds all of it, and both will expire


class UnreadableRecord(msgspec.Struct, frozen=True):
    """Record with damaged bytes, and what can be read of it."""

    reason: str
    epoch: int = 0  # 0 also if it cannot be read
    gateways: tuple[str, ...] = ()


class Submission(msgspec.Struct, frozen=True):
    """Requests that were submitted under an idempotency key."""

    body_hash: str
    request_ids: tuple[str, ...]


class Records:
    """Reader and writer of records and journals.

    A write under a fence (fencing token) raises FencedError, and changes nothing, if another replica owns one of the
    fence's shards.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._unfenced = Fence(keys, "", {})
        self._submit = redis.register_script(read_script("submit"))
        self._lost_entries = redis.register_script(read_script("lost_entries"))
        self._submit_once = redis.register_script(read_script("submit_once"))
        self._cancel = redis.register_script(read_script("cancel"))
        self._write_journal = redis.register_script(read_script("write_journal"))
        self._retain = redis.register_script(read_script("retain"))
        self._delete = redis.register_script(read_script("delete"))
        self._shorten = redis.register_script(read_script("shorten"))
        self._attach = redis.register_script(read_script("attach"))
        self._detach = redis.register_script(read_script("detach"))

    @versioned_write
    async def submit(self, stream: str, message: Encode | Generate) -> None:
        """Create the record and append the work entry to `stream`, in one script (gateway)."""
        request = message.request
        record, entry = to_record_value(request), to_entry(message)
        await self._submit(
            keys=[self._keys.request(request.id), self._keys.stream(stream)],
            args=[record, request.gateway, entry[b"v"], entry[b"m"], request.id, entry.get(b"k", b"")],
        )

    @versioned_write
    async def submit_once(
        self, stream: str, messages: Sequence[Encode | Generate], digest: str, body_hash: str, ttl_s: int
    ) -> Submission | None:
        """Submit all of `messages` (the choices of one HTTP request) at once, unless the idempotency key `digest` is in
        use: then change nothing, and return the submission under it (gateway).

        The key expires after `ttl_s`, which should reach `retain_s` past the deadline, and is void when one of its
        requests has no record any more.
        """
        mine = Submission(body_hash, tuple(message.request.id for message in messages))
        version, entries = to_entries(messages)
        requests = [to_record_value(message.request) for message in messages]
        fields = [part for request, entry in zip(requests, entries, strict=True) for part in (request, entry[b"m"])]
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
                version,
                messages[0].request.gateway,
                entries[0].get(b"k", b""),
                *fields,
            ],
        )
        earlier = msgspec.json.decode(known, type=Submission) if known else None
        return None if earlier == mine else earlier  # equal: our own, sent again because its reply was lost

    async def submitted(self, digests: Sequence[str]) -> list[str]:
        """Return the ids of the requests that were submitted under these idempotency keys (gateway)."""
        return [request_id for each in await self._submissions(digests) for request_id in each.request_ids]

    async def earlier(self, digest: str) -> Submission | None:
        """Return the submission under an idempotency key; None if the key is void, in the sense of `submit_once`."""
        for submission in await self._submissions([digest]):
            alive = await self.exists(submission.request_ids)
            if alive and alive.issuperset(submission.request_ids):
                return submission
        return None

    async def _submissions(self, digests: Sequence[str]) -> list[Submission]:
        """Return what is under these idempotency keys, but for keys that are void since they are gone or damaged."""
        found = await command(self._redis, "MGET", *map(self._keys.idempotency, digests)) if digests else []
        submissions = []
        for each in found:
            with suppress(ValueError):
                submissions.append(msgspec.json.decode(each or b"", type=Submission))
        return submissions

    async def shorten_keys(self, digests: Sequence[str], seconds: float) -> None:
        """Keep idempotency keys for this long from now (gateway)."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for digest in digests:
                pipe.pexpire(self._keys.idempotency(digest), max(1, int(1000 * seconds)))
            await pipe.execute()

    async def get(self, request_ids: Sequence[str]) -> dict[str, Record | UnreadableRecord]:
        """Return the records that exist, by request id, in one round trip."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.hmget(self._keys.request(request_id), _FIELDS)
            found = await pipe.execute(raise_on_error=False)
        pairs = zip(request_ids, found, strict=True)
        records = {request_id: _record(answer) for request_id, answer in pairs}
        return {request_id: record for request_id, record in records.items() if record is not None}

    async def exists(self, request_ids: Sequence[str]) -> set[str]:
        """Return the ids of those requests that have a record, in one round trip (gateway, postproc)."""
        if not request_ids:
            return set()
        async with self._redis.pipeline(transaction=False) as pipe:
            for request_id in request_ids:
                pipe.exists(self._keys.request(request_id))
            found = await pipe.execute()
        return {request_id for request_id, there in zip(request_ids, found, strict=True) if there}

    async def lost(self, request_ids: Sequence[str]) -> set[str]:
        """Return those that have a record but no work entry, although no stage has ended them (gateway)."""
        if not request_ids:
            return set()
        places = await self._lost_entries(keys=[*map(self._keys.request, request_ids)], args=[])
        return {request_ids[place - 1] for place in places}

    @versioned_write
    async def cancel(self, request_ids: Sequence[str], fence: Fence | None = None) -> None:
        """Mark existing records without a finish as cancelled, and broadcast `Cancel` if this marked any."""
        entry = to_entry(Cancel(tuple(request_ids)))
        await self._under(fence).run(
            self._cancel,
            [self._keys.control(), *map(self._keys.request, request_ids)],
            [CONTROL_LENGTH, entry[b"v"], entry[b"m"]],
        )

    async def attach(self, request_ids: Sequence[str], gateway: str) -> None:
        """Add `gateway` to the receivers of these requests' deltas (gateway)."""
        await self._attach(keys=[*map(self._keys.request, request_ids)], args=[gateway])

    async def detach(self, request_ids: Sequence[str], gateway: str) -> list[str]:
        """Remove `gateway` from the receivers; return the requests that have no living receiver now."""
        args = [gateway, self._keys.deltas("")]
        alone = await self._detach(keys=[*map(self._keys.request, request_ids)], args=args)
        return [request_ids[place - 1] for place in alone]

    # ------------------------------------------------------------------------------------------- written by postproc

    @versioned_write
    async def write_journal(
        self,
        writes: Sequence[tuple[str, int, Sequence[int]]],
        begins: Sequence[Begin] = (),
        logprobs: Sequence[tuple[str, Sequence[TokenLogprob | None]]] = (),
        fence: Fence | None = None,
    ) -> list[str]:
        """Write tokens, each (request id, index, tokens), at their place in journals: idempotent, in one round trip.

        `begins` (counts for usage, and the epoch) and `logprobs` (of the same tokens) belong to some of these requests.
        A request without a record is skipped. Returns the ids whose write would have left a hole, after Redis lost its
        last second: nothing of that write was made, and the writer must start again from token 0.
        """
        if not writes:
            return []
        begin_of = {begin.request_id: to_record_value(begin) for begin in begins}
        logprobs_of = dict(logprobs)
        args: list[str | bytes | int] = []
        for request_id, index, tokens in writes:
            packed = [encode_logprob(logprob) for logprob in logprobs_of.get(request_id, ())]
            args += [index, pack_ids(tokens), begin_of.get(request_id, b""), len(packed), *packed]
        names = self._names(request_id for request_id, _, _ in writes)
        refused = await self._under(fence).run(self._write_journal, names, args)
        return [writes[place - 1][0] for place in refused]

    async def read_journal(self, request_id: str) -> list[int]:
        """Return the generated tokens journaled so far. (The last ones may still be in the tokens stream only.)

        Raises:
            ProtocolError: the journal is damaged.
        """
        with _damaged_if_wrong_type():
            data = await self._redis.get(self._keys.journal(request_id))
        return unpack_ids(data) if isinstance(data, bytes) else []

    async def read_logprobs(self, request_id: str) -> list[TokenLogprob | None]:
        """Return the log-probabilities journaled beside the tokens, for a request that asked for them.

        Raises:
            ProtocolError: they are damaged.
        """
        with _damaged_if_wrong_type():
            found = await command(self._redis, "LRANGE", self._keys.logprobs(request_id), 0, -1)
        return [decode_logprob(data) for data in found]

    @versioned_write
    async def retain(self, ended: Sequence[tuple[str, Finish, float]], fence: Fence) -> None:
        """Keep complete answers, each (request id, finish, seconds), for that many seconds."""
        args = [part for _, finish, s in ended for part in (to_record_value(finish), max(1, int(1000 * s)))]
        await fence.run(self._retain, self._names(request_id for request_id, _, _ in ended), args)

    async def shorten(self, request_id: str, seconds: float) -> None:
        """Keep a complete answer no longer than this after its end; also one whose end is still to be written."""
        await self._shorten(keys=self._names([request_id]), args=[max(1, int(1000 * seconds))])

    async def delete(self, request_ids: Sequence[str], fence: Fence | None = None) -> None:
        """Delete record and journal, also of a request that no engine ever read (any stage)."""
        if request_ids:
            await self._under(fence).run(self._delete, self._names(request_ids), [])

    def _under(self, fence: Fence | None) -> Fence:
        return self._unfenced if fence is None else fence

    def _names(self, request_ids: Iterable[str]) -> list[str]:
        keys = (self._keys.request, self._keys.journal, self._keys.logprobs)
        return [key(request_id) for request_id in request_ids for key in keys]


@contextmanager
def _damaged_if_wrong_type() -> Iterator[None]:
    """
    Raises:
        ProtocolError: the key holds something else.
    """
    try:
        yield
    except ResponseError as error:
        if not is_wrong_type(error):
            raise
        raise ProtocolError(str(error)) from error


def _record(fields: Sequence[bytes | None] | RedisError) -> Record | UnreadableRecord | None:
    """Return what the reply to HMGET holds; None if there is no record.

    Raises:
        RedisError: the reply is an error, and another one than that of a key with something else in it.
    """
    if isinstance(fields, RedisError):
        if not is_wrong_type(fields):
            raise fields
        return UnreadableRecord(str(fields))
    if fields[0] is None:
        return None
    try:
        return _readable_record(fields)
    except (ProtocolError, ValueError) as error:  # ValueError: no number, or no UTF-8
        _, epoch, _, _, _, gateways = (field or b"" for field in fields)
        names = tuple(gateways.decode(errors="replace").split())
        return UnreadableRecord(str(error), int(epoch) if epoch.isdigit() else 0, names)


def _readable_record(fields: Sequence[bytes | None]) -> Record:
    """
    Raises:
        ProtocolError, ValueError: a field is damaged.
    """
    request, epoch, cancelled, begin, finish, gateways = fields
    return Record(
        from_record_value(Request, request or b""),
        int(epoch or b""),
        cancelled is not None,
        tuple(str(gateways or b"", "utf-8").split()),
        None if begin is None else from_record_value(Begin, begin),
        None if finish is None else from_record_value(Finish, finish),
    )

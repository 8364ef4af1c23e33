"""The gateway's side of the pipeline: submits, attaches and cancels requests, and reads their records."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager

from prometheus_client import Counter
from redis.asyncio import Redis

from services.gateway.errors import QUEUE_DOWN, REUSED_KEY, TooLateError, too_many, unknown_request, uploads_too_large
from services.gateway.inflight.backlog import Backlog
from services.gateway.inflight.field_check import FieldCheck
from services.gateway.inflight.leftovers import Leftovers
from services.gateway.inflight.request import Choice, ChoiceState, OpenRequest, choice_id
from services.gateway.inflight.stored import StoredRequest
from services.gateway.inflight.work_messages import (
    PipelineOptions,
    RequestMetadata,
    shard_of,
    uploads_of,
    work_messages,
)
from services.gateway.request import answer_format
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.parsed import ParsedRequest
from services.gateway.tenants.headers import retry_headers
from services.gateway.tenants.limiter import Limiter, Quota
from shared.bus import keys
from shared.bus.blobs import Blobs
from shared.bus.keys import Keys
from shared.bus.ownership import DELTAS_LENGTH
from shared.bus.records import Record, Records, Submission, UnreadableRecord
from shared.bus.streams import reply, send
from shared.crash_points import crash_point
from shared.errors import Failure, ProtocolError, RequestError, unreadable
from shared.messages import Attach, Encode, Failed, Generate

UPLOADS_GRACE_S = 60.0  # for which uploads are kept beyond the deadline, if nobody deletes them when their request ends
MOST_RETRY_MS = 120_000  # clients give up where they are told to wait longer

Settle = Callable[[Collection[str]], None]  # settles a request, given the ids of its choices that go on


class Pipeline:
    """The stages behind Redis, as the registry of open requests sees them."""

    def __init__(
        self,
        options: PipelineOptions,
        redis: Redis,
        keys: Keys,
        backlog: Backlog,
        blobs: Blobs,
        records: Records,
        limiter: Limiter,
        rejections: Counter,
    ) -> None:
        self._options = options
        self._redis = redis
        self._keys = keys
        self._backlog = backlog
        self._blobs = blobs
        self._records = records
        self._limiter = limiter
        self._rejections = rejections
        self._leftovers = Leftovers(records, blobs)
        self._fields = FieldCheck(redis, keys)

    async def submit(self, open_request: OpenRequest, parsed: ParsedRequest, metadata: RequestMetadata) -> str | None:
        """Send every choice of `open_request`, or none if a request was sent before under the same Idempotency-Key.

        Returns the id of that earlier request, None if this one was sent.

        Raises:
            RequestError: 409, the key was used for another body; 403 or 429, the limits of its tenant or of the queue;
                503, Redis does not answer, or replicas of an older build would not heed all of it.
            RedisError: it could not be sent, or that is not known; what is left of it in Redis is removed once that
                answers, except a request that has a key and was sent after all: it runs, for whoever repeats it.
        """
        works = work_messages(open_request, parsed, metadata, self._options)
        async with self._submit_timeout():
            earlier = await self._check_fields(works[0], metadata)
            if earlier is None:
                await self._admit_in_time(parsed.n, metadata)
                await self._reserve(open_request, parsed, metadata.quota)
                uploads = uploads_of(open_request, parsed)
                open_request.mark_uploads(uploads)
                earlier = await self._send(works, uploads, metadata)
        if earlier is not None:
            assert metadata.key is not None
            if earlier.body_hash != metadata.key.body_digest:
                raise RequestError(REUSED_KEY)
            return earlier.request_ids[0]
        open_request.mark_submitted()
        return None

    async def _check_fields(self, work: Encode | Generate, metadata: RequestMetadata) -> Submission | None:
        """Refuse what older replicas would not heed, unless it was submitted before: then return that submission.

        Raises:
            RequestError: 503, it is refused.
        """
        try:
            await self._fields.check(work)
        except RequestError:
            earlier = None if metadata.key is None else await self._records.earlier(metadata.key.digest)
            if earlier is None:
                raise
            return earlier
        return None

    async def _admit_in_time(self, count: int, metadata: RequestMetadata) -> None:
        rest_s = metadata.deadline - time.time()
        try:
            await self._backlog.admit(count, rest_s, None if metadata.quota is None else metadata.quota.share)
        except TooLateError as late:
            if metadata.quota is not None:
                metadata.quota.headers.update(retry_headers(min(MOST_RETRY_MS, round(1000 * (late.wait_s - rest_s)))))
            raise

    async def _reserve(self, open_request: OpenRequest, parsed: ParsedRequest, quota: Quota | None) -> None:
        ids = [choice.request_id for choice in open_request.choices]
        # Each choice is stored with uploads of its own.
        media_bytes = len(ids) * sum(len(item.data) for item in parsed.media if item.data is not None)
        tokens = sum(map(len, parsed.segments)) + sum(len(prompt.tokens) for prompt in parsed.prompts)
        open_request.mark_reserved(await self._limiter.admit(quota, parsed.model, ids, tokens, media_bytes))

    async def count(self, quota: Quota) -> None:
        """Count a request that the gateway alone answers among those of its tenant.

        Raises:
            RequestError: 429, beyond a limit; 503, Redis does not answer.
            RedisError: Redis cannot decide.
        """
        async with self._submit_timeout():
            await self._limiter.count(quota)

    def mark_begun(self, open_request: OpenRequest) -> None:
        """Tell the limiter that a request's first token is here."""
        if open_request.reservation is not None:
            self._limiter.begin(open_request.reservation)

    def settlement(self, open_request: OpenRequest) -> Settle:
        """Return a function that tells the limiter what a request has used until now, and which choices go on."""
        reservation = open_request.reservation
        if reservation is None:
            return lambda going_on: None
        choices = open_request.choices
        sent = any(choice.state is not ChoiceState.NEW for choice in choices)
        prompt = _prompt_tokens(open_request, reservation.charged) if sent else 0
        generated = {choice.request_id: choice.generated for choice in choices}

        def settle(going_on: Collection[str]) -> None:
            left = {request_id: generated[request_id] for request_id in going_on}
            self._limiter.end(reservation, prompt, sum(generated.values()), left=left, stored=sent)

        return settle

    async def find(self, request_id: str, owner: str) -> StoredRequest:
        """Read the records of a request.

        Raises:
            RequestError: 404, unknown, expired, or another owner's; 500, damaged; 503, Redis does not answer.
            RedisError: the records cannot be read.
        """
        async with self._submit_timeout():
            first = await self._read_choices([request_id])
            if not first:
                raise unknown_request(request_id)
            found = _answer_format(first[0])
            ids = [choice_id(request_id, index) for index in range(found.n)]
            records = first + await self._read_choices(ids[1:])
        if found.owner != owner or len(records) < found.n:
            raise unknown_request(request_id)
        return StoredRequest(request_id, found, tuple(records))

    async def _read_choices(self, request_ids: list[str]) -> list[Record]:
        """Return the records that exist, in this order.

        Raises:
            RequestError: 500, one cannot be read.
        """
        found = await self._records.get(request_ids)
        records = [found[each] for each in request_ids if each in found]
        readable = [record for record in records if isinstance(record, Record)]
        if len(readable) < len(records):
            raise RequestError(unreadable("the record"))
        return readable

    async def read_records(self, request_ids: Iterable[str]) -> dict[str, Record | UnreadableRecord]:
        """Return the records that exist, by request id."""
        return await self._records.get(list(request_ids))

    async def read_lost(self, request_ids: Iterable[str]) -> set[str]:
        """Return those that have a record but no work entry, although no stage has ended them."""
        return await self._records.lost(list(request_ids))

    async def forget(self, open_request: OpenRequest) -> None:
        """Delete all that is kept of a request that no stage works on."""
        await self._leftovers.remove([choice.request_id for choice in open_request.choices], open_request.uploads)

    async def remove_leftovers(self) -> None:
        """Remove what could not be removed while Redis was away."""
        await self._leftovers.remove_again()

    def is_attached(self, record: Record) -> bool:
        """Return True if the deltas of this record's request are sent to this gateway."""
        return self._options.gateway in record.gateways

    async def attach(self, choices: Sequence[Choice]) -> None:
        """Have deltas sent to this gateway from now on, beginning with those that each choice has not received.

        The record names this gateway at once, so that no other gateway that has had the request cancels it.
        """
        if not choices:
            return
        await self._records.attach([choice.request_id for choice in choices], self._options.gateway)
        for choice in choices:
            attach = Attach(choice.request_id, self._options.gateway, choice.seq, choice.until)
            choice.mark_catch_up()
            crash_point("gateway.attach.before")
            await send(self._redis, self._keys.tokens(shard_of(choice.request_id, self._options.shards)), attach)
            crash_point("gateway.attach.after")

    async def attach_in_time(self, choices: Sequence[Choice]) -> None:
        """Attach for a client that waits for it.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: the deltas cannot be requested.
        """
        async with self._submit_timeout():
            await self.attach(choices)

    async def cancel(self, request_ids: Sequence[str]) -> list[str]:
        """Cancel these requests, except those that have readers at another gateway; return those that were."""
        alone = await self._records.detach(request_ids, self._options.gateway)
        if alone:
            crash_point("gateway.cancel.before")
            await self._records.cancel(alone)
            crash_point("gateway.cancel.after")
        return alone

    async def is_alone(self, request_id: str) -> bool:
        """Return True if no other gateway reads this request's answer."""
        record = (await self._records.get([request_id])).get(request_id)
        return record is not None and record.gateways == (self._options.gateway,)

    async def tell(self, stored: StoredRequest, failure: Failure) -> None:
        """End the requests of all readers of an answer with a failure."""
        for record in stored.records:
            for gateway in record.gateways:
                failed = Failed(record.request.id, failure)
                await reply(self._redis, self._keys.deltas(gateway), failed, DELTAS_LENGTH)

    async def drop(self, request_id: str) -> None:
        """Delete the answer of a request of one choice that has ended, if it is still kept."""
        await self._records.delete([request_id])

    async def shorten(self, request_id: str) -> None:
        """Keep a request no longer than other requests after its end, since its answer is kept elsewhere."""
        await self._records.shorten(request_id, self._options.retain_s)

    async def shorten_keyed(self, digest: str) -> None:
        """Keep the request that was submitted under an Idempotency-Key no longer than others after its end.

        Nor the key: nobody repeats it. That of a line of a batch would outlive all that it is for by days.
        """
        for request_id in await self._records.submitted([digest]):
            await self.shorten(request_id)
        await self._records.shorten_keys([digest], self._options.retain_s)

    async def cancel_keyed(self, digests: Sequence[str]) -> None:
        """Cancel the requests that were submitted under these Idempotency-Keys and have not ended; nobody repeats them.

        Raises:
            RedisError: they could not be cancelled.
        """
        request_ids = await self._records.submitted(digests)
        if request_ids:
            await self._records.cancel(request_ids)
        await self._records.shorten_keys(digests, self._options.retain_s)

    async def cancel_for_all(self, request_ids: Sequence[str]) -> None:
        """Cancel these requests, whoever reads them.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: they could not be cancelled.
        """
        async with self._submit_timeout():
            await self._records.cancel(request_ids)

    # ------------------------------------------------------------------------------------------------ sending

    @asynccontextmanager
    async def _submit_timeout(self) -> AsyncIterator[None]:
        """Treat a Redis that does not answer in time as one that cannot be reached."""
        try:
            async with asyncio.timeout(self._options.submit_s):
                yield
        except TimeoutError:
            raise RequestError(QUEUE_DOWN) from None

    async def _send(
        self, works: list[Encode] | list[Generate], uploads: dict[str, bytes], metadata: RequestMetadata
    ) -> Submission | None:
        """Send uploads, then work entries: an entry whose blobs are missing would fail."""
        stream = keys.ENCODE if isinstance(works[0], Encode) else keys.GENERATE
        earlier = None
        try:
            if uploads:
                await self._pin(uploads, metadata.deadline - time.time())
            crash_point("gateway.submit.before")
            if metadata.key is None:
                for work in works:
                    await self._records.submit(stream, work)
            else:
                request = works[0].request
                ttl_s = math.ceil(max(0.0, metadata.deadline - metadata.created) + request.retain_s) + 1
                digest, body_digest = metadata.key.digest, metadata.key.body_digest
                earlier = await self._records.submit_once(stream, works, digest, body_digest, ttl_s)
            crash_point("gateway.submit.after")
        except BaseException:
            remove = self._leftovers.remove if metadata.key is None else self._leftovers.remove_unless_submitted
            await remove([work.request.id for work in works], uploads)
            raise
        if earlier is not None:
            await self._leftovers.remove([], uploads)
        return earlier

    async def _pin(self, uploads: dict[str, bytes], rest_s: float) -> None:
        """Store uploads until their request has ended.

        Raises:
            RequestError: 413, there is never room for them; 429, there is none now.
        """
        size, limit = sum(map(len, uploads.values())), self._blobs.upload_limit
        if size > limit:
            raise RequestError(uploads_too_large(size, limit))
        taken = await self._blobs.pin_uploads(uploads, max(0.0, rest_s) + UPLOADS_GRACE_S)
        if taken is not None:
            self._rejections.labels("upload_budget").inc()
            raise too_many(
                f"There is no room for {size} bytes of uploads now: those of other requests take {taken} of {limit} "
                "bytes (half of blob_budget_bytes)."
            )


def _answer_format(record: Record) -> AnswerFormat:
    """
    Raises:
        RequestError: 500, it cannot be read.
    """
    try:
        return answer_format.decode(record.request.form)
    except ProtocolError as error:
        raise RequestError(unreadable("the format of the answer")) from error


def _prompt_tokens(open_request: OpenRequest, text_tokens: int) -> int:
    """Return how many tokens of prompts a request has used, of which `text_tokens` were known when it came.

    Those of media are known when they are accepted, also if no answer ends, as that of a count never does.
    """
    choices, each = open_request.choices, open_request.answer_format.n // open_request.answer_format.prompts
    groups = [choices[start : start + each] for start in range(0, len(choices), each)]
    said = [
        next((choice.usage.prompt_tokens for choice in group if choice.usage is not None), None) for group in groups
    ]
    known = sum(tokens for tokens in said if tokens is not None)
    return max(known, text_tokens, open_request.prompt_tokens or 0) if None in said else known

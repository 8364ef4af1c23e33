"""Handler of `Encode` requests: checks and encodes a request's media, and forwards its prompt to the engine.

A prompt goes ahead to the engine once all of its media have passed their checks, since their sizes are known then; the
engine computes it as far as embeddings are there. Its entry stays until all are stored, as a promise that they will be.

Every request leaves this stage in one of four ways, with nothing left behind: forwarded, refused (4xx), failed (5xx) or
dropped (cancelled, or its record is gone). If this process dies first, another replica claims the entry and repeats all
of it, to the same effect. If another replica owns the entry, because this process was paused or Redis lost it, Redis
refuses every write made here for the entry. A request whose prompt went ahead is the engine's to answer: where its
embeddings cannot be made, its record tells the engine why.

Uploads stay until the request ends, since embeddings may be evicted before the engine reads them: the engine then sends
the request back. A request that an engine has begun ends as all such requests do, in the tokens stream.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.mm_encoder import spans
from services.mm_encoder.helper import Helper
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Links, Prepared, Preparer, gather_in_order
from services.mm_encoder.prompt import Embedded, expand
from services.mm_encoder.received import Received
from services.mm_encoder.room import Room
from services.mm_encoder.running import Outcome, RunningRequest, running_request
from services.mm_encoder.store.cache import Embeds, SingleFlight
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from shared.bus.blobs import MEDIA, Blobs
from shared.bus.consumer import Consumer
from shared.bus.keys import Keys
from shared.bus.ownership import DELTAS_LENGTH, Poison
from shared.bus.records import CONTROL_LENGTH, Record, Records, UnreadableRecord
from shared.bus.retry import retry_until_available
from shared.bus.streams import reply, send
from shared.bus.work_stream import Delivery, WorkStream
from shared.crash_points import crash_point
from shared.errors import Failure, RequestError, internal, release_frames, unreadable
from shared.log import logger
from shared.messages import (
    Accepted,
    Begin,
    Encoded,
    Failed,
    Finish,
    Generate,
    Media,
    Message,
    Offer,
    Offered,
    Request,
    TokenRun,
    Tokens,
)
from shared.tracing import OFF, Tracing

SERVICE = "mm_encoder"
HELP_LACKS = 1 << 20  # requests of this replica come before its help for others
# The most requests that may wait for others' servers besides those in flight. Else a few links to servers that answer
# slowly, or never, would hold up everybody's pictures.
MOST_FETCHING = 64
ROOM_PASSES = 2  # of the tower: media of a request that are its own replica's to encode; others may be another's
POISONED = Failure(500, "The request could not be processed.", type="server_error", code="internal_error")
INTERNAL = Failure(500, "Internal error while encoding media.", type="server_error", code="internal_error")
CHANGED = internal(
    "The media at a URL changed while the request was processed. Send it again.", "media_changed", 503
).failure

_log = logger(__name__)


class EncodeHandler:
    """`shared.bus.consumer.Handler` of this service; `consumer` keeps its requests.

    `patch_id` is the token id of a placeholder; `max_patches` is the most in a pass of the tower; `capacity` is the
    number of places: a request has one while its media are read, decoded and encoded, not while links are fetched.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        keys: Keys,
        stream: WorkStream,
        encode_locks: EncodeLocks,
        records: Records,
        blobs: Blobs,
        preparer: Preparer,
        embeds: Embeds,
        batcher: Batcher,
        metrics: Metrics,
        patch_id: int,
        max_patches: int,
        capacity: int,
        claim_every_s: float,
        tracing: Tracing = OFF,
    ) -> None:
        self.consumer: Consumer[RunningRequest] = Consumer(
            redis, keys, SERVICE, stream, self, capacity, claim_every_s, aside=self._count_fetching
        )
        self._places = asyncio.Semaphore(capacity)
        self._redis = redis
        self._keys = keys
        self._ownership = stream.ownership
        self._encode_locks = encode_locks
        self._records = records
        self._blobs = blobs
        self._preparer = preparer
        self._embeds = embeds
        self._batcher = batcher
        self._metrics = metrics
        self._patch_id = patch_id
        self._max_patches = max_patches
        self.helper = Helper(self._help, lambda: self.consumer.idle)
        self._tracing = tracing
        self._encoding: SingleFlight[None] = SingleFlight()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures: asyncio.Queue[BaseException] = asyncio.Queue()

    async def watch(self) -> None:
        """Raise the exception of the first request whose handling failed beyond its own failure."""
        raise await self._failures.get()

    async def close(self) -> None:
        """Cancel the work on all requests."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._encoding.close()

    # ---------------------------------------------------------------------------------------- called by the consumer

    def new_request(self, delivery: Delivery, poison: Poison | None) -> RunningRequest:
        return running_request(delivery, poison)

    def start(self, requests: Sequence[RunningRequest]) -> None:
        for running in requests:
            self._metrics.running.inc()
            self._spawn(self._process(running))

    def abandon(self, request: RunningRequest) -> None:
        request.lost = True
        self.cancel(request)

    def cancel(self, request: RunningRequest) -> None:
        if request.work is not None:
            request.work.cancel()

    def on_control(self, message: Message) -> None:
        if isinstance(message, Encoded):
            self._encode_locks.encoded(message)
        elif isinstance(message, Offer):
            self.helper.offer(message)

    def _spawn(self, steps: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failures.put_nowait(error)

    # ------------------------------------------------------------------------------------------------- one request

    async def _process(self, running: RunningRequest) -> None:
        """Process one request until it has left this stage in one of the four ways."""
        try:
            await self.consumer.ack_replaced([running])
            if running.poison is None:
                await self._work_and_answer(running)
            else:
                self._metrics.count_request("failed")
                await self._end(running, POISONED)
        finally:
            self._metrics.running.dec()
            self.consumer.release([running])

    async def _work_and_answer(self, running: RunningRequest) -> None:
        work = running.work = asyncio.create_task(retry_until_available("encode", lambda: self._work(running)))
        if running.lost:  # before its work began
            work.cancel()
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()  # does nothing unless the handler is being closed
        outcome = self._outcome(running.message.request, work)
        if isinstance(outcome, Failure):
            self._metrics.count_request("refused" if outcome.status < 500 else "failed")
            await self._end(running, outcome)
        elif outcome == "done":
            self._metrics.count_request("handed_on")
        elif outcome == "over":
            await self.consumer.ack([running.entry_id])
        elif outcome == "unwanted" and not running.lost:
            self._metrics.count_request("dropped")
            await self._end(running, None)
        spans.record(self._tracing, running, outcome)

    def _outcome(self, request: Request, work: asyncio.Task[Outcome]) -> Outcome:
        if work.cancelled():
            return "unwanted"
        try:
            outcome = work.result()
        except RedisError:
            raise  # no answer could be sent; the entry stays and is delivered again
        except RequestError as error:
            release_frames(error)
            return error.failure
        except Exception as error:
            _log.error("request failed", extra=request.log_fields, exc_info=error)
            release_frames(error)
            return INTERNAL
        return CHANGED if outcome == "changed" else outcome

    async def _work(self, running: RunningRequest) -> Outcome:
        request = running.message.request
        record = (await self._records.get([request.id])).get(request.id)
        if isinstance(record, UnreadableRecord):
            _log.error("unreadable record", extra={**request.log_fields, "reason": record.reason})
            return unreadable("the record")
        if record is None or record.cancelled:
            return "unwanted"
        if record.finish is not None:
            return "over"
        if running.attempts > 1 and (recorded := await self._ownership.recorded_failure(request.id)) is not None:
            return recorded
        _check_deadline(request)
        with self._preparer.receive(running.message) as received:
            links = await self._fetch(running, received)
            async with self._places:  # in the order in which they come here
                return await self._encode_and_forward(running, record, received, links)

    async def _fetch(self, running: RunningRequest, received: Received) -> Links:
        """Fetch what has links. Meanwhile the request leaves room for others to be read."""
        running.is_fetching = any(media.url is not None for media in running.message.media)
        self.consumer.wake()
        try:
            return await self._preparer.fetch(running.message.media, received)
        finally:
            running.is_fetching = False

    async def _encode_and_forward(
        self, running: RunningRequest, record: Record, received: Received, links: Links
    ) -> Outcome:
        """Encode each of the media as soon as it has passed its checks, and forward the prompt when all have."""
        message = running.message
        encoding: dict[int, asyncio.Task[None]] = {}
        room = Room(ROOM_PASSES * self._max_patches)
        running.lacks = len(message.media)

        def encode(index: int, item: Prepared) -> None:
            if item.patches is None:
                running.lacks -= 1
            else:
                work = self._ensure_encoded(running, room, item.embedded, item.patches)
                encoding[index] = asyncio.create_task(work)

        try:
            media, max_tokens = await self._preparer.prepare(message, received, links, encode)
            prompt, placed = expand(message.segments, [item.embedded for item in media], self._patch_id)
            running.prompt_tokens, running.hits = len(prompt) // 4, len(media) - len(encoding)
            self._count_media(media)
            offers = [Offered(media[i].embedded.key, message.media[i]) for i in sorted(encoding, reverse=True)]
            del media  # and with it each one's pixels once they are encoded
            await self._send_accepted(record, Accepted(running.request_id, running.prompt_tokens))
            generate = Generate(message.request, prompt, max_tokens, placed)
            # Not again after a replica died with it: what crashes one must not be carried to all that are idle.
            offer = Offer(tuple(offers)) if room.crowded and running.attempts == 1 else None
            return await self._forward(running, generate, [encoding[index] for index in sorted(encoding)], offer)
        finally:
            for task in encoding.values():
                task.cancel()
            await asyncio.gather(*encoding.values(), return_exceptions=True)

    def _count_fetching(self) -> int:
        return min(MOST_FETCHING, sum(request.is_fetching for request in self.consumer.requests))

    async def _forward(
        self,
        running: RunningRequest,
        generate: Generate,
        encoding: Sequence[asyncio.Task[None]],
        offer: Offer | None,
    ) -> Outcome:
        """Forward a prompt when its embeddings are stored; if some still have to be made, let it go ahead of them."""
        if offer is not None:
            await send(self._redis, self._keys.control(), offer, max_len=CONTROL_LENGTH)
        if not all(task.done() for task in encoding):
            crash_point("mm_encoder.ahead.before")
            ahead = await self._ownership.forward_ahead(running.entry_id, running.message, generate)
            crash_point("mm_encoder.ahead.after")
            if ahead != "done" and ahead != "later":
                return ahead
        await gather_in_order(encoding)
        crash_point("mm_encoder.hand_on.before")
        outcome = await self._ownership.forward(running.entry_id, running.message, generate)
        crash_point("mm_encoder.hand_on.after")
        return outcome

    async def _send_accepted(self, record: Record, accepted: Accepted) -> None:
        crash_point("mm_encoder.accepted.before")
        for gateway in record.gateways:
            await reply(self._redis, self._keys.deltas(gateway), accepted, DELTAS_LENGTH)
        crash_point("mm_encoder.accepted.after")

    def _count_media(self, media: Sequence[Prepared]) -> None:
        for item in media:
            self._metrics.count_media(item.embedded.kind, hit=item.patches is None)

    async def _ensure_encoded(self, running: RunningRequest, room: Room, embedded: Embedded, patches: Patches) -> None:
        async with room.of(len(patches.rows)):
            await self._encoding.join(embedded.key, partial(self._encode, embedded, patches, lambda: running.lacks))
        running.lacks -= 1

    async def _help(self, key: str, media: Media) -> None:
        """Make the embeddings of another replica's item, unless somebody does or has."""

        async def encode() -> None:
            if await self._embeds.find(media.kind, key) is not None:
                return
            item = await self._preparer.prepare_one(media, key)
            if item is not None and item.patches is not None:
                await self._encode_and_store(item.embedded, item.patches, lambda: HELP_LACKS)

        await self._encode_locks.encode_if_free(key, encode)

    async def _encode_and_store(self, embedded: Embedded, patches: Patches, lacks: Callable[[], int]) -> None:
        async with self._embeds.prepare(embedded.rows) as place:
            rows = await self._batcher.encode(patches, lacks)
            with self._metrics.stage("store"):
                await self._embeds.store(embedded.key, embedded.grid, rows, place)
            crash_point("mm_encoder.store.after")

    async def _encode(self, embedded: Embedded, patches: Patches, lacks: Callable[[], int]) -> None:
        async def stored() -> bool:
            return await self._embeds.find(embedded.kind, embedded.key) is not None

        encode = partial(self._encode_and_store, embedded, patches, lacks)
        await self._encode_locks.encode_once(embedded.key, stored, encode)

    # ------------------------------------------------------------------------------------------------ ending a request

    async def _end(self, running: RunningRequest, failure: Failure | None) -> None:
        """End a request here: delete its uploads, send its failure, if there is one, and remove its entry and record.

        Does nothing if another replica owns the entry. A request whose prompt went ahead is left to its engine.
        """
        request, entry_id = running.message.request, running.entry_id
        end_ahead = partial(self._ownership.end_ahead, entry_id, request.id, failure, running.poison)
        crash_point("mm_encoder.leave.before")
        if await retry_until_available("leave", end_ahead):
            return
        crash_point("mm_encoder.leave.after")
        if running.uploads:
            record_failure = partial(self._ownership.record_failure, entry_id, request.id, failure)
            if not await retry_until_available("record failure", record_failure):
                return
            crash_point("mm_encoder.condemn.after")
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, running.uploads))
        records = await retry_until_available("record", lambda: self._records.get([request.id]))
        record = records.get(request.id)
        crash_point("mm_encoder.end.before")
        await retry_until_available("end", lambda: self._send_end(running, record, failure))
        crash_point("mm_encoder.end.after")

    async def _send_end(
        self, running: RunningRequest, record: Record | UnreadableRecord | None, failure: Failure | None
    ) -> None:
        request, entry_id, poison = running.message.request, running.entry_id, running.poison
        if record is not None and record.epoch > 0:
            finish = Finish("cancelled") if failure is None else Finish("error", failure=failure)
            await self._ownership.end_with_tokens(
                entry_id, request, _last_tokens(request.id, record.epoch, finish), poison
            )
        elif failure is None:
            await self._ownership.drop(entry_id, request.id)
        else:
            await self._ownership.end_with_failed(entry_id, Failed(request.id, failure), request.gateway, poison)


def _last_tokens(request_id: str, epoch: int, finish: Finish) -> Tokens:
    """Return the message that makes postproc end a request. postproc keeps the counts of the engine that began it."""
    run = TokenRun(request_id, epoch, 0, (), None, finish)
    return Tokens((Begin(request_id, epoch, 0, 0, 0, 0, 0),), (run,))


def _check_deadline(request: Request) -> None:
    """Check that the request's deadline has not passed.

    Raises:
        RequestError: it has (504).
    """
    if request.deadline is not None and time.time() > request.deadline:
        raise internal("The request's deadline passed before its media were looked at.", "timeout", status=504)

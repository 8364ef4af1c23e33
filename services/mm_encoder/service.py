"""The service: takes `Encode`, answers bad media, accepts good media, encodes it and hands the prompt on to the engine.

Every entry leaves in one of four ways: handed on, refused (4xx), failed (5xx) or dropped (cancelled, or its request is
gone), and each leaves nothing of it behind here. If this process dies first, the entry is another replica's: all that
it has done then is done again, to the same effect. If another has the entry, because this process was paused or Redis
lost it, what is done here has no effect.

Uploads stay until the request ends, since embeddings may be evicted before the engine comes for them: it sends the
request back then. A request that an engine has had ends as all such requests do, in the tokens stream.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.mm_encoder import spans
from services.mm_encoder.media.patches import Patches
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import Prepared, Preparer, gather_in_order
from services.mm_encoder.prompt import Embedded, expand
from services.mm_encoder.running import Outcome, Running
from services.mm_encoder.store.cache import Embeds, SingleFlight
from services.mm_encoder.store.locks import EncodeLocks
from services.mm_encoder.vision.batcher import Batcher
from shared.bus.blobs import MEDIA, Blobs
from shared.bus.keys import ENCODE, Keys
from shared.bus.ownership import DELTAS_LENGTH, EntryOwnership, Poison
from shared.bus.records import Record, Records
from shared.bus.retry import retry_until_available
from shared.bus.streams import Delivery, LogReader, WorkStream, reply
from shared.crash_points import crash_point
from shared.errors import Failure, ProtocolError, RequestError, internal
from shared.log import logger
from shared.messages import (
    Accepted,
    Begin,
    Cancel,
    Encode,
    Encoded,
    Failed,
    Finish,
    Generate,
    Message,
    Request,
    TokenRun,
    Tokens,
)
from shared.tracing import OFF, Tracing

SERVICE = "mm_encoder"
POISONED = Failure(500, "The request could not be processed.", type="server_error", code="internal_error")
INTERNAL = Failure(500, "Internal error while encoding media.", type="server_error", code="internal_error")
CHANGED = internal("The media at a URL changed while the request was in work.", "media_changed", 503).failure

_BLOCK_MS = 1000

_log = logger(__name__)


class MmEncoder:
    """See the module. `patch_id` is the placeholder's token id; abandoned entries are looked for every `look_s`;
    `own_clients` are closed in the end.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        own_clients: Sequence[Redis],
        keys: Keys,
        stream: WorkStream,
        ownership: EntryOwnership,
        encode_locks: EncodeLocks,
        records: Records,
        blobs: Blobs,
        preparer: Preparer,
        embeds: Embeds,
        batcher: Batcher,
        metrics: Metrics,
        patch_id: int,
        concurrency: int,
        look_s: float,
        tracing: Tracing = OFF,
    ) -> None:
        self._redis = redis
        self._own_clients = own_clients
        self._keys = keys
        self._stream = stream
        self._ownership = ownership
        self._encode_locks = encode_locks
        self._records = records
        self._blobs = blobs
        self._preparer = preparer
        self._embeds = embeds
        self._batcher = batcher
        self._metrics = metrics
        self._patch_id = patch_id
        self._concurrency = concurrency
        self._look_s = look_s
        self._tracing = tracing
        self._encoding: SingleFlight[None] = SingleFlight()
        self._control = LogReader(redis, {keys.control(): "$"})
        self._running: dict[str, Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False
        self._owed = 0  # entries of dead replicas for which nobody had room when we last looked
        self._changed = asyncio.Event()
        self._broken: asyncio.Future[None]

    async def startup(self) -> None:
        self._broken = asyncio.get_running_loop().create_future()
        self._batcher.start()
        await retry_until_available("begin", self._encode_locks.begin)
        await retry_until_available("join", self._stream.join)

    async def serve(self) -> None:
        """Work until cancelled. What is in hand then goes on, for `drain` to wait for."""
        self._open = True
        async with asyncio.TaskGroup() as group:
            for loop in (self._take, self._look, self._listen, self._watch):
                group.create_task(loop())

    async def drain(self) -> None:
        self._open = False
        async with asyncio.TaskGroup() as group:
            loops = [group.create_task(loop()) for loop in (self._look, self._listen, self._watch)]
            while self._tasks:
                await asyncio.wait(self._tasks)
                await asyncio.sleep(0)
            for loop in loops:
                loop.cancel()

    async def close(self) -> None:
        """Let go of what is still in hand: its entries are another replica's as soon as our lease is released."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._encoding.close()
        await self._preparer.close()
        await self._batcher.close()
        try:
            await self._stream.leave()
        except RedisError as error:
            _log.warning("consumer not deleted; others do it", extra={"reason": str(error)})
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        return {"running": len(self._running), "limit": self._concurrency, **self._metrics.figures()}

    # ------------------------------------------------------------------------------------------------------- loops

    async def _take(self) -> None:
        """Take what is new, unless a dead replica's requests need the room: they have waited longer."""
        while True:
            while self._room <= 0 or self._owed:
                self._changed.clear()
                await self._changed.wait()
            deliveries = await retry_until_available("take", lambda: self._stream.take(self._room, _BLOCK_MS))
            crash_point("mm_encoder.take.after")
            for delivery in deliveries:
                self._start(delivery)

    async def _look(self) -> None:
        """Take over what dead replicas left, and notice which entries are no longer ours."""
        while True:
            ours, poisoned, lost, self._owed = await retry_until_available(
                "look", lambda: self._stream.claim_abandoned(max(0, self._room))
            )
            crash_point("mm_encoder.look.after")
            for running in [running for running in self._running.values() if running.entry_id in lost]:
                self._lose(running)
            for delivery in ours:
                self._start(delivery)
            for delivery in poisoned:
                self._start_poisoned(delivery)
            await retry_until_available("sweep", self._encode_locks.sweep)
            self._changed.set()
            await asyncio.sleep(self._look_s)

    async def _listen(self) -> None:
        while True:
            for _, _, message in await retry_until_available("control", self._read_control):
                if isinstance(message, Cancel):
                    self._cancel(message)
                elif isinstance(message, Encoded):
                    self._encode_locks.landed(message)

    async def _read_control(self) -> list[tuple[str, str, Message]]:
        try:
            return await self._control.read(100, _BLOCK_MS)
        except ProtocolError as error:
            _log.warning("unreadable control entry", extra={"reason": str(error)})
            return []

    async def _watch(self) -> None:
        """Ends, with its exception, when something that must never fail has failed."""
        await asyncio.shield(self._broken)

    @property
    def _room(self) -> int:
        """How many more requests we may take in hand."""
        return self._concurrency - len(self._running) if self._open else 0

    # ------------------------------------------------------------------------------------------------- one request

    def _start(self, delivery: Delivery) -> None:
        message = _encode(delivery)
        running = Running(delivery.entry_id, delivery.attempts)
        work = running.work = asyncio.create_task(retry_until_available("encode", lambda: self._work(running, message)))
        self._keep(message, running, self._handle(message, running, work))

    def _start_poisoned(self, delivery: Delivery) -> None:
        message = _encode(delivery)
        poison = Poison(delivery.attempts, f"delivered {delivery.attempts} times")
        self._metrics.left("failed")
        running = Running(delivery.entry_id, delivery.attempts)
        self._keep(message, running, self._end(message, delivery.entry_id, POISONED, poison))

    def _keep(self, message: Encode, running: Running, steps: Coroutine[None, None, None]) -> None:
        """Hold a request until `steps` have ended. What is delivered last counts, whatever we have of the request: we
        may have lost that without knowing it."""
        request_id = message.request.id
        before = self._running.get(request_id)
        if before is not None:
            self._lose(before)
            if before.entry_id != running.entry_id:
                self._spawn(retry_until_available("finish", lambda: self._stream.finish([before.entry_id])))
        self._running[request_id] = running
        self._metrics.running.inc()
        self._spawn(steps).add_done_callback(lambda _: self._ended(request_id, running))

    def _spawn(self, steps: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(steps)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    def _ended(self, request_id: str, running: Running) -> None:
        if self._running.get(request_id) is running:
            del self._running[request_id]
        self._changed.set()
        self._metrics.running.dec()

    def _cancel(self, message: Cancel) -> None:
        for request_id in message.request_ids:
            running = self._running.get(request_id)
            if running is not None and running.work is not None:
                running.work.cancel()

    def _lose(self, running: Running) -> None:
        """Stop, and leave all else to whoever has the entry now."""
        running.lost = True
        if running.work is not None:
            running.work.cancel()

    async def _handle(self, message: Encode, running: Running, work: asyncio.Task[Outcome]) -> None:
        """Carry one request to one of the four ends."""
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()  # does nothing unless we are being closed
        outcome = self._outcome(message.request.id, work)
        if isinstance(outcome, Failure):
            self._metrics.left("refused" if outcome.status < 500 else "failed")
            await self._end(message, running.entry_id, outcome)
        elif outcome == "done":
            self._metrics.left("handed_on")
        elif outcome == "over":
            await retry_until_available("finish", lambda: self._stream.finish([running.entry_id]))
        elif outcome == "unwanted" and not running.lost:
            self._metrics.left("dropped")
            await self._end(message, running.entry_id, None)
        spans.record(self._tracing, message, running, outcome)

    def _outcome(self, request_id: str, work: asyncio.Task[Outcome]) -> Outcome:
        if work.cancelled():
            return "unwanted"
        error = work.exception()
        if error is None:
            return CHANGED if work.result() == "changed" else work.result()
        if isinstance(error, RedisError):
            raise error  # nobody could be told; the entry stays and is taken again
        if isinstance(error, RequestError):
            return error.failure
        _log.error("request failed", extra={"request_id": request_id}, exc_info=error)
        return INTERNAL

    async def _work(self, running: Running, message: Encode) -> Outcome:
        request = message.request
        record = (await self._records.get([request.id])).get(request.id)
        if record is None or record.cancelled:
            return "unwanted"
        if record.finish is not None:
            return "over"
        if running.attempts > 1 and (condemned := await self._ownership.condemned(request.id)) is not None:
            return condemned
        _check_deadline(request)
        media, max_tokens = await self._preparer.prepare(message)
        prompt, placed = expand(message.segments, [item.embedded for item in media], self._patch_id)
        running.prompt_tokens, running.hits = len(prompt) // 4, sum(item.patches is None for item in media)
        await self._accept(record, Accepted(request.id, running.prompt_tokens))
        await gather_in_order([self._ensure_encoded(item) for item in media])
        crash_point("mm_encoder.hand_on.before")
        generate = Generate(request, prompt, max_tokens, placed)
        outcome = await self._ownership.hand_on(running.entry_id, message, generate)
        crash_point("mm_encoder.hand_on.after")
        return outcome

    async def _accept(self, record: Record, accepted: Accepted) -> None:
        crash_point("mm_encoder.accepted.before")
        for gateway in record.gateways:
            await reply(self._redis, self._keys.deltas(gateway), accepted, DELTAS_LENGTH)
        crash_point("mm_encoder.accepted.after")

    async def _ensure_encoded(self, item: Prepared) -> None:
        self._metrics.accepted(item.embedded.kind, hit=item.patches is None)
        if item.patches is not None:
            await self._encoding.join(item.embedded.key, partial(self._encode, item.embedded, item.patches))

    async def _encode(self, embedded: Embedded, patches: Patches) -> None:
        async def stored() -> bool:
            return await self._embeds.find(embedded.kind, embedded.key) is not None

        async def make() -> None:
            rows = await self._batcher.encode(patches)
            with self._metrics.stage("store"):
                await self._embeds.store(embedded.key, embedded.grid, rows)
            crash_point("mm_encoder.store.after")

        await self._encode_locks.make(embedded.key, stored, make)

    # -------------------------------------------------------------------------------------------------- the ways out

    async def _end(self, message: Encode, entry_id: str, failure: Failure | None, poison: Poison | None = None) -> None:
        """End a request here: tell why, if there is a failure, and forget it. Does nothing if another has the entry."""
        request, uploads = message.request, _uploads(message)
        if uploads:
            if not await retry_until_available(
                "condemn", lambda: self._ownership.condemn(entry_id, request.id, failure)
            ):
                return
            crash_point("mm_encoder.condemn.after")
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        records = await retry_until_available("record", lambda: self._records.get([request.id]))
        record = records.get(request.id)
        crash_point("mm_encoder.end.before")
        await retry_until_available("end", lambda: self._last_word(request, record, entry_id, failure, poison))
        crash_point("mm_encoder.end.after")

    async def _last_word(
        self, request: Request, record: Record | None, entry_id: str, failure: Failure | None, poison: Poison | None
    ) -> None:
        if record is not None and record.epoch > 0:
            finish = Finish("cancelled") if failure is None else Finish("error", failure=failure)
            await self._ownership.end(entry_id, request, _last_tokens(request.id, record.epoch, finish), poison)
        elif failure is None:
            await self._ownership.drop(entry_id, request.id)
        else:
            await self._ownership.refuse(entry_id, request, Failed(request.id, failure), poison)


def _last_tokens(request_id: str, epoch: int, finish: Finish) -> Tokens:
    """What postproc ends a request by. Its counts are those of the engine that began it."""
    run = TokenRun(request_id, epoch, 0, (), None, finish)
    return Tokens((Begin(request_id, epoch, 0, 0, 0, 0, 0),), (run,))


def _check_deadline(request: Request) -> None:
    """
    Raises:
        RequestError: the request waited for too long (504).
    """
    if request.deadline is not None and time.time() > request.deadline:
        raise internal("The request's deadline passed before its media were looked at.", "timeout", status=504)


def _encode(delivery: Delivery) -> Encode:
    """What a delivery of this stream carries.

    Raises:
        ProtocolError: someone wrote another kind of work to it.
    """
    if not isinstance(delivery.message, Encode):
        raise ProtocolError(f"a {type(delivery.message).__name__} in the stream {ENCODE}")
    return delivery.message


def _uploads(message: Encode) -> list[str]:
    return [media.blob for media in message.media if media.blob is not None]

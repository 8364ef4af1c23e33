"""The service: takes `Encode`, answers bad media, accepts good media, encodes it and hands the prompt on to the engine.

Every entry leaves in one of four ways: handed on, refused (4xx), failed (5xx) or dropped (cancelled, or its request is
gone), and each leaves nothing of it behind here. If this process dies first, the entry is another replica's: all that
it has done then is done again, to the same effect.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from functools import partial

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.mm_encoder.batcher import Batcher
from services.mm_encoder.cache import Embeds, Flights
from services.mm_encoder.metrics import Metrics
from services.mm_encoder.prepare import MEDIA, Prepared, Preparer, gather_in_order
from services.mm_encoder.processor import Patches
from services.mm_encoder.prompt import Embedded, expand
from shared.blobs import Blobs
from shared.errors import Failure, ProtocolError, RequestError
from shared.keys import ENCODE, Keys
from shared.log import logger
from shared.messages import Accepted, Cancel, Encode, Failed, Generate
from shared.records import Records
from shared.streams import Delivery, LogReader, WorkStream, send

SERVICE = "mm_encoder"
DELTAS_LENGTH = 100_000  # entries a gateway's stream keeps, about
POISONED = Failure(500, "The request could not be processed.", type="server_error", code="internal_error")
INTERNAL = Failure(500, "Internal error while encoding media.", type="server_error", code="internal_error")

_BLOCK_MS = 1000

_log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Running:
    """One request in hand: `work` may be cancelled by anyone, `task` sees it to its end. Without work, it is only
    being answered."""

    work: asyncio.Task[bool] | None
    task: asyncio.Task[None]


class MmEncoder:
    """See the module. `patch_id` is the placeholder's token id; abandoned entries are looked for every `claim_s`;
    `own_clients` are closed in the end.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        own_clients: Sequence[Redis],
        keys: Keys,
        stream: WorkStream,
        records: Records,
        blobs: Blobs,
        preparer: Preparer,
        embeds: Embeds,
        batcher: Batcher,
        metrics: Metrics,
        patch_id: int,
        concurrency: int,
        claim_s: float,
    ) -> None:
        self._redis = redis
        self._own_clients = own_clients
        self._keys = keys
        self._stream = stream
        self._records = records
        self._blobs = blobs
        self._preparer = preparer
        self._embeds = embeds
        self._batcher = batcher
        self._metrics = metrics
        self._patch_id = patch_id
        self._concurrency = concurrency
        self._claim_s = claim_s
        self._encoding: Flights[None] = Flights()
        self._running: dict[str, Running] = {}
        self._broken: asyncio.Future[None]

    async def startup(self) -> None:
        self._broken = asyncio.get_running_loop().create_future()
        self._batcher.start()
        await self._stream.join()

    async def serve(self) -> None:
        """Work until cancelled. What is in hand then goes on, for `drain` to wait for."""
        async with asyncio.TaskGroup() as group:
            for loop in (self._take, self._claim, self._listen, self._watch):
                group.create_task(loop())

    async def drain(self) -> None:
        while self._running:
            await asyncio.wait([running.task for running in self._running.values()])
            await asyncio.sleep(0)
        if self._broken.done():
            self._broken.result()

    async def close(self) -> None:
        """Let go of what is still in hand: its entries are claimed by another replica once our lease is gone."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._encoding.close()
        await self._preparer.close()
        await self._batcher.close()
        await self._stream.leave()
        for client in self._own_clients:
            await client.aclose()

    def load(self) -> dict[str, float]:
        return {"running": len(self._running), "limit": self._concurrency, **self._metrics.figures()}

    # ------------------------------------------------------------------------------------------------------- loops

    async def _take(self) -> None:
        while True:
            for delivery in await self._stream.take(await self._room(), _BLOCK_MS):
                self._start(delivery)

    async def _claim(self) -> None:
        while True:
            ours, poisoned = await self._stream.claim_abandoned(await self._room())
            for delivery in ours:
                self._start(delivery)
            for delivery in poisoned:
                message = _encode(delivery)
                self._keep(message.request.id, self._answer_poisoned(message))
            await asyncio.sleep(self._claim_s)

    async def _listen(self) -> None:
        control = LogReader(self._redis, {self._keys.control(): "$"})
        while True:
            try:
                entries = await control.read(100, _BLOCK_MS)
            except ProtocolError as error:
                _log.warning("unreadable control entry", extra={"reason": str(error)})
                continue
            for _, _, message in entries:
                if isinstance(message, Cancel):
                    self._cancel(message)

    async def _watch(self) -> None:
        """Ends, with its exception, when something that must never fail has failed."""
        await asyncio.shield(self._broken)

    async def _room(self) -> int:
        """How many more requests we may take in hand; waits until it is one."""
        while len(self._running) >= self._concurrency:
            await asyncio.wait([running.task for running in self._running.values()], return_when="FIRST_COMPLETED")
            await asyncio.sleep(0)
        return self._concurrency - len(self._running)

    # ------------------------------------------------------------------------------------------------- one request

    def _start(self, delivery: Delivery) -> None:
        request_id = delivery.message.request.id
        if request_id in self._running:
            return  # delivered again while in hand; the entry is the same one
        message = _encode(delivery)
        work = asyncio.create_task(self._work(delivery.entry_id, message))
        self._keep(request_id, self._handle(delivery.entry_id, message, work), work)

    def _keep(
        self, request_id: str, steps: Coroutine[None, None, None], work: asyncio.Task[bool] | None = None
    ) -> None:
        """Hold a request until `steps` have ended."""
        task = asyncio.create_task(steps)
        self._running[request_id] = Running(work, task)
        self._metrics.running.inc()
        task.add_done_callback(lambda done: self._ended(request_id, done))

    def _ended(self, request_id: str, task: asyncio.Task[None]) -> None:
        del self._running[request_id]
        self._metrics.running.dec()
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._broken.done():
            self._broken.set_exception(error)

    def _cancel(self, message: Cancel) -> None:
        for request_id in message.request_ids:
            running = self._running.get(request_id)
            if running is not None and running.work is not None:
                running.work.cancel()

    async def _handle(self, entry_id: str, message: Encode, work: asyncio.Task[bool]) -> None:
        """Carry one request to one of the four ends."""
        request_id = message.request.id
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()  # does nothing unless we are being closed
        failure = self._outcome(request_id, work)
        if failure is not None:
            self._metrics.left("refused" if failure.status < 500 else "failed")
            gateway, failed = message.request.gateway, Failed(request_id, failure)
            await self._records.refuse(failed, gateway, ENCODE, entry_id, SERVICE, DELTAS_LENGTH)
        elif work.cancelled() or not work.result():
            self._metrics.left("dropped")
            await self._records.delete([request_id])
        else:
            self._metrics.left("handed_on")
        await self._blobs.delete(MEDIA, _uploads(message))
        await self._stream.finish([entry_id])

    def _outcome(self, request_id: str, work: asyncio.Task[bool]) -> Failure | None:
        """What the client is told; None if the work went well or was cancelled."""
        error = None if work.cancelled() else work.exception()
        if error is None:
            return None
        if isinstance(error, RedisError):
            raise error  # nobody could be told; the entry stays and is taken again
        if isinstance(error, RequestError):
            return error.failure
        _log.error("request failed", extra={"request_id": request_id}, exc_info=error)
        return INTERNAL

    async def _work(self, entry_id: str, message: Encode) -> bool:
        """False: nobody waits for this request any more."""
        request = message.request
        record = (await self._records.get([request.id])).get(request.id)
        if record is None or record.cancelled:
            return False
        media, max_tokens = await self._preparer.prepare(message)
        prompt, spans = expand(message.segments, [item.embedded for item in media], self._patch_id)
        await self._tell(message, Accepted(request.id, len(prompt) // 4))
        await gather_in_order([self._ensure_encoded(item) for item in media])
        generate = Generate(request, prompt, max_tokens, spans)
        return await self._records.hand_on(generate, ENCODE, entry_id, SERVICE)

    async def _ensure_encoded(self, item: Prepared) -> None:
        self._metrics.accepted(item.embedded.kind, hit=item.patches is None)
        if item.patches is not None:
            await self._encoding.join(item.embedded.key, partial(self._encode, item.embedded, item.patches))

    async def _encode(self, embedded: Embedded, patches: Patches) -> None:
        rows = await self._batcher.encode(patches)
        with self._metrics.stage("store"):
            await self._embeds.store(embedded.key, embedded.grid, rows)

    async def _answer_poisoned(self, message: Encode) -> None:
        """Its entry is in quarantine already."""
        self._metrics.left("failed")
        await self._tell(message, Failed(message.request.id, POISONED))
        await self._blobs.delete(MEDIA, _uploads(message))
        await self._records.delete([message.request.id])

    async def _tell(self, message: Encode, what: Accepted | Failed) -> None:
        await send(self._redis, self._keys.deltas(message.request.gateway), what, max_len=DELTAS_LENGTH)


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

"""Handler of `Generate` requests: makes sequences of them, and ends their entries when they have ended.

A request is in hand from its delivery until its Finish is in the tokens stream, or until nothing need be said of it
here: it was dropped, sent back for new embeddings, or is another engine's.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from redis.asyncio import Redis

from services.engine.loop.mailbox import Abort, Add, FinishUnstarted, Forget, Mailbox
from services.engine.loop.step_output import End
from services.engine.metrics import EngineMetrics
from services.engine.schedule.sequence import Embeds, EngineFacts, build
from services.engine.transport import spans
from services.engine.transport.media import EmbedsGoneError, check_embeds
from services.engine.transport.pending import PendingRequest, pending_request
from services.engine.transport.resume import History, announcement, recover
from shared.bus.blobs import EMBEDS, MEDIA, Blobs
from shared.bus.consumer import Consumer
from shared.bus.keys import Keys
from shared.bus.ownership import EntryOwnership, Poison
from shared.bus.records import Record, Records
from shared.bus.retry import retry_until_available
from shared.bus.streams import Delivery, WorkStream
from shared.crash_points import crash_point
from shared.errors import Failure, RequestError, internal
from shared.log import logger
from shared.messages import Finish, MediaSpan, Message
from shared.tracing import OFF, Tracing

SERVICE = "engine"
DEADLINES_EVERY_S = 0.5
LATE = internal("The request's deadline passed before its answer was complete.", "timeout", status=504).failure

_log = logger(__name__)


def waiting_allowance(max_num_seqs: int) -> int:
    """Requests to hold beyond those that can run: their embeddings load and their prompts are checked while they
    wait for a place. More would keep work from replicas that have room now."""
    return max(2, max_num_seqs // 8)


class GenerateHandler:
    """`shared.bus.consumer.Handler` of this service: everything between the `generate` stream and the mailbox of the
    model's thread. `consumer` holds its requests."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        stream: WorkStream,
        ownership: EntryOwnership,
        blobs: Blobs,
        mailbox: Mailbox,
        facts: EngineFacts,
        capacity: int,
        claim_every_s: float,
        metrics: EngineMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        self.consumer: Consumer[PendingRequest] = Consumer(redis, keys, SERVICE, stream, self, capacity, claim_every_s)
        self._redis = redis
        self._keys = keys
        self._ownership = ownership
        self._records = Records(redis, keys)
        self._blobs = blobs
        self._mailbox = mailbox
        self._facts = facts
        self._metrics = metrics
        self._tracing = tracing
        self._batches: asyncio.Queue[Sequence[PendingRequest]] = asyncio.Queue()

    # ---------------------------------------------------------------------------------------- called by the consumer

    def receive(self, delivery: Delivery, poison: Poison | None) -> PendingRequest:
        return pending_request(delivery, poison)

    def start(self, requests: Sequence[PendingRequest]) -> None:
        self._batches.put_nowait(requests)

    def abandon(self, request: PendingRequest) -> None:
        self._mailbox.put(Forget(request.request_id))
        spans.record(self._tracing, request, time.time(), spans.LOST)

    def cancel(self, request: PendingRequest) -> None:
        request.cancelled = True
        if request.admitted:
            self._mailbox.put(Abort(request.request_id, Finish("cancelled")))

    def hear(self, message: Message) -> None:
        """Do nothing: the other messages are not for engines."""

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def expire(self) -> None:
        """End requests that are past their deadline. The gateway does so too, by cancelling, as long as it lives."""
        while True:
            for pending in self.consumer.requests:
                if pending.admitted and pending.late(time.time()):
                    self._mailbox.put(Abort(pending.request_id, Finish("error", failure=LATE)))
            await asyncio.sleep(DEADLINES_EVERY_S)

    async def admit(self) -> None:
        """Turn deliveries into sequences. A loop of its own, so that what was taken is admitted when taking stops."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._admit(await self._batches.get()))

    # ----------------------------------------------------------------------------------------------------- the end

    async def finished(self, ends: Sequence[End]) -> None:
        """These requests' Finish is in the stream: let go of their entries."""
        ended = []
        for end in ends:
            pending = self.consumer.get(end.request_id)
            if pending is not None and pending.epoch == end.epoch:
                pending.end = end
                ended.append(pending)
        await self._finish(ended)

    async def _finish(self, ended: Sequence[PendingRequest]) -> None:
        """Uploads first: of an entry that is gone, nobody would look for them."""
        uploads = await self._uploads(ended)
        if uploads:
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        crash_point("engine.finish.before")
        plain = [pending.entry_id for pending in ended if pending.poison is None]
        await self.consumer.finish(plain)
        for pending in ended:
            if pending.poison is not None:
                await retry_until_available(
                    "quarantine", partial(self._ownership.quarantine, pending.entry_id, pending.poison)
                )
        crash_point("engine.finish.after")
        await self._release(ended)

    async def _uploads(self, ended: Sequence[PendingRequest]) -> list[str]:
        """The uploads of requests that are still ours; another engine may yet need those of the others."""
        shown = [pending for pending in ended if pending.uploads]
        if not shown:
            return []
        ours = await retry_until_available(
            "owned", lambda: self._ownership.owned([pending.entry_id for pending in shown])
        )
        return [key for pending in shown if pending.entry_id in ours for key in pending.uploads]

    async def _release(self, gone: Sequence[PendingRequest]) -> None:
        for pending in await self.consumer.release(gone):
            self._note(pending, time.time())

    def _note(self, pending: PendingRequest, now: float) -> None:
        spans.record(self._tracing, pending, now)
        if pending.end is not None:
            fresh = pending.end.generated - pending.timeline.resumed_tokens
            self._metrics.observe_request(spans.durations(pending, now), fresh)

    async def _drop(self, pending: PendingRequest) -> None:
        """End a request that nobody waits for and of which nothing was ever said."""
        uploads = await self._uploads([pending])
        if uploads:
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        crash_point("engine.drop.before")
        await retry_until_available("drop", lambda: self._ownership.drop(pending.entry_id, pending.request_id))
        crash_point("engine.drop.after")
        await self._release([pending])

    # --------------------------------------------------------------------------------------------- admission

    async def _admit(self, batch: Sequence[PendingRequest]) -> None:
        await self.consumer.finish_replaced(batch)
        records = await self._claim(batch)
        again = {pending.request_id: (pending.message, pending.epoch) for pending in batch if pending.epoch > 1}
        histories = await retry_until_available(
            "resume", lambda: recover(self._redis, self._keys, self._records, again)
        )
        await asyncio.gather(
            *(
                self._admit_one(pending, records.get(pending.request_id), histories.get(pending.request_id, History()))
                for pending in batch
            )
        )

    async def _claim(self, batch: Sequence[PendingRequest]) -> dict[str, Record]:
        """Become the owner of these requests, as far as their entries are ours; their records, where there are any."""
        entries = [(pending.entry_id, pending.request_id) for pending in batch]
        crash_point("engine.claim.before")
        epochs = await retry_until_available("claim", lambda: self._ownership.claim(entries))
        crash_point("engine.claim.after")
        for pending in batch:
            pending.epoch = epochs.get(pending.request_id) or 0
            pending.lost = pending.request_id not in epochs
        return await retry_until_available(
            "claim", lambda: self._records.get([pending.request_id for pending in batch if pending.epoch])
        )

    async def _admit_one(self, pending: PendingRequest, record: Record | None, history: History) -> None:
        if not self.consumer.holds(pending):
            return
        over = history.ended or (record is not None and record.finish is not None)
        if pending.lost:
            await self.consumer.lose(pending)
        elif over or (record is None and pending.poison is not None):
            await self._finish([pending])
        elif record is None or ((record.cancelled or pending.cancelled) and pending.epoch == 1):
            await self._drop(pending)
        else:
            pending.cancelled |= record.cancelled
            if pending.attempts > 1 and history.tokens:
                count = len(history.tokens)
                await retry_until_available(
                    "progress", lambda: self._ownership.progressed(pending.entry_id, pending.request_id, count)
                )
            await self._give(pending, history)

    async def _give(self, pending: PendingRequest, history: History) -> None:
        """Give the request to the model, or the reason why not to whoever waits for it."""
        command: Add | FinishUnstarted | None
        if pending.cancelled:
            command = _answer(pending, history, Finish("cancelled"))
        elif pending.poison is not None:
            command = _answer(pending, history, Finish("error", failure=_deadly(pending.poison)))
        else:
            command = await self._command(pending, history)
        # Much may have happened while embeddings were loaded.
        if command is None or not self.consumer.holds(pending):
            return
        if pending.cancelled:
            command = _answer(pending, history, Finish("cancelled"))
        self._mailbox.put(command)
        pending.admitted = True

    async def _command(self, pending: PendingRequest, history: History) -> Add | FinishUnstarted | None:
        """None: the request has been sent back to have its embeddings made again."""
        try:
            if pending.late(time.time()):
                raise RequestError(LATE)
            embeds = await self._embeds(pending.message.spans)
            sequence = build(pending.message, pending.epoch, history.tokens, embeds, self._facts)
            sequence.timeline = pending.timeline
            return Add(sequence)
        except EmbedsGoneError as gone:
            if await self._send_back(pending):
                return None
            refused: RequestError = gone
        except RequestError as error:
            refused = error
        _log.warning("request refused", extra={"request_id": pending.request_id, "why": refused.failure.message})
        return _answer(pending, history, Finish("error", failure=refused.failure))

    async def _send_back(self, pending: PendingRequest) -> bool:
        """Whether the request is someone else's affair now."""
        crash_point("engine.send_back.before")
        outcome = await retry_until_available(
            "send back", lambda: self._ownership.send_back(pending.entry_id, pending.request_id)
        )
        crash_point("engine.send_back.after")
        if outcome == "never":
            return False
        _log.info("sent back for its embeddings", extra={"request_id": pending.request_id, "outcome": outcome})
        await self._release([pending])
        return True

    async def _embeds(self, spans: tuple[MediaSpan, ...]) -> tuple[Embeds, ...]:
        """
        Raises:
            RequestError: a blob is gone, or is not what the span says (5xx).
        """
        keys = list(dict.fromkeys(span.key for span in spans))
        found = await asyncio.gather(
            *(retry_until_available("blobs", partial(self._blobs.get, EMBEDS, key)) for key in keys)
        )
        stored = dict(zip(keys, found, strict=True))
        return tuple(check_embeds(span, stored[span.key], self._facts.model.hidden_size) for span in spans)


def _deadly(poison: Poison) -> Failure:
    return internal(f"The request ended {poison.attempts - 1} engines before it ended itself.").failure


def _answer(pending: PendingRequest, history: History, finish: Finish) -> FinishUnstarted:
    begin = announcement(pending.message, pending.epoch, len(history.tokens))
    return FinishUnstarted(pending.message.request.shard, begin, finish)

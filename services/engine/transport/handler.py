"""Handler of `Generate` requests: makes sequences of them, and acks their entries when they have ended.

A request is in flight from its delivery until its Finish is in the tokens stream, or until this engine has nothing more
to write for it: it was dropped, sent back for new embeddings, or another engine owns its entry.
"""

import asyncio
import time
from collections.abc import Sequence as Seq
from contextlib import aclosing
from functools import partial

from redis.asyncio import Redis

from services.engine.loop.mailbox import Abort, Add, FinishUnstarted, Forget, Mailbox, Supply
from services.engine.loop.step_output import End
from services.engine.metrics import EngineMetrics
from services.engine.schedule.embeds import Embeds
from services.engine.schedule.grammar_state import GrammarState
from services.engine.schedule.sequence import EngineFacts, Sequence, build
from services.engine.transport import spans
from services.engine.transport.embeds_loader import EmbedsLoader
from services.engine.transport.grammars import Grammars
from services.engine.transport.media import EmbedsGoneError
from services.engine.transport.pending import PendingRequest, pending_request
from services.engine.transport.resume import History, announcement, recover
from shared.bus.blobs import MEDIA, Blobs
from shared.bus.consumer import Consumer
from shared.bus.keys import Keys
from shared.bus.ownership import Poison
from shared.bus.records import Record, Records, UnreadableRecord
from shared.bus.retry import retry_until_available
from shared.bus.work_stream import Delivery, WorkStream
from shared.crash_points import crash_point
from shared.errors import Failure, RequestError, internal, unreadable
from shared.log import logger
from shared.messages import Encoded, Finish, Message
from shared.segments import Segments
from shared.tracing import OFF, Tracing

SERVICE = "engine"
DEADLINES_EVERY_S = 0.5
LATE = internal("The request's deadline passed before its answer was complete.", "timeout", status=504).failure

_log = logger(__name__)


def waiting_allowance(max_num_seqs: int) -> int:
    """Return the number of requests to read beyond those that can run.

    Their embeddings load and their prompts are checked while they wait to be scheduled. More of them would keep work
    from replicas that could run it now.
    """
    return max(2, max_num_seqs // 8)


def turns_ahead(max_num_seqs: int) -> int:
    """Return the number of requests to read, while tenants take turns, before those read earlier have begun.

    Each that waits here is served before whoever comes next, whatever the order among tenants.
    """
    return max(1, max_num_seqs // 8)


class GenerateHandler:
    """`shared.bus.consumer.Handler` of this service, from the `generate` stream to the mailbox of the model's thread.

    `consumer` keeps its requests; `capacity` is the most requests in flight, `max_num_seqs` the most that run. With
    `partial_prompts` a prompt begins while embeddings that it needs are still being made.
    """

    def __init__(
        self,
        *,
        redis: Redis,
        keys: Keys,
        stream: WorkStream,
        records: Records,
        blobs: Blobs,
        mailbox: Mailbox,
        facts: EngineFacts,
        grammars: Grammars,
        metrics: EngineMetrics,
        capacity: int,
        max_num_seqs: int,
        claim_every_s: float,
        recheck_s: float,
        partial_prompts: bool = True,
        segments: Segments | None = None,
        tracing: Tracing = OFF,
    ) -> None:
        self.consumer: Consumer[PendingRequest] = Consumer(
            redis, keys, SERVICE, stream, self, capacity, claim_every_s, self._turns_ahead, self._lacking
        )
        self._max_num_seqs = max_num_seqs
        self._redis = redis
        self._keys = keys
        self._ownership = stream.ownership
        self._records = records
        self._blobs = blobs
        self._mailbox = mailbox
        self._facts = facts
        self._embeds = EmbedsLoader(blobs, stream.ownership, facts.model.hidden_size, recheck_s, segments)
        self._partial_prompts = partial_prompts
        self._grammars = grammars
        self._metrics = metrics
        self._tracing = tracing
        self._batches: asyncio.Queue[Seq[PendingRequest]] = asyncio.Queue()

    # ---------------------------------------------------------------------------------------- called by the consumer

    def new_request(self, delivery: Delivery, poison: Poison | None) -> PendingRequest:
        return pending_request(delivery, poison)

    def start(self, requests: Seq[PendingRequest]) -> None:
        self._batches.put_nowait(requests)

    def abandon(self, request: PendingRequest) -> None:
        self._mailbox.put(Forget(request.request_id))
        spans.record(self._tracing, request, time.time(), spans.LOST)

    def cancel(self, request: PendingRequest) -> None:
        request.cancelled = True
        if request.admitted:
            self._mailbox.put(Abort(request.request_id, Finish("cancelled")))

    def on_control(self, message: Message) -> None:
        if isinstance(message, Encoded):
            self._embeds.encoded(message.key)

    def begun(self) -> None:
        """Note that the first step of a request has been launched: another may be read."""
        self.consumer.wake()

    def _turns_ahead(self) -> int:
        """Return how many requests may be read while tenants take turns."""
        requests = self.consumer.requests
        waiting = sum(pending.timeline.scheduled is None and not pending.lacking for pending in requests)
        ahead = turns_ahead(self._max_num_seqs) if self._max_num_seqs >= 8 else 0
        free = self._max_num_seqs + ahead - len(self.consumer) + self._lacking()
        return max(0, min(free, turns_ahead(self._max_num_seqs) - waiting))

    def _lacking(self) -> int:
        """Return the number of requests that wait for embeddings, and should keep no other from being read."""
        return sum(pending.lacking for pending in self.consumer.requests)

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def expire(self) -> None:
        """End requests that are past their deadline. Their gateway, while it lives, cancels them, too."""
        while True:
            for pending in self.consumer.requests:
                if pending.admitted and pending.late(time.time()):
                    self._mailbox.put(Abort(pending.request_id, Finish("error", failure=LATE)))
            await asyncio.sleep(DEADLINES_EVERY_S)

    async def admit(self) -> None:
        """Turn deliveries into sequences. A separate loop: entries already read are admitted after reading stops."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._admit(await self._batches.get()))

    # --------------------------------------------------------------------------------------------- ending requests

    async def finished(self, ends: Seq[End]) -> None:
        """Ack the entries of requests whose Finish is in the tokens stream."""
        ended = []
        for end in ends:
            pending = self.consumer.get(end.request_id)
            if pending is not None and pending.epoch == end.epoch:
                pending.end = end
                ended.append(pending)
        await self._finish(ended)

    async def _finish(self, ended: Seq[PendingRequest]) -> None:
        """Delete uploads, then end the entries: without an entry, no replica would delete them."""
        uploads = await self._uploads(ended)
        if uploads:
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        crash_point("engine.finish.before")
        await self.consumer.finish([pending for pending in ended if pending.poison is None])
        for pending in ended:
            if pending.poison is not None:
                give_up = partial(self._ownership.quarantine, pending.entry_id, pending.poison, pending.request_id)
                await retry_until_available("quarantine", give_up)
        crash_point("engine.finish.after")
        self._release(ended)

    async def _uploads(self, ended: Seq[PendingRequest]) -> list[str]:
        """Return the uploads of requests whose entries this engine owns; the others' may still be needed."""
        with_uploads = [pending for pending in ended if pending.uploads]
        if not with_uploads:
            return []
        owned = await retry_until_available(
            "owned", lambda: self._ownership.owned_entries([pending.entry_id for pending in with_uploads])
        )
        return [key for pending in with_uploads if pending.entry_id in owned for key in pending.uploads]

    def _release(self, ended: Seq[PendingRequest]) -> None:
        for pending in self.consumer.release(ended):
            self._record_end(pending, time.time())

    def _record_end(self, pending: PendingRequest, now: float) -> None:
        """Record a request's spans, and its metrics if it was answered to its end."""
        spans.record(self._tracing, pending, now)
        if pending.end is not None:
            fresh = pending.end.generated - pending.timeline.resumed_tokens
            self._metrics.observe_request(spans.durations(pending, now), fresh)

    async def _drop(self, pending: PendingRequest) -> None:
        """End a request that no client waits for and that no engine has begun."""
        uploads = await self._uploads([pending])
        if uploads:
            await retry_until_available("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        crash_point("engine.drop.before")
        await retry_until_available("drop", lambda: self._ownership.drop(pending.entry_id, pending.request_id))
        crash_point("engine.drop.after")
        self._release([pending])

    # --------------------------------------------------------------------------------------------- admission

    async def _admit(self, batch: Seq[PendingRequest]) -> None:
        await self.consumer.ack_replaced(batch)
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

    async def _claim(self, batch: Seq[PendingRequest]) -> dict[str, Record | UnreadableRecord]:
        """Raise the epochs of those requests whose entries this engine owns; return their records, if they have one."""
        entries = [(pending.entry_id, pending.request_id) for pending in batch]
        crash_point("engine.claim.before")
        epochs = await retry_until_available("raise epochs", lambda: self._ownership.raise_epochs(entries))
        crash_point("engine.claim.after")
        for pending in batch:
            pending.epoch = epochs.get(pending.request_id) or 0
            pending.lost = pending.request_id not in epochs
        return await retry_until_available(
            "records", lambda: self._records.get([pending.request_id for pending in batch if pending.epoch])
        )

    async def _admit_one(
        self, pending: PendingRequest, record: Record | UnreadableRecord | None, history: History
    ) -> None:
        if not self.consumer.holds(pending):
            return
        if pending.lost:
            self.consumer.abandon(pending)
        elif isinstance(record, UnreadableRecord):
            _log.error("unreadable record", extra={**pending.log_fields, "reason": record.reason})
            await self._hand_over(pending, History(damaged=True))
        elif (
            history.ended
            or (record is not None and record.finish is not None)
            or (record is None and pending.poison is not None)
        ):
            await self._finish([pending])
        elif record is None or ((record.cancelled or pending.cancelled) and pending.epoch == 1):
            await self._drop(pending)
        else:
            pending.cancelled |= record.cancelled
            if pending.attempts > 1 and history.tokens:
                count = len(history.tokens)
                await retry_until_available(
                    "progress", lambda: self._ownership.record_progress(pending.entry_id, pending.request_id, count)
                )
            await self._hand_over(pending, history)

    async def _hand_over(self, pending: PendingRequest, history: History) -> None:
        """Put a request into the mailbox: to be run, or to be finished with the reason why it is not."""
        command: Add | FinishUnstarted | None
        if pending.cancelled:
            command = _finish_unstarted(pending, history, Finish("cancelled"))
        elif pending.poison is not None:
            command = _finish_unstarted(pending, history, Finish("error", failure=_poison_failure(pending.poison)))
        elif history.damaged:
            command = _finish_unstarted(pending, history, Finish("error", failure=unreadable("the state")))
        else:
            command = await self._build_command(pending, history)
        # The request may have been cancelled or abandoned while its embeddings were loaded.
        if command is None or not self.consumer.holds(pending):
            return
        if pending.cancelled:
            command = _finish_unstarted(pending, history, Finish("cancelled"))
        self._mailbox.put(command)
        pending.admitted = True
        if isinstance(command, Add) and not command.sequence.embeds.complete:
            await self._supply(pending, command.sequence.embeds.stored)

    async def _build_command(self, pending: PendingRequest, history: History) -> Add | FinishUnstarted | None:
        """Return the command for a request; None if it has been sent back to have its embeddings made again."""
        try:
            if pending.late(time.time()):
                raise RequestError(LATE)
            spans = pending.message.spans
            embeds = await self._embeds.load(pending.request_id, spans, wait=self._partial_prompts) if spans else ()
            asked = pending.message.request.sampling.grammar
            grammar = None if asked is None else await self._grammars.begin(asked)
            sequence = _sequence(pending, history, embeds, self._facts, grammar)
            sequence.timeline = pending.timeline
            return Add(sequence)
        except EmbedsGoneError as gone:
            if await self._send_back(pending):
                return None
            refused: RequestError = gone
        except RequestError as error:
            refused = error
        _log.warning("request refused", extra={**pending.log_fields, "why": refused.failure.message})
        return _finish_unstarted(pending, history, Finish("error", failure=refused.failure))

    async def _send_back(self, pending: PendingRequest) -> bool:
        """Send a request back for its embeddings. Returns whether this engine has nothing more to do for it."""
        crash_point("engine.send_back.before")
        outcome = await retry_until_available(
            "send back", lambda: self._ownership.send_back(pending.entry_id, pending.request_id)
        )
        crash_point("engine.send_back.after")
        if outcome == "never":
            return False
        _log.info(
            "request sent back to mm_encoder for its embeddings",
            extra={**pending.log_fields, "outcome": outcome},
        )
        if pending.admitted and self.consumer.holds(pending):
            self._mailbox.put(Forget(pending.request_id))
        self._release([pending])
        return True

    async def _supply(self, pending: PendingRequest, embeds: Seq[Embeds | None]) -> None:
        """Give the model's thread the embeddings that a sequence lacks, as they are stored, until it has all."""
        arrivals = self._embeds.arrivals(pending.request_id, pending.message.spans, embeds)
        pending.lacking = True
        self.consumer.wake()
        try:
            async with aclosing(arrivals):
                async for arrived in arrivals:
                    if not self.consumer.holds(pending):
                        return
                    if arrived:
                        self._mailbox.put(Supply(pending.request_id, arrived))
        except EmbedsGoneError as gone:
            if self.consumer.holds(pending) and not await self._send_back(pending):
                self._abort(pending, gone.failure)
        except RequestError as error:
            self._abort(pending, error.failure)
        finally:
            pending.lacking = False

    def _abort(self, pending: PendingRequest, failure: Failure) -> None:
        """End a request that the model's thread has, if it is in flight."""
        if self.consumer.holds(pending):
            _log.warning("request refused", extra={**pending.log_fields, "why": failure.message})
            self._mailbox.put(Abort(pending.request_id, Finish("error", failure=failure)))


def _sequence(
    pending: PendingRequest,
    history: History,
    embeds: Seq[Embeds | None],
    facts: EngineFacts,
    grammar: GrammarState | None,
) -> Sequence:
    """Build the sequence of a request.

    Raises:
        RequestError: the request is refused; also where its bytes make no sense in a way that nobody checks.
    """
    try:
        return build(pending.message, pending.epoch, history.tokens, embeds, facts, grammar)
    except RequestError:
        raise
    except Exception as error:
        _log.exception("request cannot be built", extra=pending.log_fields)
        raise RequestError(unreadable("the prompt")) from error


def _poison_failure(poison: Poison) -> Failure:
    return internal(f"The request crashed {poison.attempts - 1} engine processes and was aborted.").failure


def _finish_unstarted(pending: PendingRequest, history: History, finish: Finish) -> FinishUnstarted:
    begin = announcement(pending.message, pending.epoch, len(history.tokens))
    return FinishUnstarted(pending.message.request.shard, begin, finish)

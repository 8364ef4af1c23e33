"""Brings work to the engine: takes entries while there is room, claims what dead engines left, makes sequences of
requests, and lets go of an entry when its request has ended.

A request's state on this side is its entry in one dict, from delivery until its Finish is in the stream, or until
nothing need be said of it here: it was dropped, sent back for new embeddings, or is another engine's.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

from redis.asyncio import Redis

from services.engine import spans
from services.engine.emission import End
from services.engine.held import Held, hold
from services.engine.mailbox import Abort, Add, Answer, Forget, Mailbox
from services.engine.media import EmbedsGoneError, check_embeds
from services.engine.metrics import EngineMetrics
from services.engine.resume import History, announcement, recover
from services.engine.sequence import Embeds, EngineFacts, build
from shared.blobs import EMBEDS, MEDIA, Blobs
from shared.crash import reach
from shared.custody import Custody, Poison
from shared.errors import Failure, ProtocolError, RequestError, internal
from shared.keys import Keys
from shared.log import logger
from shared.messages import Cancel, Finish, MediaSpan, Message
from shared.patience import persist
from shared.records import Record, Records
from shared.streams import Delivery, LogReader, WorkStream
from shared.tracing import OFF, Tracing

BLOCK_MS = 1000
CONTROL_PAGE = 100
DEADLINES_EVERY_S = 0.5
LATE = internal("The request's deadline passed before its answer was complete.", "timeout", status=504).failure

_log = logger(__name__)


def waiting_allowance(max_num_seqs: int) -> int:
    """Requests to hold beyond those that can run: their embeddings load and their prompts are checked while they
    wait for a place. More would keep work from replicas that have room now."""
    return max(2, max_num_seqs // 8)


class Inbox:
    """Everything between the `generate` stream and the mailbox of the model's thread."""

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        work: WorkStream,
        custody: Custody,
        blobs: Blobs,
        mailbox: Mailbox,
        facts: EngineFacts,
        capacity: int,
        look_every_s: float,
        metrics: EngineMetrics,
        tracing: Tracing = OFF,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._work = work
        self._custody = custody
        self._records = Records(redis, keys)
        self._blobs = blobs
        self._mailbox = mailbox
        self._facts = facts
        self._capacity = capacity
        self._look_every_s = look_every_s
        self._metrics = metrics
        self._tracing = tracing
        self._control = LogReader(redis, {keys.control(): "$"})
        self._requests: dict[str, Held] = {}
        self._batches: asyncio.Queue[list[Held]] = asyncio.Queue()
        self._changed = asyncio.Condition()
        self._open = False
        self._owed = 0  # entries of dead engines for which nobody had room when we last looked

    @property
    def num_held(self) -> int:
        return len(self._requests)

    async def start(self) -> None:
        """Join the stream, and fix where control begins: what is cancelled before is seen in the records."""
        await persist("join", self._work.join)
        await persist("control", lambda: self._control.read(1, 0))

    def open(self) -> None:
        """From now on work may come, until `close`."""
        self._open = True

    def close(self) -> None:
        self._open = False

    async def empty(self) -> None:
        """Return when no request is held."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests)

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def take(self) -> None:
        """Take new entries as there is room for them that no dead engine's request needs: its client has waited, and
        may have seen half of an answer."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._room > 0 and not self._owed)
            deliveries = await persist("take", lambda: self._work.take(self._room, BLOCK_MS))
            reach("engine.take.after")
            self._hold(deliveries)

    async def look(self) -> None:
        """Take over the entries of dead engines, and notice which of ours are no longer ours."""
        while True:
            ours, poisoned, lost, owed = await persist("look", lambda: self._work.claim_abandoned(self._room))
            reach("engine.look.after")
            async with self._changed:
                for held in [held for held in self._requests.values() if held.entry_id in lost]:
                    self._let_go(held)
                self._owed = owed
                self._changed.notify_all()
            self._hold(ours)
            self._hold(poisoned, poison=True)
            await self._until_next_look()

    async def listen(self) -> None:
        """Honour cancellations."""
        while True:
            for _, _, message in await persist("control", self._read_control):
                if isinstance(message, Cancel):
                    for request_id in message.request_ids:
                        self._cancel(request_id)

    async def expire(self) -> None:
        """End what is past its deadline. The gateway does so too, by cancelling; this is for when it is gone."""
        while True:
            for request_id, held in self._requests.items():
                if held.admitted and held.late(time.time()):
                    self._mailbox.put(Abort(request_id, Finish("error", failure=LATE)))
            await asyncio.sleep(DEADLINES_EVERY_S)

    async def admit(self) -> None:
        """Turn deliveries into sequences. A loop of its own, so that what was taken is admitted when taking stops."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._admit(await self._batches.get()))

    async def _until_next_look(self) -> None:
        """At once when there is room for what had none."""
        if not self._owed:
            await asyncio.sleep(self._look_every_s)
            return
        try:
            async with asyncio.timeout(self._look_every_s), self._changed:
                await self._changed.wait_for(lambda: self._room > 0)
        except TimeoutError:
            pass

    # -------------------------------------------------------------------------------------- ways in and out

    @property
    def _room(self) -> int:
        return max(0, self._capacity - len(self._requests)) if self._open else 0

    def _hold(self, deliveries: Sequence[Delivery], poison: bool = False) -> None:
        """What is delivered counts, whatever we have of the request: we may have lost that without knowing it."""
        fresh = [hold(delivery, poison) for delivery in deliveries]
        for held in fresh:
            before = self._requests.pop(held.request_id, None)
            if before is not None:
                held.replaces = before.entry_id
                self._mailbox.put(Forget(held.request_id))
            self._requests[held.request_id] = held
        if fresh:
            self._batches.put_nowait(fresh)

    async def finished(self, ends: Sequence[End]) -> None:
        """These requests' Finish is in the stream: let go of their entries."""
        ended = []
        for end in ends:
            held = self._requests.get(end.request_id)
            if held is not None and held.epoch == end.epoch:
                held.end = end
                ended.append(held)
        await self._finish(ended)

    async def _finish(self, ended: Sequence[Held]) -> None:
        """Uploads first: of an entry that is gone, nobody would look for them."""
        uploads = await self._uploads(ended)
        if uploads:
            await persist("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        reach("engine.finish.before")
        plain = [held.entry_id for held in ended if held.poison is None]
        await persist("finish", lambda: self._work.finish(plain))
        for held in ended:
            if held.poison is not None:
                await persist("quarantine", partial(self._custody.quarantine, held.entry_id, held.poison))
        reach("engine.finish.after")
        await self._release(ended)

    async def _uploads(self, ended: Sequence[Held]) -> list[str]:
        """The uploads of requests that are still ours; another engine may yet need those of the others."""
        shown = [held for held in ended if held.uploads]
        if not shown:
            return []
        ours = await persist("owned", lambda: self._custody.owned([held.entry_id for held in shown]))
        return [key for held in shown if held.entry_id in ours for key in held.uploads]

    async def _release(self, gone: Sequence[Held]) -> None:
        async with self._changed:
            for held in gone:
                if self._requests.get(held.request_id) is held:
                    del self._requests[held.request_id]
                    self._note(held, time.time())
            self._changed.notify_all()

    def _note(self, held: Held, now: float) -> None:
        spans.record(self._tracing, held, now)
        if held.end is not None:
            fresh = held.end.generated - held.timeline.resumed_tokens
            self._metrics.ended(spans.durations(held, now), fresh)

    def _let_go(self, held: Held) -> None:
        """Forget what is no longer ours, and stop computing it."""
        _log.warning("no longer ours", extra={"request_id": held.request_id, "entry": held.entry_id})
        del self._requests[held.request_id]
        self._mailbox.put(Forget(held.request_id))
        spans.record(self._tracing, held, time.time(), spans.LOST)

    async def _drop(self, held: Held) -> None:
        """End a request that nobody waits for and of which nothing was ever said."""
        uploads = await self._uploads([held])
        if uploads:
            await persist("uploads", lambda: self._blobs.delete(MEDIA, uploads))
        reach("engine.drop.before")
        await persist("drop", lambda: self._custody.drop(held.entry_id, held.request_id))
        reach("engine.drop.after")
        await self._release([held])

    def _cancel(self, request_id: str) -> None:
        held = self._requests.get(request_id)
        if held is None:
            return
        held.cancelled = True
        if held.admitted:
            self._mailbox.put(Abort(request_id, Finish("cancelled")))

    # --------------------------------------------------------------------------------------------- admission

    async def _admit(self, batch: list[Held]) -> None:
        replaced = [held.replaces for held in batch if held.replaces not in (None, held.entry_id)]
        await persist("finish", lambda: self._work.finish([entry_id for entry_id in replaced if entry_id]))
        records = await self._claim(batch)
        again = {held.request_id: (held.message, held.epoch) for held in batch if held.epoch > 1}
        histories = await persist("resume", lambda: recover(self._redis, self._keys, self._records, again))
        await asyncio.gather(
            *(
                self._admit_one(held, records.get(held.request_id), histories.get(held.request_id, History()))
                for held in batch
            )
        )

    async def _claim(self, batch: Sequence[Held]) -> dict[str, Record]:
        """Become the owner of these requests, as far as their entries are ours; their records, where there are any."""
        entries = [(held.entry_id, held.request_id) for held in batch]
        reach("engine.claim.before")
        epochs = await persist("claim", lambda: self._custody.claim(entries))
        reach("engine.claim.after")
        for held in batch:
            held.epoch = epochs.get(held.request_id) or 0
            held.lost = held.request_id not in epochs
        return await persist("claim", lambda: self._records.get([held.request_id for held in batch if held.epoch]))

    async def _admit_one(self, held: Held, record: Record | None, history: History) -> None:
        if self._requests.get(held.request_id) is not held:
            return
        over = history.ended or (record is not None and record.finish is not None)
        if held.lost:
            self._let_go(held)
        elif over or (record is None and held.poison is not None):
            await self._finish([held])
        elif record is None or ((record.cancelled or held.cancelled) and held.epoch == 1):
            await self._drop(held)
        else:
            held.cancelled |= record.cancelled
            if held.attempts > 1 and history.tokens:
                count = len(history.tokens)
                await persist("progress", lambda: self._custody.progressed(held.entry_id, held.request_id, count))
            await self._give(held, history)

    async def _give(self, held: Held, history: History) -> None:
        """Give the request to the model, or the reason why not to whoever waits for it."""
        command: Add | Answer | None
        if held.cancelled:
            command = _answer(held, history, Finish("cancelled"))
        elif held.poison is not None:
            command = _answer(held, history, Finish("error", failure=_deadly(held.poison)))
        else:
            command = await self._command(held, history)
        # Much may have happened while embeddings were loaded.
        if command is None or self._requests.get(held.request_id) is not held:
            return
        if held.cancelled:
            command = _answer(held, history, Finish("cancelled"))
        self._mailbox.put(command)
        held.admitted = True

    async def _command(self, held: Held, history: History) -> Add | Answer | None:
        """None: the request has been sent back to have its embeddings made again."""
        try:
            if held.late(time.time()):
                raise RequestError(LATE)
            embeds = await self._embeds(held.message.spans)
            sequence = build(held.message, held.epoch, history.tokens, embeds, self._facts)
            sequence.timeline = held.timeline
            return Add(sequence)
        except EmbedsGoneError as gone:
            if await self._send_back(held):
                return None
            refused: RequestError = gone
        except RequestError as error:
            refused = error
        _log.warning("request refused", extra={"request_id": held.request_id, "why": refused.failure.message})
        return _answer(held, history, Finish("error", failure=refused.failure))

    async def _send_back(self, held: Held) -> bool:
        """Whether the request is someone else's affair now."""
        reach("engine.send_back.before")
        outcome = await persist("send back", lambda: self._custody.send_back(held.entry_id, held.request_id))
        reach("engine.send_back.after")
        if outcome == "never":
            return False
        _log.info("sent back for its embeddings", extra={"request_id": held.request_id, "outcome": outcome})
        await self._release([held])
        return True

    async def _embeds(self, spans: tuple[MediaSpan, ...]) -> tuple[Embeds, ...]:
        """
        Raises:
            RequestError: a blob is gone, or is not what the span says (5xx).
        """
        keys = list(dict.fromkeys(span.key for span in spans))
        found = await asyncio.gather(*(persist("blobs", partial(self._blobs.get, EMBEDS, key)) for key in keys))
        stored = dict(zip(keys, found, strict=True))
        return tuple(check_embeds(span, stored[span.key], self._facts.model.hidden_size) for span in spans)

    async def _read_control(self) -> list[tuple[str, str, Message]]:
        try:
            return await self._control.read(CONTROL_PAGE, BLOCK_MS)
        except ProtocolError as unreadable:
            _log.warning("unreadable entry in control", extra={"error": str(unreadable)})
            return []


def _deadly(poison: Poison) -> Failure:
    return internal(f"The request ended {poison.attempts - 1} engines before it ended itself.").failure


def _answer(held: Held, history: History, finish: Finish) -> Answer:
    begin = announcement(held.message, held.epoch, len(history.tokens))
    return Answer(held.message.request.shard, begin, finish)

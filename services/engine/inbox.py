"""Brings work to the engine: takes entries while there is room, claims what dead engines left, makes sequences of
requests, and lets go of an entry when its request has ended.

A request's state on this side is its entry in one dict, from delivery until its Finish is in the stream or it was
dropped; `finished` and `_drop` are the only ways out.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import msgspec
from redis.asyncio import Redis

from services.engine.mailbox import Abort, Add, Answer, Mailbox
from services.engine.patience import persist
from services.engine.resume import History, recover
from services.engine.step import EMBED_DTYPES
from services.engine.sequence import Embeds, EngineFacts, build
from shared.blobs import Blobs
from shared.errors import ProtocolError, RequestError, internal
from shared.keys import Keys
from shared.log import logger
from shared.messages import Begin, Cancel, Finish, Generate, MediaSpan, Message, unpack_ids
from shared.records import Record, Records
from shared.streams import Delivery, LogReader, WorkStream

BLOCK_MS = 1000
CONTROL_PAGE = 100

_log = logger(__name__)


class EmbedsMeta(msgspec.Struct, frozen=True):
    """What the encoder says of a blob of embeddings."""

    grid: tuple[int, int, int]
    rows: int
    hidden: int
    dtype: str


@dataclass(slots=True)
class Held:
    """An entry of ours. `admitted`: the model's thread has the request. `cancelled`: nobody waits for it."""

    entry_id: str
    admitted: bool = False
    cancelled: bool = False


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
        blobs: Blobs,
        mailbox: Mailbox,
        facts: EngineFacts,
        capacity: int,
        claim_every_s: float,
    ) -> None:
        self._redis = redis
        self._keys = keys
        self._work = work
        self._records = Records(redis, keys)
        self._blobs = blobs
        self._mailbox = mailbox
        self._facts = facts
        self._capacity = capacity
        self._claim_every_s = claim_every_s
        self._control = LogReader(redis, {keys.control(): "$"})
        self._requests: dict[str, Held] = {}
        self._batches: asyncio.Queue[list[Delivery]] = asyncio.Queue()
        self._changed = asyncio.Condition()

    @property
    def num_held(self) -> int:
        return len(self._requests)

    async def start(self) -> None:
        """Join the stream, and fix where control begins: what is cancelled before is seen in the records."""
        await self._work.join()
        await self._control.read(1, 0)

    async def empty(self) -> None:
        """Return when no request is held."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests)

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def take(self) -> None:
        """Take new entries as there is room for them."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._room > 0)
            await self._hold(await persist("take", lambda: self._work.take(self._room, BLOCK_MS)))

    async def reclaim(self) -> None:
        """Take over the entries of dead engines, at once and then every lease interval."""
        while True:
            ours, poisoned = await persist("claim", lambda: self._work.claim_abandoned(self._room))
            await self._hold(ours)
            await asyncio.gather(*map(self._answer_poisoned, poisoned))
            await asyncio.sleep(self._claim_every_s)

    async def listen(self) -> None:
        """Honour cancellations."""
        while True:
            for _, _, message in await persist("control", self._read_control):
                if isinstance(message, Cancel):
                    for request_id in message.request_ids:
                        self._cancel(request_id)

    async def admit(self) -> None:
        """Turn deliveries into sequences. A loop of its own, so that what was taken is admitted when taking stops."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                tasks.create_task(self._admit(await self._batches.get()))

    # -------------------------------------------------------------------------------------- ways in and out

    @property
    def _room(self) -> int:
        return max(0, self._capacity - len(self._requests))

    async def _hold(self, deliveries: list[Delivery]) -> None:
        fresh: list[Delivery] = []
        doubles: list[Delivery] = []
        for delivery in deliveries:
            # A gateway whose connection broke may have submitted the same request twice.
            double = delivery.message.request.id in self._requests
            (doubles if double else fresh).append(delivery)
            if not double:
                self._requests[delivery.message.request.id] = Held(delivery.entry_id)
        if fresh:
            self._batches.put_nowait(fresh)
        await persist("finish", lambda: self._work.finish([delivery.entry_id for delivery in doubles]))

    async def finished(self, request_ids: Iterable[str]) -> None:
        """These requests' Finish is in the stream: let go of their entries."""
        held = {request_id: self._requests[request_id] for request_id in request_ids if request_id in self._requests}
        await persist("finish", lambda: self._work.finish([entry.entry_id for entry in held.values()]))
        async with self._changed:
            for request_id in held:
                del self._requests[request_id]
            self._changed.notify_all()

    async def _drop(self, request_id: str) -> None:
        """Forget a request that nobody waits for and of which nothing was ever said."""
        await persist("delete", lambda: self._records.delete([request_id]))
        await self.finished([request_id])

    def _cancel(self, request_id: str) -> None:
        held = self._requests.get(request_id)
        if held is None:
            return
        held.cancelled = True
        if held.admitted:
            self._mailbox.put(Abort(request_id))

    # --------------------------------------------------------------------------------------------- admission

    async def _admit(self, deliveries: list[Delivery]) -> None:
        claimed = [(delivery.message, await self._claim(delivery)) for delivery in deliveries]
        histories = await self._histories([record for _, record in claimed if record is not None])
        await asyncio.gather(
            *(
                self._admit_one(message, record, histories.get(message.request.id, History()))
                for message, record in claimed
                if isinstance(message, Generate)
            )
        )

    async def _admit_one(self, message: Generate, record: Record | None, history: History) -> None:
        request_id = message.request.id
        held = self._requests[request_id]
        if history.ended:
            await self.finished([request_id])
        elif record is None or ((record.cancelled or held.cancelled) and record.epoch == 1):
            await self._drop(request_id)
        else:
            held.cancelled |= record.cancelled
            command = await self._command(message, record.epoch, history)
            if held.cancelled:
                command = _answer(message, record.epoch, history, Finish("cancelled"))
            self._mailbox.put(command)
            held.admitted = True

    async def _claim(self, delivery: Delivery) -> Record | None:
        return await persist("claim", lambda: self._records.claim(delivery.message.request.id))

    async def _histories(self, records: list[Record]) -> dict[str, History]:
        """Of the requests that someone has owned before us; the others have none."""
        again = [record.request for record in records if record.epoch > 1]
        return await persist("resume", lambda: recover(self._redis, self._keys, self._records, again))

    async def _command(self, message: Generate, epoch: int, history: History) -> Add | Answer:
        try:
            _check_deadline(message)
            embeds = await self._embeds(message.spans)
            return Add(build(message, epoch, history.tokens, embeds, self._facts))
        except RequestError as refused:
            _log.warning("request refused", extra={"request_id": message.request.id, "why": refused.failure.message})
            return _answer(message, epoch, history, Finish("error", failure=refused.failure))

    async def _answer_poisoned(self, delivery: Delivery) -> None:
        """The entry is in the quarantine already; what is left is to tell whoever waits."""
        message = delivery.message
        record = await self._claim(delivery)
        if record is None or not isinstance(message, Generate):
            return
        histories = await self._histories([record])
        history = histories.get(message.request.id, History())
        if not history.ended:
            failure = internal(f"The request ended {delivery.attempts - 1} engines before it ended itself.").failure
            self._mailbox.put(_answer(message, record.epoch, history, Finish("error", failure=failure)))

    async def _embeds(self, spans: tuple[MediaSpan, ...]) -> tuple[Embeds, ...]:
        """
        Raises:
            RequestError: a blob is gone, or is not what the span says (5xx).
        """
        keys = list(dict.fromkeys(span.key for span in spans))
        found = await asyncio.gather(*(persist("blobs", partial(self._blobs.get, "embeds", key)) for key in keys))
        stored = dict(zip(keys, found, strict=True))
        return tuple(check_embeds(span, stored[span.key], self._facts.model.hidden_size) for span in spans)

    async def _read_control(self) -> list[tuple[str, str, Message]]:
        try:
            return await self._control.read(CONTROL_PAGE, BLOCK_MS)
        except ProtocolError as unreadable:
            _log.warning("unreadable entry in control", extra={"error": str(unreadable)})
            return []


def check_embeds(span: MediaSpan, stored: tuple[bytes, bytes] | None, hidden_size: int) -> Embeds:
    """The embeddings of a span.

    Raises:
        RequestError: they are gone (503: they can be made again), or not what the span says (500).
    """
    if stored is None:
        raise internal(
            f"The embeddings of the {span.kind} at token {span.offset} are no longer stored. Send the request again.",
            status=503,
        )
    data, meta_json = stored
    try:
        meta = msgspec.json.decode(meta_json, type=EmbedsMeta)
    except msgspec.MsgspecError as unreadable:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are unreadable.") from unreadable
    expected = EmbedsMeta(span.grid, span.length, hidden_size, meta.dtype)
    if meta != expected or meta.dtype not in EMBED_DTYPES:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are {meta}; expected {expected}.")
    if len(data) != meta.rows * meta.hidden * EMBED_DTYPES[meta.dtype].itemsize:
        raise internal(f"The embeddings of the {span.kind} at token {span.offset} are {len(data)} bytes for {meta}.")
    return Embeds(data, meta.dtype)


def _check_deadline(message: Generate) -> None:
    """The gateway cancels what is late; this is for when it is gone.

    Raises:
        RequestError: the time is over (504).
    """
    deadline = message.request.deadline
    if deadline is not None and time.time() > deadline:
        raise internal("The request's deadline passed before the model could begin.", "timeout", status=504)


def _answer(message: Generate, epoch: int, history: History, finish: Finish) -> Answer:
    begin = Begin(message.request.id, epoch, len(history.tokens), len(unpack_ids(message.prompt)), 0, 0, 0)
    return Answer(message.request.shard, begin, finish)

"""Consumer of a work stream: the loops that take entries, take over those of dead replicas, and notice which are lost.

Both services that take work, mm_encoder and engine, give it a handler that does the work. The state of a request is one
value of the handler's type in one dict, from the delivery of its entry until the handler releases it or the entry turns
out to be another replica's. At-least-once delivery: an entry may come again while its request is in hand, because this
replica lost it to another without knowing. The newest delivery counts; the older one is abandoned.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Generic, Protocol, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.keys import Keys
from shared.bus.ownership import Poison
from shared.bus.retry import retry_until_available
from shared.bus.streams import Delivery, LogReader, WorkStream
from shared.crash_points import crash_point
from shared.errors import ProtocolError
from shared.log import logger
from shared.messages import Cancel, Message

BLOCK_MS = 1000  # the longest wait of one read
CONTROL_PAGE = 100  # control messages read at once

_log = logger(__name__)


class InHand(Protocol):
    """State of one delivered request, as far as the consumer looks at it."""

    entry_id: str
    replaces: str | None  # the entry under which the same request was in hand before

    @property
    def request_id(self) -> str: ...


R = TypeVar("R", bound=InHand)


class Handler(Protocol[R]):
    """Work of a service on the requests that its consumer takes. No method waits."""

    def receive(self, delivery: Delivery, poison: Poison | None) -> R:
        """Return the state of a request that was delivered; with `poison` it is only to be answered."""

    def start(self, requests: Sequence[R]) -> None:
        """Begin to work on requests that are in hand now."""

    def abandon(self, request: R) -> None:
        """Stop working on a request that is not in hand any more: its entry is another's, or came again."""

    def cancel(self, request: R) -> None:
        """Stop working on a request that nobody waits for, and end it."""

    def hear(self, message: Message) -> None:
        """Take note of a control message other than Cancel."""


class Consumer(Generic[R]):
    """One replica's requests in hand, and the loops that bring and remove them.

    `capacity` is the most requests in hand at once. Entries of dead replicas are looked for every `claim_every_s`, and
    come before new ones: their clients have waited, and may have seen half of an answer.
    """

    def __init__(
        self,
        redis: Redis,
        keys: Keys,
        service: str,
        stream: WorkStream,
        handler: Handler[R],
        capacity: int,
        claim_every_s: float,
    ) -> None:
        self._service = service
        self._stream = stream
        self._handler = handler
        self._capacity = capacity
        self._claim_every_s = claim_every_s
        self._control = LogReader(redis, {keys.control(): "$"})
        self._requests: dict[str, R] = {}
        self._changed = asyncio.Condition()
        self._open = False
        self._unclaimed = 0  # entries of dead replicas for which there was no room at the last look

    def __len__(self) -> int:
        """Return the number of requests in hand."""
        return len(self._requests)

    @property
    def requests(self) -> Iterable[R]:
        """The requests in hand; not to be iterated over an await."""
        return self._requests.values()

    @property
    def room(self) -> int:
        """The number of requests that may be taken now."""
        return max(0, self._capacity - len(self._requests)) if self._open else 0

    def holds(self, request: R) -> bool:
        """Return whether this very delivery is in hand."""
        return self._requests.get(request.request_id) is request

    def get(self, request_id: str) -> R | None:
        """Return the request of this id, if it is in hand."""
        return self._requests.get(request_id)

    # ------------------------------------------------------------------------------------------------- life cycle

    async def join(self) -> None:
        """Join the consumer group, and fix where control begins: an earlier Cancel stands in the records."""
        await retry_until_available("join", self._stream.join)
        await retry_until_available("control", lambda: self._control.read(1, 0))

    def open(self) -> None:
        """Allow work to be taken, until `close`."""
        self._open = True

    def close(self) -> None:
        """Take nothing more."""
        self._open = False

    async def empty(self) -> None:
        """Return when no request is in hand."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._requests)

    async def leave(self) -> None:
        """Delete this replica's consumer; its entries are others' as soon as its lease is released."""
        try:
            await self._stream.leave()
        except RedisError as error:
            _log.warning("consumer not deleted; other replicas delete it", extra={"reason": str(error)})

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def take(self) -> None:
        """Take new entries while there is room that no entry of a dead replica needs."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.room > 0 and not self._unclaimed)
            deliveries = await retry_until_available("take", lambda: self._stream.take(self.room, BLOCK_MS))
            crash_point(f"{self._service}.take.after")
            self._receive([(delivery, None) for delivery in deliveries])

    async def claim(self) -> None:
        """Take over the entries of dead replicas, and abandon requests whose entries are no longer ours."""
        while True:
            look = await retry_until_available("claim", lambda: self._stream.claim_abandoned(self.room))
            crash_point(f"{self._service}.look.after")
            self._lose([request for request in self._requests.values() if request.entry_id in look.lost])
            self._receive([(delivery, None) for delivery in look.ours])
            self._receive([(delivery, _poison(delivery)) for delivery in look.poisoned])
            async with self._changed:
                self._unclaimed = look.left
                self._changed.notify_all()
            await self._until_next_claim()

    async def listen(self) -> None:
        """Pass on what the control stream says."""
        while True:
            for message in await retry_until_available("control", self._read_control):
                if not isinstance(message, Cancel):
                    self._handler.hear(message)
                    continue
                for request_id in message.request_ids:
                    if (request := self._requests.get(request_id)) is not None:
                        self._handler.cancel(request)

    # ------------------------------------------------------------------------------------------- the handler's side

    async def finish(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete entries whose work has ended, as far as they are still ours."""
        await retry_until_available("finish", lambda: self._stream.finish(entry_ids))

    async def finish_replaced(self, requests: Sequence[R]) -> None:
        """Ack and delete the entries under which these requests were in hand before."""
        replaced = [request.replaces for request in requests if request.replaces not in (None, request.entry_id)]
        await self.finish([entry_id for entry_id in replaced if entry_id])

    async def release(self, requests: Sequence[R]) -> list[R]:
        """Forget requests that have ended here; return those that were still in hand."""
        async with self._changed:
            released = [request for request in requests if self.holds(request)]
            for request in released:
                del self._requests[request.request_id]
            self._changed.notify_all()
        return released

    async def lose(self, request: R) -> None:
        """Forget and abandon a request whose entry turned out to be another replica's."""
        async with self._changed:
            self._lose([request])
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------------ inside

    def _receive(self, deliveries: Sequence[tuple[Delivery, Poison | None]]) -> None:
        requests = [self._handler.receive(delivery, poison) for delivery, poison in deliveries]
        for request in requests:
            if (before := self._requests.pop(request.request_id, None)) is not None:
                request.replaces = before.entry_id
                self._handler.abandon(before)
            self._requests[request.request_id] = request
        if requests:
            self._handler.start(requests)

    def _lose(self, requests: Sequence[R]) -> None:
        for request in requests:
            _log.warning(
                "entry belongs to another replica now; its request is abandoned here",
                extra={"request_id": request.request_id, "entry": request.entry_id},
            )
            del self._requests[request.request_id]
            self._handler.abandon(request)

    async def _until_next_claim(self) -> None:
        """Wait for the next look, which comes at once when there is room for entries that had none."""
        if not self._unclaimed:
            await asyncio.sleep(self._claim_every_s)
            return
        try:
            async with asyncio.timeout(self._claim_every_s), self._changed:
                await self._changed.wait_for(lambda: self.room > 0)
        except TimeoutError:
            pass

    async def _read_control(self) -> list[Message]:
        try:
            return [message for _, _, message in await self._control.read(CONTROL_PAGE, BLOCK_MS)]
        except ProtocolError as error:
            _log.warning("unreadable control entry skipped", extra={"reason": str(error)})
            return []


def _poison(delivery: Delivery) -> Poison:
    return Poison(delivery.attempts, f"delivered {delivery.attempts} times")

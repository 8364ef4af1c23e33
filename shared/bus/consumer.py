"""Consumer of a work stream: loops that read new entries, claim those of dead replicas, and notice which were lost.

mm_encoder and engine each give it a handler that does the work. A request is in flight from the delivery of its entry
until the handler releases it or the entry turns out to belong to another replica; its state is one value of the
handler's type in one dict. Delivery is at least once: an entry may be delivered again while its request is in flight,
after this replica lost it to another without noticing. The newest delivery counts; the older one is abandoned.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.bus.keys import Keys
from shared.bus.ownership import Ended, Poison
from shared.bus.retry import retry_until_available
from shared.bus.streams import LogReader
from shared.bus.work_stream import Delivery, WorkStream
from shared.crash_points import crash_point
from shared.log import logger
from shared.messages import Cancel, Message

BLOCK_MS = 1000  # the longest wait of one read
CONTROL_PAGE = 100  # control messages read at once

_log = logger(__name__)


class InFlight(Protocol):
    """State of one delivered request, as far as the consumer needs it."""

    entry_id: str
    replaces: str | None  # the entry under which the same request was in flight before

    @property
    def request_id(self) -> str: ...

    @property
    def tokens(self) -> int | None:
        """Tokens of its answer, once it has ended; None if no tenant is charged for them."""


R = TypeVar("R", bound=InFlight)


class Handler(Protocol[R]):
    """Work of a service on the requests that its consumer reads. No method waits."""

    def new_request(self, delivery: Delivery, poison: Poison | None) -> R:
        """Return the state of a request that was delivered; with `poison` it is to be failed without any work."""

    def start(self, requests: Sequence[R]) -> None:
        """Begin to work on requests that are in flight now."""

    def abandon(self, request: R) -> None:
        """Stop working on a request that is no longer in flight: another replica owns its entry, or it came again."""

    def cancel(self, request: R) -> None:
        """Stop working on a request that no client waits for, and end it."""

    def on_control(self, message: Message) -> None:
        """Process a control message other than Cancel."""


class Consumer(Generic[R]):
    """One replica's requests in flight, and the loops that add and remove them.

    `capacity` is the most requests in flight at once. Every `claim_every_s` the consumer looks for entries of dead
    replicas. They come before new ones: their clients have waited, and may have seen half of an answer.
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
        turns_ahead: Callable[[], int] | None = None,
        aside: Callable[[], int] = lambda: 0,
    ) -> None:
        """
        Args:
            turns_ahead: the number of entries to read now while tenants wait for their turns; None: all that fit.
            aside: the number of requests in flight that take no place of `capacity` now.
        """
        self._service = service
        self._stream = stream
        self._handler = handler
        self._capacity = capacity
        self._claim_every_s = claim_every_s
        self._turns_ahead = turns_ahead
        self._aside = aside
        # A read reserves all free slots while it waits, so it must not wait longer than entries of the dead should.
        self._block_ms = max(1, min(BLOCK_MS, int(claim_every_s * 1000)))
        self._control = LogReader(redis, {keys.control(): "$"})
        self._requests: dict[str, R] = {}
        self._changed = asyncio.Event()
        self._reading = False
        self._reserved = 0  # slots for the entries that the read under way may bring
        self._unclaimed = 0  # claimable entries for which the last claim had no slot

    def __len__(self) -> int:
        """Return the number of requests in flight."""
        return len(self._requests)

    @property
    def requests(self) -> Iterable[R]:
        """The requests in flight; not to be iterated over an await."""
        return self._requests.values()

    @property
    def idle(self) -> bool:
        """True if new requests are wanted and none is in flight."""
        return self._reading and not self._requests

    @property
    def free_slots(self) -> int:
        """The number of entries that may be read or claimed now."""
        taken = len(self._requests) - self._aside() + self._reserved
        return max(0, self._capacity - taken) if self._reading else 0

    @property
    def _readable(self) -> int:
        """The number of new entries that may be read now. What is read ahead of its time is out of turn."""
        free = self.free_slots
        return min(free, self._turns_ahead()) if self._turns_ahead is not None and self._stream.takes_turns else free

    def wake(self) -> None:
        """Look again whether entries may be read: something has begun."""
        self._changed.set()

    def holds(self, request: R) -> bool:
        """Return whether this very delivery is in flight."""
        return self._requests.get(request.request_id) is request

    def get(self, request_id: str) -> R | None:
        """Return the request of this id, if it is in flight."""
        return self._requests.get(request_id)

    # ------------------------------------------------------------------------------------------------- life cycle

    async def join(self) -> None:
        """Join the consumer group, and fix the start of the control stream: records keep earlier cancellations."""
        await retry_until_available("join", self._stream.join)
        await retry_until_available("control", self._control.pin)

    def start_reading(self) -> None:
        """Allow entries to be read and claimed, until `stop_reading`."""
        self._reading = True
        self._changed.set()

    def stop_reading(self) -> None:
        """Read and claim nothing more."""
        self._reading = False

    async def wait_until_empty(self) -> None:
        """Return when no request is in flight."""
        await self._until(lambda: not self._requests)

    async def leave(self) -> None:
        """Delete this replica's consumer; other replicas claim its entries as soon as its lease is released."""
        try:
            await self._stream.leave()
        except RedisError as error:
            _log.warning("consumer not deleted; other replicas will delete it", extra={"reason": str(error)})

    # ------------------------------------------------------------------------------- loops, each until cancelled

    async def read_entries(self) -> None:
        """Read new entries while there are free slots that no entry of a dead replica needs."""
        while True:
            await self._until(lambda: self._readable > 0 and not self._unclaimed)
            self._reserved = self._readable
            read = partial(self._stream.read_new, self._reserved, self._block_ms)
            try:
                deliveries = await retry_until_available("read", read)
            finally:
                self._reserved = 0
                self._changed.set()
            crash_point(f"{self._service}.take.after")
            self._receive([(delivery, None) for delivery in deliveries])

    async def claim_entries(self) -> None:
        """Claim the entries of dead replicas, and abandon requests whose entries this replica no longer owns."""
        while True:
            found = await retry_until_available("claim", lambda: self._stream.claim_abandoned(self.free_slots))
            crash_point(f"{self._service}.look.after")
            for request in [each for each in self._requests.values() if each.entry_id in found.lost]:
                self.abandon(request)
            self._receive([(delivery, None) for delivery in found.claimed])
            self._receive([(delivery, _poison(delivery)) for delivery in found.poisoned])
            self._unclaimed = found.left
            self._changed.set()
            await self._until_next_claim()

    async def listen_control(self) -> None:
        """Pass the messages of the control stream to the handler."""
        while True:
            for message in await retry_until_available("control", self._read_control):
                if not isinstance(message, Cancel):
                    self._handler.on_control(message)
                    continue
                for request_id in message.request_ids:
                    if (request := self._requests.get(request_id)) is not None:
                        self._handler.cancel(request)

    # ------------------------------------------------------------------------------------------- the handler's side

    async def ack(self, entry_ids: Sequence[str]) -> None:
        """Ack and delete entries whose work has ended, as far as this replica still owns them."""
        await retry_until_available("ack", lambda: self._stream.ack(entry_ids))

    async def finish(self, requests: Sequence[R]) -> None:
        """The same for requests whose last word is in the tokens stream; their records note that it is."""
        entries = [Ended(request.entry_id, request.request_id, request.tokens) for request in requests]
        await retry_until_available("finish", lambda: self._stream.finish(entries))

    async def ack_replaced(self, requests: Sequence[R]) -> None:
        """Ack and delete the entries under which these requests were in flight before."""
        pairs = [(request.replaces, request.entry_id) for request in requests]
        await self.ack([before for before, now in pairs if before is not None and before != now])

    def release(self, requests: Sequence[R]) -> list[R]:
        """Remove requests that have ended here; return those that were still in flight."""
        released = [request for request in requests if self.holds(request)]
        for request in released:
            del self._requests[request.request_id]
        self._changed.set()
        return released

    def abandon(self, request: R) -> None:
        """Remove and abandon a request whose entry turned out to belong to another replica, if it is in flight."""
        if not self.release([request]):
            return
        _log.warning(
            "entry now belongs to another replica; its request is abandoned here",
            extra={"request_id": request.request_id, "entry": request.entry_id},
        )
        self._handler.abandon(request)

    # ------------------------------------------------------------------------------------------------------ inside

    def _receive(self, deliveries: Sequence[tuple[Delivery, Poison | None]]) -> None:
        requests = [self._handler.new_request(delivery, poison) for delivery, poison in deliveries]
        for request in requests:
            if (before := self._requests.pop(request.request_id, None)) is not None:
                request.replaces = before.entry_id
                self._handler.abandon(before)
            self._requests[request.request_id] = request
        if requests:
            self._handler.start(requests)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Return when `holds` does. Nothing runs between its last evaluation and the return."""
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    async def _until_next_claim(self) -> None:
        """Wait for the time of the next claim, which comes at once when a slot is free for an unclaimed entry."""
        if not self._unclaimed:
            await asyncio.sleep(self._claim_every_s)
            return
        try:
            async with asyncio.timeout(self._claim_every_s):
                await self._until(lambda: self.free_slots > 0)
        except TimeoutError:
            pass

    async def _read_control(self) -> list[Message]:
        return [message for _, _, message in await self._control.read(CONTROL_PAGE, BLOCK_MS)]


def _poison(delivery: Delivery) -> Poison:
    return Poison(delivery.attempts, f"delivered {delivery.attempts} times")

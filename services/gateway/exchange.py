"""One HTTP request that is being answered: what has come back for it, and what the client has not been given yet."""

import asyncio

from services.gateway.order import Order
from shared.errors import Failure
from shared.messages import Delta, Usage


class Choice:
    """One of the answers asked for: a request of its own to every other stage."""

    __slots__ = ("ended", "exchange", "index", "request_id", "seq", "submitted", "usage")

    def __init__(self, exchange: "Exchange", index: int) -> None:
        self.exchange = exchange
        self.index = index
        self.request_id = exchange.id if index == 0 else f"{exchange.id}-{index}"
        self.seq = 0  # of the last delta taken in; what is not above it has been shown
        self.submitted = False  # other stages know of it
        self.ended = False  # they have finished with it
        self.usage: Usage | None = None


class Exchange:
    """The request's state. It is filled by the inbox and emptied by the one task that writes to the client."""

    def __init__(self, request_id: str, order: Order, created: float, deadline: float, max_pending: int) -> None:
        """`created` and `deadline` are unix seconds; `max_pending` bounds what a client that does not read may owe."""
        self.id = request_id
        self.order = order
        self.created = created
        self.deadline = deadline
        self.choices = [Choice(self, index) for index in range(order.n)]
        self.failure: Failure | None = None
        self.idle_since = created
        self.started = False  # a token has come
        self.accepted = asyncio.Event()  # the request is known to be good, or to have failed
        self.cut_off = asyncio.Event()  # the client reads too slowly
        self._waiting = set(range(order.n)) if order.media else set()
        self._pending: list[tuple[int, Delta]] = []
        self._pending_size = 0
        self._max_pending = max_pending
        self._wake = asyncio.Event()
        if not self._waiting:
            self.accepted.set()

    @property
    def done(self) -> bool:
        """Nothing more will come, and all that came has been taken."""
        return not self._pending and (self.failure is not None or all(choice.ended for choice in self.choices))

    def accept(self, choice: Choice) -> None:
        """A choice's media are good."""
        self._waiting.discard(choice.index)
        if not self._waiting:
            self.accepted.set()

    def feed(self, choice: Choice, delta: Delta) -> None:
        """Take in what postproc sent, unless it was shown already: a postproc that replaces another sends again."""
        if choice.ended:
            return
        if delta.failure is not None:
            self.fail(choice, delta.failure)
            return
        if delta.seq <= choice.seq:
            return
        choice.seq = delta.seq
        self.accept(choice)
        if delta.finish_reason is not None:
            choice.ended = True
            choice.usage = delta.usage
        self._pending.append((choice.index, delta))
        self._pending_size += _size(delta)
        if self._pending_size > self._max_pending:
            self.cut_off.set()
        self._wake.set()

    def fail(self, choice: Choice | None, failure: Failure) -> None:
        """End the whole request: one choice failed, or (None) the gateway gives up on all of them."""
        if choice is not None:
            choice.ended = True
        if self.failure is None:
            self.failure = failure
        self.accepted.set()
        self._wake.set()

    def poke(self) -> None:
        """Let the writer say that it is still there."""
        self._wake.set()

    async def take(self) -> list[tuple[int, Delta]]:
        """(choice, delta) of all that came since the last call, waiting for it; empty after `fail` or `poke`."""
        if not self._pending and self.failure is None:
            await self._wake.wait()
        self._wake.clear()
        taken, self._pending, self._pending_size = self._pending, [], 0
        return taken


def _size(delta: Delta) -> int:
    """Roughly the bytes a delta will be in a stream beyond its frame; what matters is that nothing large is free."""
    detail = 64 * len(delta.logprobs) * (1 + max((len(one.top) for one in delta.logprobs), default=0))
    calls = sum(len(call.arguments) for call in delta.tool_calls)
    return 64 + len(delta.content) + len(delta.reasoning) + calls + 8 * len(delta.token_ids) + detail

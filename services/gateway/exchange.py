"""One HTTP request that is being answered: what has come back for it, and what the client has not been given yet."""

import asyncio
from collections.abc import Sequence

import msgspec

from services.gateway.form import Form
from shared.errors import Failure
from shared.messages import Delta, Usage


class Place(msgspec.Struct, frozen=True):
    """How much of a choice a client has: all up to delta `seq`, and some events of the next, which ends at `until`."""

    seq: int
    until: int = 0
    events: int = 0


class Choice:
    """One of the answers asked for: a request of its own to every other stage."""

    __slots__ = (
        "asked",
        "ended",
        "exchange",
        "finish_reason",
        "index",
        "looked_at",
        "misses",
        "request_id",
        "seq",
        "submitted",
        "until",
        "usage",
    )

    def __init__(self, exchange: "Exchange", index: int, place: Place, now: float) -> None:
        self.exchange = exchange
        self.index = index
        self.request_id = choice_id(exchange.id, index)
        self.seq = place.seq  # of the last delta taken in; what is not above it has been shown
        self.until = place.until  # where the next has to end, if not 0, for some of it has been shown
        self.submitted = False  # other stages know of it
        self.ended = False  # they have finished with it
        self.asked = False  # for what comes after `seq`, and not answered yet
        self.looked_at = now  # when it last went on, or its record was last looked for
        self.misses = 0  # times in a row that its record was not there
        self.finish_reason: str | None = None  # both with the finish
        self.usage: Usage | None = None


class Exchange:
    """The request's state. It is filled by the inbox and emptied by the one task that writes to the client."""

    def __init__(
        self,
        request_id: str,
        form: Form,
        stream: bool,
        created: float,
        deadline: float,
        max_pending: int,
        now: float,
        *,
        unchecked: bool = False,
        shown: Sequence[Place] | None = None,
    ) -> None:
        """`created`, `deadline` and `now` are unix seconds; `max_pending` bounds what a client that does not read may
        owe. `unchecked`: nothing may be said before the media of every choice are known to be good. `shown` is where a
        stream goes on that the client has the beginning of: a place for each choice."""
        self.id = request_id
        self.form = form
        self.stream = stream
        self.created = created
        self.deadline = deadline
        self.resumed = shown is not None
        self.since = [Place(0)] * form.n if shown is None else list(shown)  # what the client had at first
        self.choices = [Choice(self, index, place, now) for index, place in enumerate(self.since)]
        self.failure: Failure | None = None
        self.idle_since = now  # when a choice last went on, or the client was last told that we live
        self.first_token: float | None = None  # when it came, in unix seconds
        self.announced = False  # the client knows the request's id
        self.rejoined = False  # another connection began it
        self.accepted = asyncio.Event()  # the request is known to be good, or to have failed
        self.cut_off = asyncio.Event()  # the client reads too slowly
        self._waiting = set(range(form.n)) if unchecked else set()
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

    def feed(self, choice: Choice, delta: Delta, now: float) -> bool:
        """Take in what postproc sent for a choice that has not ended, if it is what comes next. What was shown before
        is not shown again.

        Returns True if something before it is missing, so that it has to be asked for.
        """
        if delta.failure is not None:
            self.fail(choice, delta.failure)
            return False
        last = delta.finish_reason is not None
        if delta.seq > choice.seq:
            if delta.start != choice.seq or choice.until not in (0, delta.seq):
                # One that overlaps was made for another reader of the same answer. Ours may still be on its way, and
                # if not, the next one leaves a gap; but after the last there is none.
                return delta.start > choice.seq or last
            self._take_in(choice, delta, now)
        elif not last:
            return False
        if last:
            choice.ended = True
            choice.finish_reason = delta.finish_reason
            choice.usage = delta.usage
            self._wake.set()
        return False

    def fail(self, choice: Choice | None, failure: Failure) -> None:
        """End the whole request: one choice failed, or (None) the gateway gives up on all of them."""
        if choice is not None:
            choice.ended = True
        if self.failure is None:
            self.failure = failure
        self.accepted.set()
        self._wake.set()

    def shown(self, index: int) -> int:
        """How many events of the next delta of a choice the client has."""
        place, self.since[index] = self.since[index], Place(0)
        return place.events

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

    def _take_in(self, choice: Choice, delta: Delta, now: float) -> None:
        choice.seq = delta.seq
        choice.until = 0
        choice.asked = False
        choice.misses = 0
        self.idle_since = choice.looked_at = now
        self.accept(choice)
        if self._pending_size > self._max_pending:
            self.cut_off.set()
        self._pending.append((choice.index, delta))
        self._pending_size += _size(delta)
        self._wake.set()


def choice_id(request_id: str, index: int) -> str:
    """The id that other stages know a choice by."""
    return request_id if index == 0 else f"{request_id}-{index}"


def _size(delta: Delta) -> int:
    """Roughly the bytes a delta will be in a stream beyond its frame; what matters is that nothing large is free.
    The prompt's ids are not counted: they come once a choice, and may come for all choices at the same moment."""
    detail = 64 * len(delta.logprobs) * (1 + max((len(one.top) for one in delta.logprobs), default=0))
    calls = sum(len(call.arguments) for call in delta.tool_calls)
    return 64 + len(delta.content) + len(delta.reasoning) + calls + 8 * len(delta.token_ids) + detail

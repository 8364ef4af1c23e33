"""State of one HTTP request that is being answered, and of its choices: what has arrived, and what is still to come.

Only the methods of this module write it. The registry calls them as messages arrive and time passes, the pipeline as it
sends, and the task that writes to the client as it writes. What the client has not been sent is in a `ClientQueue`.
"""

import asyncio
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import partial

import msgspec

from services.gateway.errors import LOST
from services.gateway.inflight.client_queue import ClientQueue, DirectWriter, TextWriter
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.tenants.limiter import Reservation
from shared.errors import Failure, internal
from shared.messages import Delta, Usage

NOT_FOUND = "request_not_found"  # code of the answer to an Attach for which there is no record
LAST_WORDS_S = 5.0  # for a client that lags to read that its request timed out
BEYOND_END = Failure(
    400,
    "The header Last-Event-ID names an event behind the end of this stream.",
    param="Last-Event-ID",
    code="invalid_value",
)


class StreamPosition(msgspec.Struct, frozen=True):
    """Part of a choice that a client has: all up to delta `seq`, and `events` of the next, which ends at `until`."""

    seq: int
    until: int = 0
    events: int = 0


class ChoiceState(Enum):
    """Progress of a choice; it only ever moves down this list."""

    NEW = 0  # only this gateway knows it
    SUBMITTED = 1  # the other stages know it: it waits, runs, or its answer is kept
    ENDED = 2  # its finish or its failure has arrived


_ENDED = ChoiceState.ENDED  # looked up for every delta


class Choice:
    """One of the answers that were asked for; the other stages treat it as a request of its own."""

    __slots__ = (
        "awaits_catch_up",
        "checked_at",
        "finish_reason",
        "heard_at",
        "index",
        "missing_checks",
        "open_request",
        "request_id",
        "seq",
        "state",
        "until",
        "usage",
        "writer",
    )

    def __init__(self, open_request: "OpenRequest", index: int, position: StreamPosition, now: float) -> None:
        self.open_request = open_request
        self.index = index
        self.request_id = choice_id(open_request.id, index)
        self.state = ChoiceState.NEW
        self.seq = position.seq  # of the last delta accepted; the client has everything up to it, or will
        self.until = position.until  # if not 0, the next delta must end here, because the client has part of it
        self.awaits_catch_up = False  # what follows `seq` has been requested again and has not arrived
        self.writer: TextWriter | None = None  # while the client's task waits and the client has all up to `seq`
        self.heard_at = now  # time of its last delta
        self.checked_at = now  # time of the last check that its record exists
        self.missing_checks = 0  # consecutive checks that found no record, or no work entry
        self.finish_reason: str | None = None  # set with the finish, as is
        self.usage: Usage | None = None

    @property
    def runs(self) -> bool:
        """True while the other stages work on it or keep its answer."""
        return self.state is ChoiceState.SUBMITTED

    @property
    def ended(self) -> bool:
        """True once its finish or its failure has arrived."""
        return self.state is ChoiceState.ENDED

    @property
    def generated(self) -> int:
        """Tokens of the answer, as far as they are known here."""
        return self.seq if self.usage is None else self.usage.completion_tokens

    def mark_submitted(self) -> None:
        """Note that the other stages know it. Its end may have arrived before."""
        if self.state is ChoiceState.NEW:
            self.state = ChoiceState.SUBMITTED

    def mark_catch_up(self) -> None:
        """Note that what follows `seq` is requested again."""
        self.awaits_catch_up = True

    def mark_present(self, now: float) -> None:
        """Note that its record exists."""
        self.checked_at, self.missing_checks = now, 0

    def mark_missing(self) -> int:
        """Note that its record does not exist, and have the next check look again; return how often in a row."""
        self.missing_checks += 1
        return self.missing_checks

    def is_silent(self, now: float, seconds: float) -> bool:
        """Return True if nothing was heard of it for so long, or its record was missing since."""
        return bool(self.missing_checks) or now - max(self.heard_at, self.checked_at) >= seconds

    def advance(self, seq: int, now: float) -> None:
        """Note that a delta up to `seq` was accepted."""
        self.seq = seq
        self.until = 0
        self.awaits_catch_up = False
        self.heard_at, self.missing_checks = now, 0

    def add(self, deltas: Sequence[Delta], now: float) -> bool:
        """Take deltas, before its end, and pass on the next ones; those seen before are dropped.

        Returns True if deltas before them are missing, so that they have to be requested again.
        """
        if self.writer is not None and len(deltas) == 1 and self._write(self.writer, deltas[0], now):
            return False
        return self.open_request.add(self, deltas, now)

    def _write(self, writer: TextWriter, delta: Delta, now: float) -> bool:
        """Write the next delta, if it is text and the client reads: nearly all go this way. Else return False.

        It touches few objects. With many streams, each has left the processor's caches by its next token, and to fetch
        it takes longer than the steps.
        """
        if delta.start != self.seq:
            return False
        try:
            if not writer.write(delta):
                return False
        except Exception as error:
            self.open_request.queue.break_off(error)
        self.advance(delta.seq, now)
        return True

    def end(self, finish_reason: str | None = None, usage: Usage | None = None) -> None:
        """Note its finish, or without a reason its failure."""
        self.state = ChoiceState.ENDED
        self.finish_reason = finish_reason
        self.usage = usage


class OpenRequest:
    """An HTTP request with its choices, and the queue of what its client has not been sent."""

    __slots__ = (
        "_events_sent",
        "_idle_since",
        "_timed_out_at",
        "_unaccepted",
        "_unended",
        "accepted",
        "answer_format",
        "choices",
        "client_has_id",
        "created",
        "deadline",
        "failure",
        "first_token_at",
        "id",
        "kept",
        "positions",
        "prompt_tokens",
        "queue",
        "rejoined",
        "reservation",
        "resumed",
        "stream",
        "uploads",
    )

    def __init__(
        self,
        request_id: str,
        answer_format: AnswerFormat,
        stream: bool,
        created: float,
        deadline: float,
        max_pending: int,
        now: float,
        *,
        unchecked: bool = False,
        positions: Sequence[StreamPosition] | None = None,
        rejoined: bool = False,
        kept: bool = False,
    ) -> None:
        """Begin with nothing received.

        `created`, `deadline` and `now` are unix seconds. `max_pending` bounds the bytes queued for a client that does
        not read. `unchecked`: no status may be sent before the media of every choice are accepted. `positions`: where
        the client resumes the stream, one for each choice. `rejoined`: another connection submitted the request.
        `kept`: its answer had ended by then.
        """
        self.id = request_id
        self.answer_format = answer_format
        self.stream = stream
        self.created = created
        self.deadline = deadline
        self.resumed = positions is not None
        self.rejoined = rejoined
        self.kept = kept
        self.positions = [StreamPosition(0)] * answer_format.n if positions is None else list(positions)
        self.choices = [Choice(self, index, position, now) for index, position in enumerate(self.positions)]
        self.uploads: tuple[str, ...] = ()  # keys of the blobs that were stored for it
        self.reservation: Reservation | None = None  # what it takes of its tenant's limits
        self.prompt_tokens: int | None = None  # once its media are accepted
        self.failure: Failure | None = None
        self._idle_since = now  # time of the last keep-alive
        self.first_token_at: float | None = None  # unix seconds
        self._timed_out_at: float | None = None
        self.client_has_id = False  # so that the client could resume
        self.accepted = asyncio.Event()  # set once every choice's media are good, or the request has failed
        self.queue = ClientQueue(max_pending, partial(_set_writers, self.choices))
        self._unaccepted = set(range(answer_format.n)) if unchecked else set()
        self._events_sent = [position.events for position in self.positions]
        self._unended = answer_format.n
        if not self._unaccepted:
            self.accepted.set()

    @property
    def done(self) -> bool:
        """True once nothing more will arrive and everything that arrived was taken."""
        return not self.queue and (self.failure is not None or not self._unended)

    def usages(self) -> list[Usage]:
        """Return the usage of every choice of an answer that has ended.

        Raises:
            RequestError: 500, a choice ended without it.
        """
        usages = [choice.usage for choice in self.choices if choice.usage is not None]
        if len(usages) != len(self.choices):
            raise internal("An answer ended without its usage.")
        return usages

    # --------------------------------------------------------------------------------------------- for the registry

    def mark_submitted(self) -> None:
        """Note that the other stages know every choice."""
        for choice in self.choices:
            choice.mark_submitted()

    def mark_reserved(self, reservation: Reservation | None) -> None:
        """Note what the limiter has to be told of its end."""
        self.reservation = reservation

    def mark_uploads(self, keys: Iterable[str]) -> None:
        """Note the keys of the blobs that are stored for it."""
        self.uploads = tuple(keys)

    def mark_prompt(self, tokens: int) -> None:
        """Note how long the prompt is, its media included."""
        self.prompt_tokens = tokens

    def release(self) -> None:
        """Let go of the choices, which refer back to it, once nothing reaches it: what it holds is then freed at once.

        The garbage collector, which would free it else, may look late.
        """
        self.choices.clear()

    def accept(self, choice: Choice) -> None:
        """Note that a choice's media are good."""
        self._unaccepted.discard(choice.index)
        if not self._unaccepted:
            self.accepted.set()

    def add(self, choice: Choice, deltas: Iterable[Delta], now: float) -> bool:
        """Take deltas as `Choice.add` does, whatever they are."""
        missing = False
        for delta in deltas:
            if choice.state is not _ENDED:
                missing |= self._add(choice, delta, now)
        if self.queue:
            self.queue.pass_on(last=not self._unended)
        return missing

    def fail(self, choice: Choice | None, failure: Failure) -> None:
        """End the whole request: `choice` failed, or (None) the gateway gives up on all of them."""
        if choice is not None and not choice.ended:
            self._end(choice)
        if self.failure is None:
            self.failure = failure
        self.accepted.set()
        self.queue.close()

    def time_out(self, failure: Failure, now: float) -> None:
        """End the whole request, past its deadline. A client that has not read that LAST_WORDS_S later is cut off."""
        if self._timed_out_at is None:
            self._timed_out_at = now
            self.fail(None, failure)
        elif now >= self._timed_out_at + LAST_WORDS_S:
            self.queue.overflowed.set()

    def mark_first_token(self, now: float) -> None:
        """Note that the first token has arrived."""
        self.first_token_at = now

    def is_idle(self, now: float, seconds: float) -> bool:
        """Return True if there was no delta of any choice for so long, and no keep-alive."""
        return now - max(self._idle_since, *(choice.heard_at for choice in self.choices)) >= seconds

    def keep_alive(self, now: float) -> None:
        """Wake the client's task, so that it sends a sign of life."""
        self._idle_since = now
        self.queue.wake()

    # ----------------------------------------------------------------------------------------- for the client's task

    def events_to_skip(self, index: int) -> int:
        """Return how many events of the next delta of a choice the client has already, once; then 0."""
        if not self.resumed:
            return 0
        events, self._events_sent[index] = self._events_sent[index], 0
        return events

    def mark_client_has_id(self) -> None:
        """Note that the client has been sent the request's id, or resumed by it."""
        self.client_has_id = True

    def _add(self, choice: Choice, delta: Delta, now: float) -> bool:
        if delta.failure is not None:
            self.fail(choice, LOST if delta.failure.code == NOT_FOUND else delta.failure)
            return False
        last = delta.finish_reason is not None
        if delta.seq > choice.seq:
            if delta.start != choice.seq or (choice.until and choice.until != delta.seq):
                # A delta that overlaps was made for another reader of the same answer. Ours may still be on its way;
                # if it is not, the next delta reveals the gap. After the last delta there is no next.
                return delta.start > choice.seq or last
            choice.advance(delta.seq, now)
            if self._unaccepted:
                self.accept(choice)
            self.queue.put(choice.index, delta)
        elif not last:
            return False
        elif delta.seq < choice.seq:
            self.fail(choice, BEYOND_END)
            return False
        if last:
            self._end(choice, delta.finish_reason, delta.usage)
            self.accept(choice)
            self.queue.wake()
        return False

    def _end(self, choice: Choice, finish_reason: str | None = None, usage: Usage | None = None) -> None:
        self._unended -= not choice.ended
        choice.end(finish_reason, usage)


def _set_writers(choices: Sequence[Choice], indexes: Sequence[int], writer: DirectWriter | None) -> None:
    """Have `writer` take the text of the choices of these indexes from now on; None: the queue takes all choices'."""
    if writer is None:
        for choice in choices:
            choice.writer = None
        return
    for index in indexes:
        choices[index].writer = writer.text_writer(index)


def choice_id(request_id: str, index: int) -> str:
    """Return the id of a choice for the other stages."""
    return request_id if index == 0 else f"{request_id}-{index}"

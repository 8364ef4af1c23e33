"""The open requests, in one dict: entered when submitted or returned to, removed by one method whatever ends them."""

import asyncio
import math
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from redis.exceptions import RedisError

from services.gateway.errors import LOST, SHUTTING_DOWN, TIMED_OUT
from services.gateway.inflight.pipeline import Known, Pipeline, Ticket
from services.gateway.inflight.request import Choice, OpenRequest, Place
from services.gateway.metrics import GatewayMetrics
from services.gateway.request.answer_format import Form
from services.gateway.request.parsed import ParsedRequest
from shared import log
from shared.errors import Failure, RequestError
from shared.messages import Accepted, Delta, Deltas, Failed, Message

MISSES = 2  # looks in a row without a record: the last words of a request that has ended may still be under way
NOT_FOUND = "request_not_found"  # the code of the answer to an Attach where there is no record

READ_S = 60.0  # to read an answer that is kept

logger = log.logger(__name__)


class Clock(Protocol):
    """Unix seconds."""

    def __call__(self) -> float: ...


class OpenRequestLimits(msgspec.Struct, frozen=True):
    """How open requests are looked after."""

    keep_alive_s: float
    watch_s: float  # silence after which a request is looked up
    max_pending: int  # bytes


class OpenRequests:
    """Sends orders into the pipeline and gives what comes back to whoever waits for it."""

    def __init__(self, rules: OpenRequestLimits, pipeline: Pipeline, metrics: GatewayMetrics, clock: Clock) -> None:
        self._rules = rules
        self._pipeline = pipeline
        self._metrics = metrics
        self._clock = clock
        self._open: dict[str, list[Choice]] = {}  # by request: several clients may read one answer
        self._behind: list[Choice] = []  # something was lost on the way to them

    def __len__(self) -> int:
        """Choices that are open."""
        return sum(map(len, self._open.values()))

    # ------------------------------------------------------------------------------------------------ coming, going

    @asynccontextmanager
    async def open(self, order: ParsedRequest, ticket: Ticket) -> AsyncIterator[OpenRequest]:
        """Send `order`, or return to what was sent under its key before. What has not ended when the block is left is
        cancelled, unless it may be returned to.

        Raises:
            RequestError: it is refused; nothing of it is left behind.
            RedisError: the same, as far as Redis can be told.
        """
        form = order.form(ticket.owner, ticket.key.digest if ticket.key else "")
        open_request = OpenRequest(
            secrets.token_hex(8),
            form,
            order.stream,
            ticket.created,
            ticket.deadline,
            self._rules.max_pending,
            self._clock(),
            unchecked=bool(order.media),
        )
        async with self._entered(open_request):
            earlier = await self._pipeline.submit(open_request, order, ticket)
            if earlier is None:
                yield open_request
                return
        async with self.rejoin(await self._known(earlier, ticket.owner), form, order.stream) as open_request:
            yield open_request

    @asynccontextmanager
    async def rejoin(
        self, known: Known, form: Form, stream: bool, shown: Sequence[Place] | None = None
    ) -> AsyncIterator[OpenRequest]:
        """Go on with a request that another connection began, from the beginning or after `shown`.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: it cannot be asked for.
        """
        now = self._clock()
        # The deadline is the answer's; once there is one, all that is left is to read it.
        deadline = max(known.deadline, now + READ_S) if known.ended else known.deadline
        open_request = OpenRequest(
            known.id, form, stream, known.created, deadline, self._rules.max_pending, now, shown=shown
        )
        open_request.rejoined = True
        for choice in open_request.choices:
            choice.submitted = True
        async with self._entered(open_request):
            await self._pipeline.join(open_request.choices)
            yield open_request

    async def _known(self, request_id: str, owner: str) -> Known:
        try:
            return await self._pipeline.find(request_id, owner)
        except RequestError as error:
            raise RequestError(LOST) from error  # it was there a moment ago

    @asynccontextmanager
    async def _entered(self, open_request: OpenRequest) -> AsyncIterator[None]:
        for choice in open_request.choices:
            self._open.setdefault(choice.request_id, []).append(choice)
        gauge = self._metrics.open.labels("true" if open_request.stream else "false")
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()
            await self._close(open_request)

    async def _close(self, open_request: OpenRequest) -> None:
        """The one way out of the dict: after the finish, a failure, a disconnect, a deadline."""
        for choice in open_request.choices:
            readers = self._open[choice.request_id]
            readers.remove(choice)
            if not readers:
                del self._open[choice.request_id]
        self._account(open_request)
        left = [choice.request_id for choice in open_request.choices if self._is_left(choice)]
        if not left or _goes_on(open_request):
            return
        self._metrics.cancelled.inc(len(left))
        try:
            # Shielded: whoever cancels the connection's task must not keep the engine working for nobody.
            await asyncio.shield(self._pipeline.cancel(left))
        except RedisError as error:
            logger.warning("could not cancel", extra={"request_id": open_request.id, "error": str(error)})

    def _is_left(self, choice: Choice) -> bool:
        return choice.submitted and not choice.ended and choice.request_id not in self._open

    def _account(self, open_request: OpenRequest) -> None:
        usages = [choice.usage for choice in open_request.choices if choice.usage is not None]
        if len(usages) == len(open_request.choices) and not open_request.rejoined:
            self._metrics.latency.observe(self._clock() - open_request.created)
            self._metrics.prompt_tokens.inc(usages[0].prompt_tokens)
            self._metrics.prompt_lengths.observe(usages[0].prompt_tokens)
            self._metrics.generation_tokens.inc(sum(usage.completion_tokens for usage in usages))
            for choice, usage in zip(open_request.choices, usages, strict=True):
                self._metrics.answer_lengths.observe(usage.completion_tokens)
                self._metrics.success.labels(choice.finish_reason).inc()

    # ------------------------------------------------------------------------------------------------ what comes

    def route(self, message: Message) -> None:
        """Give a message of our stream to the request it is for. One that nobody waits for any more is dropped."""
        match message:
            case Deltas(items):
                now = self._clock()
                for delta in items:
                    for choice in self._open.get(delta.request_id, ()):
                        self._deliver(choice, delta, now)
            case Accepted(request_id):
                for choice in self._open.get(request_id, ()):
                    choice.open_request.accept(choice)
            case Failed(request_id, failure):
                for choice in self._open.get(request_id, ()):
                    choice.open_request.fail(choice, failure)
            case _:
                logger.warning("unexpected message", extra={"type": type(message).__name__})

    def _deliver(self, choice: Choice, delta: Delta, now: float) -> None:
        if choice.ended:
            return
        open_request = choice.open_request
        if delta.failure is not None and delta.failure.code == NOT_FOUND:
            open_request.fail(choice, LOST)
            return
        if open_request.first_token is None and delta.failure is None:
            open_request.first_token = now
            if not open_request.rejoined:
                self._metrics.first_token.observe(now - open_request.created)
        if open_request.feed(choice, delta, now) and not choice.asked:
            choice.asked = True
            self._behind.append(choice)

    async def catch_up(self) -> None:
        """Ask for what was lost on its way to us."""
        if self._behind:
            behind, self._behind = self._behind, []
            await self._attach(behind)

    # ------------------------------------------------------------------------------------------------ looking after

    def tick(self) -> None:
        """Once in a while: end what is past its deadline, wake what has been silent for long."""
        now = self._clock()
        for open_request in {choice.open_request for choice in self._choices()}:
            if now >= open_request.deadline:
                open_request.fail(None, TIMED_OUT)
            elif now - open_request.idle_since >= self._rules.keep_alive_s:
                open_request.idle_since = now
                open_request.poke()

    async def look(self, everything: bool = False) -> None:
        """Look up what has been silent for long (or everything, after Redis may have lost it): no record, no answer."""
        now = self._clock()
        silent = [
            choice
            for choice in self._choices()
            if choice.submitted and not choice.ended and (everything or now - choice.looked_at >= self._rules.watch_s)
        ]
        if not silent:
            return
        records = await self._pipeline.records({choice.request_id for choice in silent})
        astray = []
        for choice in silent:
            record = records.get(choice.request_id)
            if record is None:
                self._miss(choice)
                continue
            choice.looked_at, choice.misses = now, 0
            if choice.asked or record.finish is not None or not self._pipeline.is_ours(record):
                astray.append(choice)
        await self._attach(astray)

    def _miss(self, choice: Choice) -> None:
        choice.looked_at = -math.inf  # again with the next look
        choice.misses += 1
        if choice.misses >= MISSES and not choice.ended:
            choice.open_request.fail(None, LOST)

    def fail_all(self, failure: Failure) -> None:
        """End every open request with the same answer."""
        for choice in self._choices():
            choice.open_request.fail(None, failure)

    async def _attach(self, choices: list[Choice]) -> None:
        try:
            await self._pipeline.attach([choice for choice in choices if not choice.ended])
        except RedisError as error:
            logger.warning("could not ask for answers again", extra={"error": str(error)})  # the next look will

    def _choices(self) -> Iterator[Choice]:
        return (choice for readers in self._open.values() for choice in readers)


def _goes_on(open_request: OpenRequest) -> bool:
    """Whether the client may come back for what it has not been given."""
    if open_request.failure is SHUTTING_DOWN:
        return open_request.announced or bool(open_request.form.key)
    return open_request.failure is None and bool(open_request.form.key)

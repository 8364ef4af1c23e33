"""Registry of the open requests: submitted or rejoined here, and removed by one method whatever ends them."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from redis.exceptions import RedisError

from services.gateway.errors import LOST, SHUTTING_DOWN, TIMED_OUT, USAGE_AT_END
from services.gateway.inflight.ended import EndedRequests
from services.gateway.inflight.pipeline import Pipeline, Settle
from services.gateway.inflight.request import Choice, ChoiceState, OpenRequest, StreamPosition
from services.gateway.inflight.stored import StoredRequest
from services.gateway.inflight.work_messages import RequestMetadata
from services.gateway.metrics import GatewayMetrics
from services.gateway.request.answer_format import AnswerFormat
from services.gateway.request.parsed import ParsedRequest
from shared import log
from shared.bus.records import UnreadableRecord
from shared.errors import Failure, RequestError, unreadable
from shared.messages import Accepted, Delta, Deltas, Failed, Message

MISSING_CHECKS = 2  # checks in a row without a record before a request is lost: its last deltas may be on their way

_ENDED = ChoiceState.ENDED  # looked up for every delta

READ_S = 60.0  # limit on reading an answer that is kept

logger = log.logger(__name__)


class Clock(Protocol):
    """Unix seconds."""

    def __call__(self) -> float: ...


class OpenRequestLimits(msgspec.Struct, frozen=True):
    """Limits of one open request."""

    keep_alive_s: float  # silence after which the client is sent a sign of life
    watch_s: float  # silence after which the record is checked
    max_pending: int  # bytes queued for a client that does not read


class OpenRequests:
    """Submitter of requests, and dispatcher of the messages that answer them."""

    def __init__(
        self,
        limits: OpenRequestLimits,
        pipeline: Pipeline,
        metrics: GatewayMetrics,
        ended: EndedRequests,
        clock: Clock,
    ) -> None:
        self._limits = limits
        self._pipeline = pipeline
        self._metrics = metrics
        self._ended = ended
        self._clock = clock
        self._readers: dict[str, list[Choice]] = {}  # by request id: several clients may read one answer
        self._incomplete: list[Choice] = []  # deltas are missing and have not been requested again yet

    def __len__(self) -> int:
        """Count the open choices."""
        return sum(map(len, self._readers.values()))

    # ------------------------------------------------------------------------------------------------ open and close

    @asynccontextmanager
    async def open(self, parsed: ParsedRequest, metadata: RequestMetadata) -> AsyncIterator[OpenRequest]:
        """Submit a request, or rejoin the one that was submitted under its Idempotency-Key before.

        A choice that has not ended when the block is left is cancelled, unless a client may return to it.

        Raises:
            RequestError: it is refused; nothing of it is left behind.
            RedisError: it could not be submitted.
        """
        answer_format = parsed.answer_format(metadata.owner, metadata.key.digest if metadata.key else "")
        open_request = OpenRequest(
            secrets.token_hex(8),
            answer_format,
            parsed.stream,
            metadata.created,
            metadata.deadline,
            self._limits.max_pending,
            self._clock(),
            unchecked=bool(parsed.media),
        )
        async with self._registered(open_request):
            earlier = await self._pipeline.submit(open_request, parsed, metadata)
            del parsed  # its uploads are stored, or not needed; the answer may take long
            if earlier is None:
                yield open_request
                return
        stored = await self._find_earlier(earlier, metadata.owner)
        if answer_format.continuous_usage and not stored.answer_format.continuous_usage:
            raise RequestError(USAGE_AT_END)
        async with self.rejoin(stored, answer_format, open_request.stream) as open_request:
            yield open_request

    @asynccontextmanager
    async def rejoin(
        self,
        stored: StoredRequest,
        answer_format: AnswerFormat,
        stream: bool,
        positions: Sequence[StreamPosition] | None = None,
    ) -> AsyncIterator[OpenRequest]:
        """Open a request that another connection submitted, from the beginning or from `positions`.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: its deltas cannot be requested.
        """
        now = self._clock()
        # The deadline is that of the answer; once there is one, it only has to be read.
        deadline = max(stored.deadline, now + READ_S) if stored.ended else stored.deadline
        open_request = OpenRequest(
            stored.id,
            answer_format,
            stream,
            stored.created,
            deadline,
            self._limits.max_pending,
            now,
            # An ended answer says within a moment whether it has the position: a 400 rather than an error event.
            unchecked=stored.ended and positions is not None,
            positions=positions,
            rejoined=True,
            kept=stored.ended,
        )
        open_request.mark_submitted()
        async with self._registered(open_request):
            await self._pipeline.attach_in_time(open_request.choices)
            yield open_request

    async def cancel(self, stored: StoredRequest) -> None:
        """Cancel a request that any connection, here or elsewhere, submitted or reads.

        Raises:
            RequestError: 503, Redis does not answer.
            RedisError: it could not be cancelled.
        """
        self._metrics.cancelled.inc(len(stored.records))
        await self._pipeline.cancel_for_all([record.request.id for record in stored.records])

    async def _find_earlier(self, request_id: str, owner: str) -> StoredRequest:
        try:
            return await self._pipeline.find(request_id, owner)
        except RequestError as error:
            raise RequestError(LOST) from error  # it existed a moment ago

    @asynccontextmanager
    async def _registered(self, open_request: OpenRequest) -> AsyncIterator[None]:
        for choice in open_request.choices:
            self._readers.setdefault(choice.request_id, []).append(choice)
        gauge = self._metrics.open.labels("true" if open_request.stream else "false")
        gauge.inc()
        try:
            yield
        finally:
            gauge.dec()
            try:
                await self._close(open_request)
            finally:
                open_request.release()

    async def _close(self, open_request: OpenRequest) -> None:
        """Remove a request: after its finish, a failure, a disconnect, a deadline. The only way out of the registry."""
        for choice in open_request.choices:
            readers = self._readers[choice.request_id]
            readers.remove(choice)
            if not readers:
                del self._readers[choice.request_id]
        self._count(open_request)
        resumable = _is_resumable(open_request)
        if not any(choice.request_id in self._readers for choice in open_request.choices):
            self._ended.count_end(open_request, resumable)
        settle = self._pipeline.settlement(open_request)
        running = [choice.request_id for choice in open_request.choices if choice.runs]
        abandoned = [] if resumable else [each for each in running if each not in self._readers]
        if not abandoned:
            settle(running)
            return
        self._metrics.cancelled.inc(len(abandoned))
        # Shielded: a cancelled connection task must not leave the engine working for nobody.
        await asyncio.shield(self._cancel(open_request.id, abandoned, running, settle))

    async def _cancel(self, request_id: str, abandoned: list[str], running: list[str], settle: Settle) -> None:
        """Cancel choices that nobody reads, and settle: the others that run go on, for readers here or elsewhere."""
        cancelled: list[str] = []
        try:
            cancelled = await self._pipeline.cancel(abandoned)
        except RedisError as error:
            fields = {"request_id": request_id, "error": str(error)}
            logger.warning("could not cancel a request; it runs to its end or its deadline", extra=fields)
        finally:
            settle([each for each in running if each not in cancelled])

    def is_abandoned(self, open_request: OpenRequest) -> bool:
        """Return True if a request that has not ended is to be cancelled when its only reader here leaves."""
        choices = open_request.choices
        alone = all(len(self._readers.get(choice.request_id, ())) <= 1 for choice in choices)
        return alone and any(choice.runs for choice in choices) and not _is_resumable(open_request)

    def _count(self, open_request: OpenRequest) -> None:
        """Add a completely answered request to the metrics, unless another connection submitted it."""
        usages = [choice.usage for choice in open_request.choices if choice.usage is not None]
        if len(usages) == len(open_request.choices) and not open_request.rejoined:
            self._metrics.latency.observe(self._clock() - open_request.created)
            form = open_request.answer_format
            for usage in usages[:: form.n // form.prompts]:
                self._metrics.prompt_tokens.inc(usage.prompt_tokens)
                self._metrics.prompt_lengths.observe(usage.prompt_tokens)
            self._metrics.generation_tokens.inc(sum(usage.completion_tokens for usage in usages))
            for choice, usage in zip(open_request.choices, usages, strict=True):
                self._metrics.answer_lengths.observe(usage.completion_tokens)
                self._metrics.success.labels(choice.finish_reason).inc()

    # ------------------------------------------------------------------------------------------------ messages

    def dispatch(self, messages: Sequence[Message]) -> None:
        """Give messages of our stream to the requests that they are for; drop those for which there are none any more.

        What several messages bring for one client is written at once.
        """
        if len(messages) == 1 and isinstance(messages[0], Deltas):  # nearly always, and one delta a request
            single = {delta.request_id: (delta,) for delta in messages[0].items}
            if len(single) == len(messages[0].items):
                self._deliver(single.items())
                return
        deltas: dict[str, list[Delta]] = {}
        for message in messages:
            if isinstance(message, Deltas):
                for delta in message.items:
                    deltas.setdefault(delta.request_id, []).append(delta)
            else:
                self._deliver(deltas.items())
                deltas.clear()
                self._note(message)
        self._deliver(deltas.items())

    def _note(self, message: Message) -> None:
        match message:
            case Accepted(request_id, prompt_tokens):
                for choice in self._readers.get(request_id, ()):
                    choice.open_request.mark_prompt(prompt_tokens)
                    choice.open_request.accept(choice)
            case Failed(request_id, failure):
                for choice in self._readers.get(request_id, ()):
                    choice.open_request.fail(choice, failure)
            case _:
                logger.warning("dropped a message of an unexpected type", extra={"type": type(message).__name__})

    def _deliver(self, deltas: Iterable[tuple[str, Sequence[Delta]]]) -> None:
        now, readers = self._clock(), self._readers
        for request_id, added in deltas:
            for choice in readers.get(request_id, ()):
                if choice.state is _ENDED:
                    continue
                if choice.writer is None and choice.open_request.first_token_at is None:
                    self._mark_first_token(choice.open_request, added, now)
                if choice.add(added, now) and not choice.awaits_catch_up:
                    choice.mark_catch_up()
                    self._incomplete.append(choice)

    def _mark_first_token(self, open_request: OpenRequest, deltas: Iterable[Delta], now: float) -> None:
        if all(delta.failure is not None for delta in deltas):
            return
        open_request.mark_first_token(now)
        if not open_request.rejoined:
            self._pipeline.mark_begun(open_request)
            self._metrics.first_token.observe(now - open_request.created)

    async def request_missing(self) -> None:
        """Request again the deltas that were lost on their way."""
        if self._incomplete:
            incomplete, self._incomplete = self._incomplete, []
            await self._attach(incomplete)

    # ------------------------------------------------------------------------------------------------ supervision

    def tick(self) -> None:
        """Fail requests past their deadline, and send a sign of life to clients that have heard nothing for long."""
        now = self._clock()
        for open_request in {choice.open_request for choice in self._choices()}:
            if now >= open_request.deadline:
                open_request.time_out(TIMED_OUT, now)
            elif open_request.is_idle(now, self._limits.keep_alive_s):
                open_request.keep_alive(now)

    async def check_records(self, everything: bool = False) -> None:
        """Check the records of silent requests, or of all after Redis may have lost them.

        Without one, or without a work entry that some stage has or will have, a request fails.

        A request whose deltas are sent elsewhere, or that has ended without our knowledge, is attached again.
        """
        await self._pipeline.remove_leftovers()
        now = self._clock()
        silent = [
            choice
            for choice in self._choices()
            if choice.runs and (everything or choice.is_silent(now, self._limits.watch_s))
        ]
        if not silent:
            return
        request_ids = {choice.request_id for choice in silent}
        records = await self._pipeline.read_records(request_ids)
        lost = await self._pipeline.read_lost(request_ids)
        detached = []
        for choice in silent:
            if choice not in self._readers.get(choice.request_id, ()):
                continue  # closed in the meantime
            record = records.get(choice.request_id)
            if record is None or choice.request_id in lost:
                if choice.mark_missing() >= MISSING_CHECKS and not choice.ended:
                    choice.open_request.fail(None, LOST)
                    await self._pipeline.forget(choice.open_request)
                continue
            choice.mark_present(now)
            if isinstance(record, UnreadableRecord):
                choice.open_request.fail(None, unreadable("the record"))
                continue
            if choice.awaits_catch_up or record.finish is not None or not self._pipeline.is_attached(record):
                detached.append(choice)
        await self._attach(detached)

    def fail_all(self, failure: Failure) -> None:
        """End every open request with the same failure."""
        for choice in self._choices():
            choice.open_request.fail(None, failure)

    async def _attach(self, choices: list[Choice]) -> None:
        try:
            await self._pipeline.attach([choice for choice in choices if not choice.ended])
        except RedisError as error:
            logger.warning("could not request missing deltas; the next check will", extra={"error": str(error)})

    def _choices(self) -> Iterator[Choice]:
        return (choice for readers in self._readers.values() for choice in readers)


def _is_resumable(open_request: OpenRequest) -> bool:
    """Return True if the client may return for the rest of its answer."""
    form = open_request.answer_format
    outlives = bool(form.key) or form.outlives
    if open_request.failure is SHUTTING_DOWN:
        return open_request.client_has_id or outlives
    return open_request.failure is None and outlives

"""Requests for an answer, of any API, from admission to the last byte."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway.dialects.dialect import Dialect
from services.gateway.grammars.check import GrammarCheck
from services.gateway.http import spans
from services.gateway.http.answer import AnswerWriter
from services.gateway.http.body import INLINE_BYTES
from services.gateway.http.context import RequestContext, context_of
from services.gateway.http.intake import Intake
from services.gateway.http.memory import SMALL_BYTES, Reservation
from services.gateway.http.patience import ClientPatience
from services.gateway.http.structure import check_structure
from services.gateway.inflight.headers import (
    KEY,
    IdempotencyKey,
    read_event_ids,
    read_idempotency_key,
    read_timeout,
    read_traceparent,
)
from services.gateway.inflight.registry import OpenRequests
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.work_messages import RequestMetadata
from services.gateway.request.parsed import Draft, ParsedRequest, RequestParser
from services.gateway.templates.renderer import TemplateRenderer
from services.gateway.tenants.limiter import Quota

T = TypeVar("T")
D = TypeVar("D", Draft, Draft | ParsedRequest)


class Compute(Protocol):
    """Caller of functions whose work grows with a number of bytes."""

    async def __call__(self, size: int, function: Callable[[], T]) -> T:
        """Return what the function returns."""


class Session(Protocol):
    """Steps around one request, of an API that keeps something between requests."""

    async def begin(self, body: bytes, owner: str, reservation: Reservation, compute: Compute) -> tuple[Dialect, int]:
        """Return the dialect that reads this body, whose structure was checked, and the bytes that it will read beside.

        Raises:
            RequestError: the request is refused.
        """

    async def opened(self, open_request: OpenRequest) -> None:
        """Note that the request is submitted; its client has been told nothing yet."""

    async def respond(
        self, open_request: OpenRequest, context: RequestContext, receive: Receive, send: Send, *, event_ids: bool
    ) -> None:
        """Write the answer, as `AnswerWriter.respond` does."""


class RequestHandler(msgspec.Struct, frozen=True):
    """Handler of the routes that begin a request."""

    intake: Intake
    parser: RequestParser
    templates: TemplateRenderer
    grammars: GrammarCheck
    open_requests: OpenRequests
    count: Callable[[Quota], Coroutine[Any, Any, None]]  # of a request that is answered here, among its tenant's
    writer: AnswerWriter
    max_text_bytes: int
    request_timeout_s: float
    # Held while a large body is decoded, which takes several times its bytes, and processor time that others wait for.
    decoding: asyncio.Lock

    async def handle(
        self, dialect: Dialect, request: Request, receive: Receive, send: Send, session: Session | None = None
    ) -> None:
        """Answer one request; `session` has steps of its API around it.

        Raises:
            RequestError: the request is refused; nothing was written.
            ClientDisconnect: the client left before it was submitted.
        """
        created = time.time()
        context = context_of(request)
        deadline = context.until or created + read_timeout(request.headers, self.request_timeout_s)
        event_ids = read_event_ids(request.headers)
        async with self.intake.receive(request) as (body, reservation):
            await self.check(body)
            patience = ClientPatience(receive, deadline)
            more = 0
            if session is not None:
                dialect, more = await patience.wait(session.begin(body, context.owner, reservation, self.compute))
            parsed, key = await self._parse(dialect, body, request.headers, context.owner, patience, more)
            del body, dialect  # which may have read much beside it
            if context.until is not None:
                parsed = msgspec.structs.replace(parsed, keep_s=max(parsed.keep_s, context.until - created))
            context.request_id = parsed.request_id or context.request_id
            context.warnings = parsed.warnings
            if parsed.sampling.grammar is not None:
                await patience.wait(self.grammars.check(parsed.sampling.grammar, parsed.tool_grammars))
            trace = _trace(request, context)
            metadata = RequestMetadata(created, deadline, context.owner, key, trace, context.request_id, context.quota)
            if context.span is not None:
                spans.set_request(context.span, parsed)
            opening = self.open_requests.open(parsed, metadata)
            del parsed  # and with it the uploads, once they are stored
            await self._answer(opening, session, reservation, context, receive, send, event_ids)

    async def _answer(
        self,
        opening: AbstractAsyncContextManager[OpenRequest],
        session: Session | None,
        reservation: Reservation,
        context: RequestContext,
        receive: Receive,
        send: Send,
        event_ids: bool,
    ) -> None:
        span = context.span
        async with opening as open_request:
            if session is not None:
                await session.opened(open_request)
            reservation.release()
            respond = self.writer.respond if session is None else session.respond
            try:
                await respond(open_request, context, receive, send, event_ids=event_ids)
            finally:
                if span is not None:
                    spans.set_answer(span, open_request, time.time())

    async def _parse(
        self,
        dialect: Dialect,
        body: bytes,
        headers: Mapping[str, str],
        owner: str,
        patience: ClientPatience,
        more: int,
    ) -> tuple[ParsedRequest, IdempotencyKey | None]:
        draft, rendered = await self.render(body, partial(self._read, dialect, body), patience, more)
        key = None
        if KEY in headers:
            key = await self.compute(len(body), lambda: read_idempotency_key(headers, owner, body))
        if isinstance(draft, ParsedRequest):
            return draft, key
        return await self.compute(len(rendered), lambda: self.parser.finish(draft, rendered)), key

    def _read(self, dialect: Dialect, body: bytes) -> Draft | ParsedRequest:
        stated = dialect.read(body)
        return self.parser.complete(stated) if stated.prompts else self.parser.read(stated)

    async def render(
        self, body: bytes, read: Callable[[], D], patience: ClientPatience, more: int = 0
    ) -> tuple[D, str]:
        """Return a request, as `read` understands its checked `body`, and its prompt; "" if it has no conversation.

        `more`: bytes that `read` reads beside the body.

        Raises:
            RequestError: the request is refused.
        """
        draft = await self.compute(len(body) + more, read)
        if not isinstance(draft, Draft):
            return draft, ""
        with draft.stated.own_names():
            return draft, await patience.wait(self.templates.render(draft.rendering))

    async def check(self, body: bytes) -> None:
        """Check the structure of a body.

        Raises:
            RequestError: 413 or 400, naming the limit.
        """
        await self.compute(len(body), lambda: check_structure(body, self.max_text_bytes))

    async def compute(self, size: int, function: Callable[[], T]) -> T:
        """Call a function whose work grows with `size`: in a thread if that is large, one at a time if very large."""
        if size <= INLINE_BYTES:
            return function()
        if size <= SMALL_BYTES:
            return await asyncio.to_thread(function)
        async with self.decoding:
            return await asyncio.to_thread(function)


def _trace(request: Request, context: RequestContext) -> str | None:
    """Return the traceparent for the other stages: our span's, else the client's own."""
    return read_traceparent(request.headers) if context.span is None else context.span.traceparent

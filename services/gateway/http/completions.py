"""POST /v1/chat/completions, from admission to the last byte of the answer."""

import asyncio
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from services.gateway.grammars.check import GrammarCheck
from services.gateway.http import spans
from services.gateway.http.admission import Admission
from services.gateway.http.answer import AnswerWriter
from services.gateway.http.body import read_body
from services.gateway.http.context import RequestContext, context_of
from services.gateway.inflight.headers import (
    read_event_ids,
    read_idempotency_key,
    read_timeout,
    read_traceparent,
)
from services.gateway.inflight.pipeline import RequestMetadata
from services.gateway.inflight.registry import OpenRequests
from services.gateway.request.parsed import ParsedRequest, RequestParser
from services.gateway.templates.renderer import TemplateRenderer

INLINE_BYTES = 16 << 10  # a larger body is parsed in a thread, so that other streams do not wait for it

P = ParamSpec("P")
T = TypeVar("T")


class ChatCompletions(msgspec.Struct, frozen=True):
    """Handler of the route."""

    admission: Admission
    parser: RequestParser
    templates: TemplateRenderer
    grammars: GrammarCheck
    open_requests: OpenRequests
    writer: AnswerWriter
    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float

    async def handle(self, request: Request, receive: Receive, send: Send) -> None:
        """Answer one request.

        Raises:
            RequestError: the request is refused; nothing was written.
        """
        created = time.time()
        deadline = created + read_timeout(request.headers, self.request_timeout_s)
        event_ids = read_event_ids(request.headers)
        context = context_of(request)
        with self.admission.slot():
            try:
                body = await read_body(request, self.max_body_bytes, self.body_timeout_s)
            except ClientDisconnect:
                return
            parsed = await self._parse(body)
            key = await _compute(len(body), read_idempotency_key, request.headers, context.owner, body)
            del body
            context.request_id = parsed.request_id or context.request_id
            context.warnings = parsed.warnings
            if parsed.sampling.grammar is not None:
                await self.grammars.check(parsed.sampling.grammar, parsed.tool_grammars)
            metadata = RequestMetadata(created, deadline, context.owner, key, _trace(request, context))
            await self._answer(parsed, metadata, context, receive, send, event_ids)

    async def _answer(
        self,
        parsed: ParsedRequest,
        metadata: RequestMetadata,
        context: RequestContext,
        receive: Receive,
        send: Send,
        event_ids: bool,
    ) -> None:
        span = context.span
        if span is not None:
            spans.set_request(span, parsed)
        async with self.open_requests.open(parsed, metadata) as open_request:
            try:
                await self.writer.respond(open_request, context, receive, send, event_ids=event_ids)
            finally:
                if span is not None:
                    spans.set_answer(span, open_request, time.time())

    async def _parse(self, body: bytes) -> ParsedRequest:
        draft = await _compute(len(body), self.parser.read, body)
        rendered = await self.templates.render(draft.rendering)
        return await _compute(len(rendered), self.parser.finish, draft, rendered)


async def _compute(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function whose work grows with `size`: in a thread if that is large."""
    return function(*args, **kwargs) if size <= INLINE_BYTES else await asyncio.to_thread(function, *args, **kwargs)


def _trace(request: Request, context: RequestContext) -> str | None:
    """Return the traceparent for the other stages: our span's, else the client's own."""
    return read_traceparent(request.headers) if context.span is None else context.span.traceparent

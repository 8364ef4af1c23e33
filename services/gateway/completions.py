"""POST /v1/chat/completions, from admission to the last byte of the answer."""

import asyncio
import time
from collections.abc import Mapping

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Send

from services.gateway import spans, terms
from services.gateway.admission import Admission
from services.gateway.answer import Answerer
from services.gateway.body import read_body
from services.gateway.desk import Desk
from services.gateway.order import Order, OrderTaker
from services.gateway.pipeline import Ticket
from services.gateway.terms import Key
from shared.tracing import Span

INLINE_BYTES = 16 << 10  # a larger body is prepared in a thread, so that other streams do not wait for it


class ChatCompletions(msgspec.Struct, frozen=True):
    """What the route needs."""

    admission: Admission
    taker: OrderTaker
    desk: Desk
    answerer: Answerer
    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float

    async def handle(self, request: Request, receive: Receive, send: Send) -> None:
        """
        Raises:
            RequestError: the request is refused; nothing was written.
        """
        created = time.time()
        seconds = terms.timeout(request.headers, self.request_timeout_s)
        owner = request.scope["owner"]
        span: Span | None = request.scope["span"]
        trace = terms.trace(request.headers) if span is None else span.traceparent
        with self.admission.slot():
            try:
                body = await read_body(request, self.max_body_bytes, self.body_timeout_s)
            except ClientDisconnect:
                return
            order, key = await self._take(body, request.headers, owner)
            del body
            if span is not None:
                spans.asked(span, order)
            ticket = Ticket(created, created + seconds, owner, key, trace)
            async with self.desk.open(order, ticket) as exchange:
                try:
                    await self.answerer.respond(exchange, request, receive, send)
                finally:
                    if span is not None:
                        spans.answered(span, exchange, time.time())

    async def _take(self, body: bytes, headers: Mapping[str, str], owner: str) -> tuple[Order, Key | None]:
        def take() -> tuple[Order, Key | None]:
            return self.taker.take(body), terms.key(headers, owner, body)

        return take() if len(body) <= INLINE_BYTES else await asyncio.to_thread(take)

"""POST /v1/chat/completions, from admission to the last byte of the answer."""

import asyncio
import re
import time

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.admission import Admission
from services.gateway.answer import Answerer, refuse
from services.gateway.body import read_body
from services.gateway.desk import Desk
from services.gateway.exchange import Exchange
from services.gateway.order import Order, OrderTaker
from shared import log
from shared.errors import RequestError

INLINE_BYTES = 16 << 10  # a larger body is prepared in a thread, so that other streams do not wait for it

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

logger = log.logger(__name__)


class ChatCompletions(msgspec.Struct, frozen=True):
    """What the route needs."""

    admission: Admission
    taker: OrderTaker
    desk: Desk
    answerer: Answerer
    max_body_bytes: int
    body_timeout_s: float

    async def handle(self, request: Request, receive: Receive, send: Send) -> None:
        """
        Raises:
            RequestError: the request is refused; nothing was written.
        """
        created = time.time()
        with self.admission.slot():
            try:
                body = await read_body(request, self.max_body_bytes, self.body_timeout_s)
            except ClientDisconnect:
                return
            order = await self._take(body)
            del body
            async with self.desk.open(order, created, _trace(request)) as exchange:
                await self._answer(exchange, request, receive, send)

    async def _take(self, body: bytes) -> Order:
        if len(body) <= INLINE_BYTES:
            return self.taker.take(body)
        return await asyncio.to_thread(self.taker.take, body)

    async def _answer(self, exchange: Exchange, request: Request, receive: Receive, send: Send) -> None:
        outcome = "answered"
        try:
            if not await self.answerer.answer(exchange, receive, send):
                outcome = "client left"
        except RequestError as error:
            outcome = f"failed {error.failure.status}"
            # Unlike a refusal, this has run; unless it says "later", running it again would end the same way.
            headers = {"x-should-retry": "false"} if error.failure.status != 503 else {}
            await refuse(error.failure, send, headers)
        finally:
            duration = round(time.time() - exchange.created, 3)
            fields = {"request_id": exchange.id, "http_request_id": request.scope["request_id"], "seconds": duration}
            logger.info(outcome, extra=fields)


class ChatResponse(Response):
    """A response that makes itself: FastAPI hands it the connection, and nothing stands between it and the client."""

    def __init__(self, completions: ChatCompletions, request: Request) -> None:
        super().__init__()
        self._completions = completions
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._completions.handle(self._request, receive, send)


def _trace(request: Request) -> str | None:
    given = request.headers.get("traceparent", "")
    return given if _TRACEPARENT.fullmatch(given) else None

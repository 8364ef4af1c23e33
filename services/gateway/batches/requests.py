"""Requests of batches: each goes through the application as if its client had sent it, but for the connection.

So all rules of requests hold: the key's models and limits, the gateway's slots and memory, errors in the form of their
API. Its Idempotency-Key is the line's own, so that whoever sends it again gets the answer of the one that runs.
"""

import asyncio
import secrets

import msgspec
from starlette.types import ASGIApp, Message

from services.gateway.batches.batch import About
from services.gateway.batches.lines import Line, check_body, is_json
from services.gateway.errors import UNAUTHORIZED, UNEXPECTED, openai_body
from services.gateway.http import spans
from services.gateway.http.body import INLINE_BYTES
from services.gateway.http.context import RequestContext, attach_context
from services.gateway.inflight.headers import key_digest
from services.gateway.inflight.pipeline import Pipeline
from services.gateway.tenants.keyring import Keyring
from services.gateway.tenants.limiter import Quota
from services.gateway.tenants.slots import TenantSlots
from shared import log
from shared.errors import Failure, RequestError
from shared.messages import BATCH_PRIORITY, Share
from shared.tracing import OFF, Span, Tracing

AGAIN = (429, 503)  # statuses of what may go better later

logger = log.logger(__name__)


class Reply(msgspec.Struct):
    """Answer to a line."""

    status: int
    request_id: str = ""
    body: bytes = b""
    retry_s: float = 1.0  # until it makes sense to ask again, if the status says that it does


class LineRequests:
    """Sender of the requests of lines."""

    def __init__(
        self, app: ASGIApp, keyring: Keyring, slots: TenantSlots, pipeline: Pipeline, tracing: Tracing = OFF
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._slots = slots
        self._pipeline = pipeline
        self._tracing = tracing

    async def ask(self, about: About, line: Line) -> Reply:
        """Return the answer to a line, or its error. If the wait is cancelled, the request goes on."""
        caller = self._keyring.by_owner(about.owner)
        if caller is None:
            return _refused(UNAUTHORIZED)
        tenant = caller.tenant
        share = Share("") if caller.share is None else caller.share
        quota = Quota(tenant, msgspec.structs.replace(share, priority=BATCH_PRIORITY))
        try:
            if len(line.body) <= INLINE_BYTES:
                check_body(line.body)
            else:
                await asyncio.to_thread(check_body, line.body)
            with self._slots.slot(tenant):
                return await self._send(about, line, quota)
        except RequestError as error:
            return _refused(error.failure)

    async def cancel(self, about: About, numbers: list[int]) -> None:
        """Cancel the requests of these lines, those that run."""
        await self._pipeline.cancel_keyed([key_digest(about.owner, _key(about, number)) for number in numbers])

    async def forget(self, about: About, number: int) -> None:
        """Keep the answer to a line no longer than other answers, since its result is written."""
        await self._pipeline.shorten_keyed(key_digest(about.owner, _key(about, number)))

    async def _send(self, about: About, line: Line, quota: Quota) -> Reply:
        reply = Reply(0)
        given = [{"type": "http.request", "body": line.body, "more_body": False}]

        async def receive() -> Message:
            if not given:
                await asyncio.get_running_loop().create_future()  # nobody leaves
            return given.pop()

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.retry_s = _retry_s([*message["headers"], *quota.headers.items()])
            else:
                reply.body += message.get("body", b"")

        span = self._start_span(about, line)
        context = RequestContext(secrets.token_hex(16), about.owner, span, send, quota=quota, until=about.expires_at)
        scope = _scope(about, line)
        attach_context(scope, context)
        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("a request of a batch failed", extra={"batch": about.id, "line": line.number})
            if span is not None:
                span.fail(UNEXPECTED.kind)
        finally:
            if span is not None and reply.status not in AGAIN:  # what is sent again has its span then
                spans.end(span, str(reply.status) if reply.status else None)
        if not reply.status:
            return _refused(UNEXPECTED)
        if reply.status not in AGAIN and not is_json(reply.body):
            logger.error("an answer to a line of a batch is not JSON", extra={"batch": about.id, "line": line.number})
            return _refused(UNEXPECTED)
        reply.request_id = context.request_id
        return reply

    def _start_span(self, about: About, line: Line) -> Span | None:
        """Begin the trace of a line, which points to its batch: one trace of all lines would be too large to read."""
        span = self._tracing.work("batch line", spans.TRACED[about.endpoint].initial())
        if span is not None:
            span.set({"millrace.batch.id": about.id, "millrace.batch.line": line.number})
            if about.trace is not None:
                span.link(about.trace)
        return span


def _key(about: About, number: int) -> str:
    return f"{about.id} line {number}"


def _scope(about: About, line: Line) -> dict[str, object]:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(line.body)).encode()),
        (b"idempotency-key", _key(about, line.number).encode()),
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": about.endpoint,
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "client": None,
        "server": None,
    }


def _retry_s(headers: list[tuple[bytes, bytes]]) -> float:
    named = dict(headers)
    if b"retry-after-ms" in named:
        return int(named[b"retry-after-ms"]) / 1000
    return float(named.get(b"retry-after", b"1"))


def _refused(failure: Failure) -> Reply:
    return Reply(failure.status, "", openai_body(failure))

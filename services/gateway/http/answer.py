"""Writer of the answer to one open request: a stream of events, or one JSON body. Stops when the client leaves."""

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Send

from services.gateway.dialects.collected import CollectedChoice
from services.gateway.dialects.dialect import Dialect, Dialects
from services.gateway.errors import RETRY_AFTER_S, UNKNOWN_API, FailureBody, error_response, openai_body
from services.gateway.http.context import RequestContext
from services.gateway.http.stream import StreamWriter
from services.gateway.inflight.request import OpenRequest
from services.gateway.inflight.stored import StoredRequest
from services.gateway.request.answer_format import AnswerFormat
from shared import log
from shared.errors import Failure, RequestError, release_frames

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_RETRY_AFTER = (b"retry-after", str(RETRY_AFTER_S).encode())

logger = log.logger(__name__)


class AnswerWriter(msgspec.Struct, frozen=True):
    """Writer of answers."""

    dialects: Dialects
    system_fingerprint: str
    hold_headers_s: float  # how long a stream's status may wait for its media to be accepted

    async def respond(
        self,
        open_request: OpenRequest,
        context: RequestContext,
        receive: Receive,
        send: Send,
        *,
        event_ids: bool = False,
    ) -> None:
        """Write the answer or its failure, and log the outcome. `event_ids`: the events of a stream have ids."""
        outcome = "answered"
        try:
            if not await self.write(open_request, context, receive, send, event_ids):
                outcome = "client left"
        except RequestError as error:
            release_frames(error)
            outcome = f"failed {error.failure.status}"
            # Unlike a request that was refused, this one has run; it would fail again, unless the status says "later".
            headers = {"x-should-retry": "false"} if error.failure.status != 503 else {}
            dialect = self.dialects.get(open_request.answer_format.dialect)
            await write_failure(error.failure, send, headers, openai_body if dialect is None else dialect.failure)
        finally:
            duration = round(time.time() - open_request.created, 3)
            fields = {
                "request_id": open_request.id,
                "http_request_id": context.request_id,
                "seconds": duration,
            }
            if context.span is not None:
                fields["trace_id"] = context.span.trace_id
            logger.info(outcome, extra=fields)

    async def write(
        self, open_request: OpenRequest, context: RequestContext, receive: Receive, send: Send, event_ids: bool
    ) -> bool:
        """Write the answer; return False if the client left or read too slowly, and it was not written to the end.

        Raises:
            RequestError: the request failed before anything was written.
        """
        answer = (
            self._write_stream(open_request, context, event_ids, send)
            if open_request.stream
            else self._write_whole(open_request, send)
        )
        writing = asyncio.create_task(answer)
        leaving = [
            asyncio.create_task(_disconnected(receive)),
            asyncio.create_task(open_request.queue.overflowed.wait()),
        ]
        try:
            await asyncio.wait([writing, *leaving], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
                return True
            if open_request.queue.overflowed.is_set() and context.body is not None:
                context.body.abort()
            return False
        finally:
            for task in (writing, *leaving):
                task.cancel()
            await asyncio.gather(writing, *leaving, return_exceptions=True)

    async def write_unfinished(self, stored: StoredRequest, send: Send) -> None:
        """Write 202: the answer is not complete yet."""
        body = self._dialect(stored.answer_format).unfinished(stored, self.system_fingerprint)
        await write_json(send, body, 202, [_RETRY_AFTER])

    async def _write_stream(
        self, open_request: OpenRequest, context: RequestContext, event_ids: bool, send: Send
    ) -> None:
        """Write the answer as events: its head with `send`, all else with the server's own, which is faster.

        Media refused within `hold_headers_s` are a real 4xx, later an error event.
        """
        # Not asyncio.wait_for: on Python 3.11 it swallows the cancellation of a client that left if the event is set.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.hold_headers_s):
                await open_request.accepted.wait()
        if open_request.failure is not None:
            raise RequestError(open_request.failure)
        dialect = self._dialect(open_request.answer_format)
        events = dialect.events(open_request, self.system_fingerprint, event_ids)
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        context.ask_client = lambda: open_request.keep_alive(time.time())
        writer = StreamWriter(open_request, events, context.write, context.body)
        if open_request.resumed:
            open_request.mark_client_has_id()
        elif first := events.begin():
            await writer.send(first)
            open_request.mark_client_has_id()
        await writer.run()
        await writer.send(events.end(open_request), more=False)

    async def _write_whole(self, open_request: OpenRequest, send: Send) -> None:
        collected = [CollectedChoice() for _ in open_request.choices]
        while not open_request.done:
            for index, delta in await open_request.queue.next_deltas():
                collected[index].add(delta)
        if open_request.failure is not None:
            raise RequestError(open_request.failure)
        dialect = self._dialect(open_request.answer_format)
        if any(one.prompt_logprobs for one in collected):  # many megabytes at times, for which no stream should wait
            body = await asyncio.to_thread(dialect.whole, open_request, self.system_fingerprint, collected)
        else:
            body = dialect.whole(open_request, self.system_fingerprint, collected)
        await write_json(send, body, 200, [])

    def _dialect(self, answer_format: AnswerFormat) -> Dialect:
        """
        Raises:
            RequestError: 503, a gateway of a later release took the request, and writes its answer in another way.
        """
        dialect = self.dialects.get(answer_format.dialect)
        if dialect is None:
            raise RequestError(UNKNOWN_API)
        return dialect


async def _write(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})


def json_response(value: Any, status: int = 200) -> Response:
    """Return a value as the whole response of a route."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def write_json(send: Send, body: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    """Write a body as the whole response."""
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await _write(send, body)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def write_failure(failure: Failure, send: Send, headers: Mapping[str, str], body: FailureBody) -> None:
    """Write a failure as the whole response."""
    response = error_response(failure, headers, body)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await _write(send, bytes(response.body))

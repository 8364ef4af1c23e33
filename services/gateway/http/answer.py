"""Answers one open request: a stream of events, or one JSON body; and notices when the client has gone."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway.errors import RETRY_AFTER_S, error_response
from services.gateway.http.openai import (
    DONE,
    KEEP_ALIVE,
    Chunks,
    Collected,
    Head,
    Marks,
    completion,
    error_event,
    merge,
    total_usage,
    unfinished,
)
from services.gateway.inflight.pipeline import Known
from services.gateway.inflight.request import OpenRequest
from shared import log
from shared.errors import Failure, RequestError, internal
from shared.messages import Usage

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_RETRY_AFTER = (b"retry-after", str(RETRY_AFTER_S).encode())

logger = log.logger(__name__)


class Answerer(msgspec.Struct, frozen=True):
    """How answers are labelled, and how long a stream's status may wait for its media to be checked."""

    system_fingerprint: str
    hold_headers_s: float

    async def respond(self, open_request: OpenRequest, request: Request, receive: Receive, send: Send) -> None:
        """Answer, and log how it ended."""
        outcome = "answered"
        try:
            if not await self.answer(open_request, receive, send):
                outcome = "client left"
        except RequestError as error:
            outcome = f"failed {error.failure.status}"
            # Unlike a refusal, this has run; unless it says "later", running it again would end the same way.
            headers = {"x-should-retry": "false"} if error.failure.status != 503 else {}
            await refuse(error.failure, send, headers)
        finally:
            duration = round(time.time() - open_request.created, 3)
            fields = {
                "request_id": open_request.id,
                "http_request_id": request.scope["request_id"],
                "seconds": duration,
            }
            if (span := request.scope["span"]) is not None:
                fields["trace_id"] = span.trace_id
            logger.info(outcome, extra=fields)

    async def answer(self, open_request: OpenRequest, receive: Receive, send: Send) -> bool:
        """Write the answer; False if the client left or would not read, and it was not written to the end.

        Raises:
            RequestError: the request failed before anything was written.
        """
        write = self._stream if open_request.stream else self._collect
        writing = asyncio.create_task(write(open_request, send))
        leaving = [asyncio.create_task(_disconnected(receive)), asyncio.create_task(open_request.cut_off.wait())]
        try:
            await asyncio.wait([writing, *leaving], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
                return True
            return False
        finally:
            for task in (writing, *leaving):
                task.cancel()
            await asyncio.gather(writing, *leaving, return_exceptions=True)

    async def say_unfinished(self, known: Known, send: Send) -> None:
        """202: there is no whole answer yet."""
        await _write_json(send, unfinished(self._head(known)), 202, [_RETRY_AFTER])

    def _head(self, request: OpenRequest | Known) -> Head:
        return Head(f"chatcmpl-{request.id}", int(request.created), request.form.model, self.system_fingerprint)

    async def _stream(self, open_request: OpenRequest, send: Send) -> None:
        """Bad media are a real 4xx as long as they are found in time; then the stream starts and errors are in it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(open_request.accepted.wait(), self.hold_headers_s)
        if open_request.failure is not None:
            raise RequestError(open_request.failure)
        form = open_request.form
        chunks = Chunks(self._head(open_request), form.n, form.include_usage, form.token_ids)
        marks = Marks(open_request.since)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        open_request.announced = open_request.resumed
        if not open_request.resumed and (openings := chunks.openings(marks.line())):
            await _write(send, openings)
            open_request.announced = True
        while not open_request.done:
            news = merge(await open_request.take())
            if news:
                events = (chunks.delta(index, delta, marks, open_request.shown(index)) for index, delta in news)
                await _write(send, b"".join(events))
                open_request.announced = True
            elif not open_request.done:
                await _write(send, KEEP_ALIVE)
        await _write(send, _ending(open_request, chunks), more=False)

    async def _collect(self, open_request: OpenRequest, send: Send) -> None:
        form = open_request.form
        collected = [Collected() for _ in range(form.n)]
        while not open_request.done:
            for index, delta in await open_request.take():
                collected[index].add(delta)
        if open_request.failure is not None:
            raise RequestError(open_request.failure)
        choices = [choice.choice(index, form.logprobs, form.token_ids) for index, choice in enumerate(collected)]
        body = completion(self._head(open_request), choices, total_usage(_usages(open_request)))
        await _write_json(send, body, 200, [])


def _ending(open_request: OpenRequest, chunks: Chunks) -> bytes:
    if open_request.failure is not None:
        return error_event(open_request.failure) + DONE
    if not open_request.form.include_usage:
        return DONE
    try:
        return chunks.usage(total_usage(_usages(open_request))) + DONE
    except RequestError as error:
        return error_event(error.failure) + DONE


def _usages(open_request: OpenRequest) -> list[Usage]:
    usages = [choice.usage for choice in open_request.choices if choice.usage is not None]
    if len(usages) != len(open_request.choices):
        raise internal("An answer ended without its usage.")
    return usages


async def _write(send: Send, body: bytes, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _write_json(send: Send, body: bytes, status: int, headers: list[tuple[bytes, bytes]]) -> None:
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await _write(send, body, more=False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(failure: Failure, send: Send, headers: Mapping[str, str]) -> None:
    """Write a failure as the whole answer."""
    response = error_response(failure, headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await _write(send, bytes(response.body), more=False)

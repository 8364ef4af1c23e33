"""Answers one open request: a stream of events, or one JSON body; and notices when the client has gone."""

import asyncio
import contextlib
import time
from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Send

from services.gateway.errors import RETRY_AFTER_S, error_response
from services.gateway.exchange import Exchange
from services.gateway.pipeline import Known
from services.gateway.replies import (
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

    async def respond(self, exchange: Exchange, request: Request, receive: Receive, send: Send) -> None:
        """Answer, and log how it ended."""
        outcome = "answered"
        try:
            if not await self.answer(exchange, receive, send):
                outcome = "client left"
        except RequestError as error:
            outcome = f"failed {error.failure.status}"
            # Unlike a refusal, this has run; unless it says "later", running it again would end the same way.
            headers = {"x-should-retry": "false"} if error.failure.status != 503 else {}
            await refuse(error.failure, send, headers)
        finally:
            duration = round(time.time() - exchange.created, 3)
            fields = {"request_id": exchange.id, "http_request_id": request.scope["request_id"], "seconds": duration}
            if (span := request.scope["span"]) is not None:
                fields["trace_id"] = span.trace_id
            logger.info(outcome, extra=fields)

    async def answer(self, exchange: Exchange, receive: Receive, send: Send) -> bool:
        """Write the answer; False if the client left or would not read, and it was not written to the end.

        Raises:
            RequestError: the request failed before anything was written.
        """
        write = self._stream if exchange.stream else self._collect
        writing = asyncio.create_task(write(exchange, send))
        leaving = [asyncio.create_task(_disconnected(receive)), asyncio.create_task(exchange.cut_off.wait())]
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

    def _head(self, request: Exchange | Known) -> Head:
        return Head(f"chatcmpl-{request.id}", int(request.created), request.form.model, self.system_fingerprint)

    async def _stream(self, exchange: Exchange, send: Send) -> None:
        """Bad media are a real 4xx as long as they are found in time; then the stream starts and errors are in it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exchange.accepted.wait(), self.hold_headers_s)
        if exchange.failure is not None:
            raise RequestError(exchange.failure)
        form = exchange.form
        chunks = Chunks(self._head(exchange), form.n, form.include_usage, form.token_ids)
        marks = Marks(exchange.since)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        exchange.announced = exchange.resumed
        if not exchange.resumed and (openings := chunks.openings(marks.line())):
            await _write(send, openings)
            exchange.announced = True
        while not exchange.done:
            news = merge(await exchange.take())
            if news:
                events = (chunks.delta(index, delta, marks, exchange.shown(index)) for index, delta in news)
                await _write(send, b"".join(events))
                exchange.announced = True
            elif not exchange.done:
                await _write(send, KEEP_ALIVE)
        await _write(send, _ending(exchange, chunks), more=False)

    async def _collect(self, exchange: Exchange, send: Send) -> None:
        form = exchange.form
        collected = [Collected() for _ in range(form.n)]
        while not exchange.done:
            for index, delta in await exchange.take():
                collected[index].add(delta)
        if exchange.failure is not None:
            raise RequestError(exchange.failure)
        choices = [choice.choice(index, form.logprobs, form.token_ids) for index, choice in enumerate(collected)]
        body = completion(self._head(exchange), choices, total_usage(_usages(exchange)))
        await _write_json(send, body, 200, [])


def _ending(exchange: Exchange, chunks: Chunks) -> bytes:
    if exchange.failure is not None:
        return error_event(exchange.failure) + DONE
    if not exchange.form.include_usage:
        return DONE
    try:
        return chunks.usage(total_usage(_usages(exchange))) + DONE
    except RequestError as error:
        return error_event(error.failure) + DONE


def _usages(exchange: Exchange) -> list[Usage]:
    usages = [choice.usage for choice in exchange.choices if choice.usage is not None]
    if len(usages) != len(exchange.choices):
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

"""Answers one open request: a stream of events, or one JSON body; and notices when the client has gone."""

import asyncio
import contextlib
from collections.abc import Mapping

import msgspec
from starlette.types import Receive, Send

from services.gateway.errors import error_response
from services.gateway.exchange import Exchange
from services.gateway.replies import (
    DONE,
    KEEP_ALIVE,
    Chunks,
    Collected,
    Head,
    completion,
    error_event,
    merge,
    total_usage,
)
from shared.errors import Failure, RequestError, internal
from shared.messages import Usage

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON_HEADERS = [(b"content-type", b"application/json")]


class Answerer(msgspec.Struct, frozen=True):
    """How answers are labelled, and how long a stream's status may wait for its media to be checked."""

    model: str
    system_fingerprint: str
    hold_headers_s: float

    async def answer(self, exchange: Exchange, receive: Receive, send: Send) -> bool:
        """Write the answer; False if the client left or would not read, and it was not written to the end.

        Raises:
            RequestError: the request failed before anything was written.
        """
        write = self._stream if exchange.order.stream else self._collect
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

    def _head(self, exchange: Exchange) -> Head:
        return Head(f"chatcmpl-{exchange.id}", int(exchange.created), self.model, self.system_fingerprint)

    async def _stream(self, exchange: Exchange, send: Send) -> None:
        """Bad media are a real 4xx as long as they are found in time; then the stream starts and errors are in it."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(exchange.accepted.wait(), self.hold_headers_s)
        if exchange.failure is not None:
            raise RequestError(exchange.failure)
        order = exchange.order
        chunks = Chunks(self._head(exchange), order.n, order.include_usage)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        prompt_ids = order.prompt_ids if order.output.return_token_ids else None
        await _write(send, b"".join(chunks.opening(index, prompt_ids) for index in range(order.n)))
        while not exchange.done:
            news = merge(await exchange.take())
            if news:
                await _write(send, b"".join(chunks.delta(index, delta) for index, delta in news))
            elif exchange.failure is None:
                await _write(send, KEEP_ALIVE)
        await _write(send, _ending(exchange, chunks), more=False)

    async def _collect(self, exchange: Exchange, send: Send) -> None:
        order = exchange.order
        collected = [Collected() for _ in range(order.n)]
        while not exchange.done:
            for index, delta in await exchange.take():
                collected[index].add(delta)
        if exchange.failure is not None:
            raise RequestError(exchange.failure)
        with_ids, with_logprobs = order.output.return_token_ids, order.output.logprobs
        choices = [
            choice.choice(index, with_logprobs, order.prompt_ids, with_ids) for index, choice in enumerate(collected)
        ]
        body = completion(self._head(exchange), choices, total_usage(_usages(exchange)))
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*_JSON_HEADERS, length]})
        await _write(send, body, more=False)


def _ending(exchange: Exchange, chunks: Chunks) -> bytes:
    if exchange.failure is not None:
        return error_event(exchange.failure) + DONE
    if not exchange.order.include_usage:
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


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def refuse(failure: Failure, send: Send, headers: Mapping[str, str]) -> None:
    """Write a failure as the whole answer."""
    response = error_response(failure, headers)
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await _write(send, bytes(response.body), more=False)

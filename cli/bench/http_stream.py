"""Streams of completions and chats over connections that are kept, read as they arrive and stamped at once.

A client library between socket and stamp would be what is measured at ten thousand events a second.
"""

import asyncio
import re
import ssl
import time
from typing import cast
from urllib.parse import SplitResult, urlsplit

import msgspec
from httptools import HttpResponseParser

from cli.bench.load import Answer

MOST_OF_AN_ERROR = 300  # bytes
CONTENT_LENGTH = b"content-length: "  # the last header of a request
_ZONE = re.compile(r"%[^]]*")  # of an IPv6 address: it means something to this machine alone


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str = ""
    delta: _Delta | None = None
    finish_reason: str | None = None
    logprobs: dict[str, object] | None = None

    @property
    def has_token(self) -> bool:
        """True unless it only says who speaks, or why the answer ended. One without text, which has part of a
        character, is known in a chat by its log-probability."""
        if self.delta is not None:
            return bool(self.delta.content or self.delta.reasoning_content or self.logprobs)
        return bool(self.text) or self.finish_reason is None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    """Event of a stream, as far as it counts here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


_event = msgspec.json.Decoder(_Event)


class Connection(asyncio.Protocol):
    """Connection to the server, for one request after the other."""

    def __init__(self) -> None:
        self.open = False
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None  # of the request that is under way, or was last

    async def stream(self, head: bytes, body: bytes, answer: Answer) -> None:
        """Send a request and note what comes, until the answer has ended."""
        assert self._transport is not None
        self._answer = answer
        self._parser = HttpResponseParser(self)
        self._rest = b""  # of a line, or what an error's body says
        self._error: str | None = None  # that an event told of
        self._now = 0.0
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(head + body)
        await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------------ asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except Exception as error:  # of bytes that are no answer, and of callbacks, which httptools wraps
            self._end(f"the answer cannot be read: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self._end("the connection was closed before the answer had ended")

    # ---------------------------------------------------------------------------------------- the parser's callbacks

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._rest = (self._rest + body)[:MOST_OF_AN_ERROR]
            return
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._on_event(line[5:].strip())

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        self.open = self.open and self._parser.should_keep_alive()
        if status != 200:
            self._end(f"HTTP {status}: {self._rest.decode(errors='replace')}")
        elif self._error is None and self._answer.tokens is None:
            self._end("the stream ended without usage")
        else:
            self._end(self._error)

    def _on_event(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        event = _event.decode(data)
        if (error := bytes(event.error)) not in (b"", b"null"):
            self._error = error[:MOST_OF_AN_ERROR].decode(errors="replace")
        if event.usage is not None:
            self._answer.tokens = event.usage.completion_tokens
        if any(choice.has_token for choice in event.choices):
            self._answer.events.append(self._now)

    def _end(self, error: str | None) -> None:
        if self._done is None or self._done.done():
            return
        self._answer.error = error
        self._answer.ended = time.monotonic()
        self._done.set_result(None)


def host_of(parts: SplitResult) -> str:
    """Return the host that a URL names; behind that of an IPv6 address, % and its zone, which follows %25 in a URL."""
    return (parts.hostname or "127.0.0.1").replace("%25", "%", 1)


class Pool:
    """Connections to one server. A request takes an idle one, or opens another."""

    def __init__(self, url: str, key: str) -> None:
        parts = urlsplit(url)
        self.host = host_of(parts)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        authorization = f"authorization: Bearer {key}\r\n" if key else ""
        self._head = (
            f"POST {parts.path} HTTP/1.1\r\nhost: {_ZONE.sub('', parts.netloc)}\r\n{authorization}"
            "content-type: application/json\r\naccept: text/event-stream\r\n"
        ).encode() + CONTENT_LENGTH
        self._idle: list[Connection] = []

    async def ask(self, body: bytes, answer: Answer) -> None:
        """Send one request and read its answer. A connection that must be opened first counts as waiting for it."""
        answer.sent = time.monotonic()
        try:
            connection = await self._connection()
        except (OSError, UnicodeError) as error:  # UnicodeError: of a name that no host can have, as a..b
            answer.error, answer.ended = f"cannot connect: {str(error) or type(error).__name__}", time.monotonic()
            return
        try:
            await connection.stream(self._head + b"%d\r\n\r\n" % len(body), body, answer)
        except asyncio.CancelledError:
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the connections that are idle."""
        for connection in self._idle:
            connection.close()

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self.host, self._port, ssl=self._tls)
        return connection

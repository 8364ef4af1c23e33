"""One Redis connection for the token path, spoken with as little in between as can be.

redis-py spends about ten times longer on a command than the command takes. Where a message is sent and another read for
every engine step, that is most of the step's cost, so those two go through here (benchmarks/pipeline.py has the
figures); all else stays with redis-py. Errors are redis-py's, so callers need not know.
"""

import asyncio
import ssl
from collections import deque
from typing import Any, cast

import hiredis
from redis.asyncio.connection import parse_url
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from shared.errors import ConfigError

Word = str | bytes | int | float

_CONNECT_S = 5.0


class Wire:
    """Commands are sent in the order of the calls and answered in that order; replies come as Redis sent them.

    A broken connection fails the calls that wait with redis-py's ConnectionError, and the next call connects anew: the
    caller decides whether its command may be repeated.
    """

    def __init__(self, url: str) -> None:
        """
        Raises:
            ConfigError: the URL is malformed.
        """
        try:
            self._options: dict[str, Any] = dict(parse_url(url))
        except ValueError:
            raise ConfigError("malformed Redis URL; expected redis://, rediss:// or unix://") from None
        self._tls = url.startswith("rediss://")
        self._link: _Link | None = None
        self._connecting = asyncio.Lock()

    async def call(self, *words: Word) -> Any:
        """
        Raises:
            redis.exceptions.ConnectionError: there is no connection, or it broke before the reply.
            redis.exceptions.ResponseError: Redis refused the command.
        """
        link = self._link
        if link is None or link.closed:
            link = await self._connected()
        reply = await link.send(words)
        if isinstance(reply, hiredis.ReplyError):
            raise _error(str(reply))
        return reply

    def close(self) -> None:
        """Drop the connection and with it whatever is waited for."""
        if self._link is not None:
            self._link.close()

    async def _connected(self) -> "_Link":
        async with self._connecting:
            if self._link is None or self._link.closed:
                try:
                    async with asyncio.timeout(_CONNECT_S):
                        self._link = await self._connect()
                except (OSError, TimeoutError) as error:
                    raise RedisConnectionError(f"cannot connect to Redis: {error}") from error
            return self._link

    async def _connect(self) -> "_Link":
        loop, options = asyncio.get_running_loop(), self._options
        if "path" in options:
            _, link = await loop.create_unix_connection(_Link, options["path"])
        else:
            context = ssl.create_default_context(cafile=options.get("ssl_ca_certs")) if self._tls else None
            _, link = await loop.create_connection(
                _Link, options.get("host", "localhost"), int(options.get("port", 6379)), ssl=context
            )
        for words in self._greeting():
            reply = await link.send(words)
            if isinstance(reply, hiredis.ReplyError):
                link.close()
                raise _error(str(reply))
        return link

    def _greeting(self) -> list[tuple[Word, ...]]:
        options, greeting = self._options, list[tuple[Word, ...]]()
        if options.get("password"):
            user = (options["username"],) if options.get("username") else ()
            greeting.append(("AUTH", *user, options["password"]))
        if options.get("db"):
            greeting.append(("SELECT", int(options["db"])))
        return greeting


class _Link(asyncio.Protocol):
    """The socket, and who waits for its replies. A caller that stops waiting leaves its reply to be thrown away."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = hiredis.Reader()
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self.closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods without the base class

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(RedisConnectionError("Redis closed the connection"))

    def send(self, words: tuple[Word, ...]) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self.closed or self._transport is None:
            future.set_exception(RedisConnectionError("Redis closed the connection"))
            return future
        self._waiting.append(future)
        self._transport.write(hiredis.pack_command(words))  # type: ignore[arg-type]
        return future

    def close(self) -> None:
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


def _error(text: str) -> ResponseError:
    code, _, rest = text.partition(" ")
    return NoScriptError(rest) if code == "NOSCRIPT" else ResponseError(text)

"""Replies of Redis to one command after the other, read from a transport without a stream in between."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import hiredis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse

_INCOMPLETE = object()


class Replies(asyncio.Protocol):
    """Protocol that takes an open connection over from another one, until `give_back`."""

    def __init__(self, transport: asyncio.Transport, error_of: Callable[[str], Exception]) -> None:
        """`error_of` makes the exception of an error's text."""
        self._transport = transport
        self._before = transport.get_protocol()
        self._loop = asyncio.get_running_loop()
        self._parser = hiredis.Reader(protocolError=InvalidResponse, replyError=error_of, notEnoughData=_INCOMPLETE)
        self._reply: asyncio.Future[Any] | None = None  # that is waited for
        self._lost: RedisConnectionError | None = None
        self._due = 0.0  # when the reply must be there
        # Looks at `_due`. One timer outlives many commands, since a timer for each costs as much as its reply.
        self._timer: asyncio.Handle | None = None
        self._looks_at = 0.0  # uvloop's handle of a timer that is due at once does not say
        transport.set_protocol(self)

    async def ask(self, command: bytes, limit_s: float) -> Any:
        """Send a command, and return the reply or the error that Redis replies. Calls must not overlap.

        Whatever this raises leaves the connection good for nothing but to be closed.

        Raises:
            RedisConnectionError: the connection is lost.
            TimeoutError: there is no reply after `limit_s`.
        """
        if self._lost is not None:
            raise self._lost
        self._reply = self._loop.create_future()
        self._due = self._loop.time() + limit_s
        if self._timer is None or self._looks_at > self._due:
            self._look_at(self._due)
        self._transport.write(command)  # never more than one, so nothing is drained
        try:
            return await self._reply
        finally:
            self._reply = None

    def give_back(self) -> None:
        """Return the connection to the protocol that had it before."""
        self._end()
        if self._lost is None:
            self._transport.set_protocol(self._before)

    def data_received(self, data: bytes) -> None:
        if self._reply is None:  # nobody has asked: the next reply would be taken for another command's
            self._transport.abort()
            return
        try:
            self._parser.feed(data)
            reply = self._parser.gets()
        except InvalidResponse as error:
            self._fail(error)
            return
        if reply is _INCOMPLETE:
            return
        if not self._reply.done():
            self._reply.set_result(reply)
        if self._parser.has_data():  # as above
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = RedisConnectionError("Connection closed by server." if exc is None else f"{exc} on the connection")
        self._end()
        self._fail(self._lost)
        cast(asyncio.Protocol, self._before).connection_lost(exc)

    def _fail(self, error: Exception) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)

    def _look_at(self, when: float) -> None:
        self._end()
        self._looks_at = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._reply is None:
            return
        if self._loop.time() < self._due:
            self._look_at(self._due)
        else:
            self._fail(TimeoutError())

    def _end(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

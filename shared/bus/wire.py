"""Dedicated connection for a loop that sends command after command, one or more for every step of the engine.

It is redis-py's connection, so address, TLS, names, keepalive, errors and retries are as everywhere. It leaves out the
work of redis-py's client around each command, which costs more than the command: taking a connection from the pool and
checking it, events for metrics, conversion of replies (docs/pipeline-performance.md).
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.bus.client import REPLY_S, suspect

LIMIT_S = REPLY_S  # for the reply, beyond the time the command itself may block

Word = str | bytes | int | float


class Wire:
    """Connection from a client's pool, taken at the first call and kept. Calls must not overlap."""

    def __init__(self, redis: Redis, again: Callable[[], Iterable[Sequence[Word]]] = tuple) -> None:
        """`again` returns the commands that are sent before any other when the wire is connected anew."""
        self._redis = redis
        self._pool = redis.connection_pool
        self._again = again
        self._opened = 0  # times that the connection had been opened when `again` was called
        self._connection: AbstractConnection | None = None

    async def call(self, *words: Word, wait_s: float = 0.0) -> Any:
        """Send one command; return its reply as Redis sends it: bytes, integers, lists of these, None.

        The command is sent again when the connection breaks, as redis-py does, so Redis may run it twice. `wait_s` is
        how long the command itself may block: MAX_BLOCK_MS at most. A cancelled call closes its connection, so that no
        reply is ever taken for another command's.

        Raises:
            RedisError: redis-py's, of the same kinds.
        """
        connection = self._connection
        if connection is None:
            connection = self._connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return await connection.retry.call_with_retry(
            lambda: self._exchange(connection, words, LIMIT_S + wait_s), lambda error: self._break(connection, error)
        )

    async def _exchange(self, connection: Any, words: Sequence[Word], limit_s: float) -> Any:
        """Send a command and read its reply, connecting first if necessary. Anything but a reply closes the connection.

        Raises:
            RedisTimeoutError: it took longer than `limit_s`.
        """
        try:
            async with asyncio.timeout(limit_s):
                await connection.ensure_connected()
                if self._opened != connection.opened:
                    await self._send_again(connection)
                await connection.send_packed_command(_packed([words]), check_health=False)
                return await connection.read_response()
        except TimeoutError:
            raise RedisTimeoutError(f"no reply to {words[0]!r} within {limit_s} s") from None

    async def _send_again(self, connection: Any) -> None:
        """Send at once whatever comes before all else over a new connection, and read the replies."""
        commands = list(self._again())
        if commands:
            try:
                await connection.send_packed_command(_packed(commands), check_health=False)
                for _ in commands:
                    await connection.read_response()
            except BaseException:
                await connection.disconnect(nowait=True)  # some replies have not been read
                raise
        self._opened = connection.opened

    async def _break(self, connection: AbstractConnection, error: Exception) -> None:
        """Close a connection that failed, and suspect all others when it fell silent."""
        await connection.disconnect(nowait=True)
        if isinstance(error, RedisTimeoutError):
            suspect(self._redis)

    async def close(self) -> None:
        """Return the connection to the pool. The client's own `aclose` closes it, too."""
        if self._connection is not None:
            await self._pool.release(self._connection)
            self._connection = None


class WireScript:
    """Lua script, called over a wire as redis-py's registered scripts are over a client."""

    def __init__(self, wire: Wire, text: str) -> None:
        self._wire = wire
        self._text = text
        self._sha = sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[str], args: Sequence[Word]) -> Any:
        words = (len(keys), *keys, *args)
        try:
            return await self._wire.call("EVALSHA", self._sha, *words)
        except NoScriptError:
            return await self._wire.call("EVAL", self._text, *words)  # loads it, too


def _packed(commands: Sequence[Sequence[Word]]) -> bytes:
    return b"".join(hiredis.pack_command(tuple(words)) for words in commands)  # type: ignore[arg-type]  # "of one"

"""Dedicated connection for a loop that sends command after command, one or more for every step of the engine.

It is redis-py's connection, so address, TLS, names, keepalive, errors and retries are as everywhere. It leaves out the
work of redis-py's client around each command, which costs more than the command: taking a connection from the pool and
checking it, events for metrics, conversion of replies (docs/pipeline-performance.md).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.bus.client import REPLY_S, suspect

LIMIT_S = REPLY_S  # for the reply, beyond the time the command itself may block
AGAIN_BYTES = 64 << 10  # of commands that are sent again at once, within LIMIT_S

Word = str | bytes | int | float


class Wire:
    """Connection from a client's pool, taken at the first call and kept. Calls must not overlap."""

    def __init__(self, redis: Redis, again: Callable[[], Iterable[Sequence[Word]]] = tuple) -> None:
        """`again` returns the commands that are sent before any other when the wire is connected anew, in order."""
        self._redis = redis
        self._pool = redis.connection_pool
        self._again = again
        self._left = deque[bytes]()  # of these, in Redis' protocol
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
            RedisTimeoutError: it took longer than `limit_s`, or a part of what is sent before it longer than LIMIT_S.
        """
        try:
            async with asyncio.timeout(limit_s):
                await connection.ensure_connected()
            while self._left or self._opened != connection.opened:
                async with asyncio.timeout(LIMIT_S):
                    await self._send_again(connection)
            async with asyncio.timeout(limit_s):
                await connection.send_packed_command(_packed(words), check_health=False)
                return await connection.read_response()
        except TimeoutError:
            raise RedisTimeoutError(f"no reply to {words[0]!r} within {limit_s} s") from None

    async def _send_again(self, connection: Any) -> None:
        """Send a part of whatever comes before all else over a new connection: all of the part, or nothing.

        Where it fails the next call goes on with this part, over the same connection or another: from the first one
        on, a Redis that is slow or full would never have taken all of it.
        """
        if self._opened != connection.opened:
            self._opened = connection.opened
            self._left = self._left or deque(_packed(words) for words in self._again())
        size = count = 0
        while count < len(self._left) and size < AGAIN_BYTES:
            size += len(self._left[count])
            count += 1
        if count:
            await _send_together(connection, [self._left[nth] for nth in range(count)])
        for _ in range(count):
            self._left.popleft()

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


async def _send_together(connection: Any, commands: Sequence[bytes]) -> None:
    """Send commands as one transaction.

    Raises:
        RedisError: none of them was run, or one has failed.
    """
    replies: list[Any] = []
    try:
        await connection.send_packed_command([_packed(["MULTI"]), *commands, _packed(["EXEC"])], check_health=False)
        for _ in range(len(commands) + 2):
            try:
                replies.append(await connection.read_response())
            except ResponseError as error:
                replies.append(error)
    except BaseException:
        await connection.disconnect(nowait=True)  # some replies have not been read
        raise
    run = replies[-1] if isinstance(replies[-1], list) else []
    for reply in (*replies, *run):
        if isinstance(reply, Exception):
            raise reply


def _packed(words: Sequence[Word]) -> bytes:
    packed: bytes = hiredis.pack_command(tuple(words))  # type: ignore[arg-type]  # annotated as a tuple of one
    return packed

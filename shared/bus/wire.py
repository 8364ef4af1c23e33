"""Dedicated connection for a loop that sends command after command, one or more for every step of the engine.

redis-py opens it, so address, TLS, names, keepalive, errors and retries are as everywhere. Then replies are read from
its transport at once (shared/bus/replies.py), without the work of redis-py's client around each command, which costs
more than the command: a connection from the pool, events for metrics, three time limits, a stream, conversion of
replies (docs/pipeline-performance.md).
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha1
from typing import Any

import hiredis
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.bus.client import REPLY_S, suspect
from shared.bus.replies import Replies

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
        self._connection: Any = None  # of shared/bus/client.py
        self._replies: Replies | None = None  # to it, once it is open and all of `again` was sent

    async def call(self, *words: Word, wait_s: float = 0.0) -> Any:
        """Send one command; return its reply as Redis sends it: bytes, integers, lists of these, None.

        The command is sent again when the connection breaks, as redis-py does, so Redis may run it twice. `wait_s` is
        how long the command itself may block: MAX_BLOCK_MS at most. A cancelled call closes its connection, so that no
        reply is ever taken for another command's.

        Raises:
            RedisError: redis-py's, of the same kinds.
        """
        if self._connection is None:
            self._connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return await self._connection.retry.call_with_retry(
            lambda: self._exchange(words, LIMIT_S + wait_s), self._break
        )

    async def _exchange(self, words: Sequence[Word], limit_s: float) -> Any:
        """Send a command and return its reply, connecting first if necessary.

        Raises:
            RedisTimeoutError: it took longer than `limit_s`, or a part of what is sent before it longer than LIMIT_S.
        """
        try:
            replies = self._replies
            if replies is None or not self._connection.is_current:
                replies = await self._open(limit_s)
            reply = await replies.ask(_packed(words), limit_s)
        except TimeoutError:
            raise RedisTimeoutError(f"no reply to {words[0]!r} within {limit_s} s") from None
        except BaseException:
            if self._replies is not None:  # else redis-py has closed what it had to
                await self._disconnect()
            raise
        if isinstance(reply, RedisError):
            self._connection.note_error(reply)
            raise reply
        return reply

    async def _open(self, limit_s: float) -> Replies:
        """Connect, send whatever comes before all else, and take the connection over from redis-py."""
        connection, self._replies = self._connection, None
        async with asyncio.timeout(limit_s):
            await connection.ensure_connected()
        while self._left or self._opened != connection.opened:
            async with asyncio.timeout(LIMIT_S):
                await self._send_again(connection)
        replies: Replies = connection.take_over()
        self._replies = replies
        return replies

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

    async def _break(self, error: Exception) -> None:
        """Close a connection that failed, and suspect all others when it fell silent."""
        await self._disconnect()
        if isinstance(error, RedisTimeoutError):
            suspect(self._redis)

    async def _disconnect(self) -> None:
        self._replies = None
        await self._connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Return the connection to the pool. The client's own `aclose` closes it, too."""
        connection, replies, self._connection, self._replies = self._connection, self._replies, None, None
        if replies is not None:
            replies.give_back()
        if connection is not None:
            await self._pool.release(connection)


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

"""Factory of Redis clients; no other module makes one."""

import asyncio
import socket
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.errors import ConfigError

MAX_BLOCK_MS = 10_000  # the longest a blocking read may wait: well below the socket's timeout
_SOCKET_TIMEOUT_S = 30.0
_CONNECTIONS = 128
_RETRIES = 12  # about 6 s with the backoff below: a restart of Redis is a stall, not an error


def connect(url: str) -> Redis:
    """Return an asyncio client that returns bytes, with hiredis, and reconnects with backoff.

    A command whose connection broke is sent again, so Redis may run it twice (at least once): every caller must allow
    for that. When all connections are in use a command waits for one. Close the client with `aclose()`.

    Raises:
        ConfigError: the URL is malformed.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_SOCKET_TIMEOUT_S,
            protocol=2,  # one reply format for Redis 7 and Valkey 9, with fewer bytes than RESP3's maps
            retry=Retry(
                ExponentialWithJitterBackoff(cap=1.0, base=0.01), _RETRIES, (RedisConnectionError, RedisTimeoutError)
            ),
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=5.0,
            health_check_interval=30,
            **_keepalive(url),
        )
        pool.connection_class = _cancellable(pool.connection_class)
        pool.make_connection()  # type: ignore[no-untyped-call]  # opens nothing; refuses unknown options in the URL's query
    except (ValueError, TypeError) as error:
        # The library's message may quote the URL, and with it a password.
        raise ConfigError(
            f"malformed Redis URL ({type(error).__name__}); expected redis://, rediss:// or unix://"
        ) from None
    return Redis.from_pool(pool)


def _cancellable(base: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a subclass of `base` that sends under `asyncio.timeout`.

    redis-py sends under `asyncio.wait_for`, which until Python 3.12 loses a cancellation that arrives just when the
    command has been sent: a loop over commands then goes on for ever, and the task that cancelled it waits for ever.
    """

    class Cancellable(base):  # type: ignore[misc,valid-type]  # the base depends on the URL
        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            if not self.is_connected:
                await self.connect_check_health(check_health=False)
            if check_health:
                await self.check_health()
            words = [command.encode()] if isinstance(command, str) else command
            try:
                async with asyncio.timeout(self.socket_timeout):
                    await self._send_packed_command([words] if isinstance(words, bytes) else words)
            except TimeoutError as error:
                await self.disconnect(nowait=True)
                raise RedisTimeoutError("Timeout writing to socket") from error
            except OSError as error:
                await self.disconnect(nowait=True)
                raise RedisConnectionError(f"{error} while writing to socket") from error
            except BaseException:
                await self.disconnect(nowait=True)  # half a command may have been sent
                raise

    return Cancellable


async def command(redis: Redis, *words: str | bytes | int | float) -> Any:
    """Run one command, given as words; return the reply as redis-py parses it (whose own methods have loose types)."""
    return await redis.execute_command(*words)  # type: ignore[no-untyped-call]


def _keepalive(url: str) -> dict[str, object]:
    """Return the options by which a connection, even one that only listens, notices a vanished peer in about 20 s."""
    if urlsplit(url).scheme == "unix":
        return {}
    options = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 2}
    return {"socket_keepalive": True, "socket_keepalive_options": options}

"""The only place that builds Redis clients."""

import socket
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, TimeoutError

from shared.errors import ConfigError

MAX_BLOCK_MS = 10_000  # the longest a blocking read may wait: well below the socket's timeout
_SOCKET_TIMEOUT_S = 30.0
_CONNECTIONS = 128
_RETRIES = 12  # about 6 s with the backoff below: a restart of Redis is a stall, not an error


def connect(url: str) -> Redis:
    """An asyncio client that returns bytes, with hiredis, reconnecting with backoff.

    A command whose connection broke is sent again, so it may be carried out twice: every hop must bear that anyway.
    When all connections are in use a command waits for one. Close it with `aclose()`.

    Raises:
        ConfigError: the URL is malformed.
    """
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=_SOCKET_TIMEOUT_S,
            protocol=2,  # one reply format for Redis 7 and Valkey 9, with fewer bytes than RESP3's maps
            retry=Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.01), _RETRIES, (ConnectionError, TimeoutError)),
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=5.0,
            health_check_interval=30,
            **_keepalive(url),
        )
        pool.make_connection()  # type: ignore[no-untyped-call]  # opens nothing; refuses unknown options in the URL's query
    except (ValueError, TypeError) as error:
        # The library's message may quote the URL, and with it a password.
        raise ConfigError(
            f"malformed Redis URL ({type(error).__name__}); expected redis://, rediss:// or unix://"
        ) from None
    return Redis.from_pool(pool)


async def command(redis: Redis, *words: str | bytes | int | float) -> Any:
    """One command by its words, with redis-py's parsing of the reply. Its methods' own types are too loose to check."""
    return await redis.execute_command(*words)  # type: ignore[no-untyped-call]


def _keepalive(url: str) -> dict[str, object]:
    """A peer that vanished without a word is noticed in about 20 s, even by a connection that only listens."""
    if urlsplit(url).scheme == "unix":
        return {}
    options = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 2}
    return {"socket_keepalive": True, "socket_keepalive_options": options}

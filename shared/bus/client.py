"""Factory of Redis clients; no other module makes one."""

import asyncio
import re
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import AbstractConnection, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from shared.bus import sentinel
from shared.bus.replies import Replies
from shared.bus.sentinel import Primary, SentinelUrl
from shared.config import CommonSettings
from shared.errors import ConfigError
from shared.log import logger
from shared.redis_errors import Action, SignInError, action_for

# Together less than the default lease, so that a link that swallows what is sent is noticed before others take over.
MAX_BLOCK_MS = 500  # the longest a blocking read may wait
REPLY_S = 2.0  # the longest a reply may take beyond that; then the peer is taken for dead

AUTH_PATIENCE_S = 60.0
_CONNECTIONS = 128
_FREE_CONNECTION_S = 30.0
_CONNECT_S = 2.0
_DATABASE = re.compile(r"/?\d{0,9}/?")  # the path of a URL
_ENCODED = "with %25 for a % in its user or password, %40 for an @, %2F for a /, %3F for a ?, %23 for a #, %5B for a ["
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_ca_path")  # options that name one
_OURS = ("decode_responses", "encoding", "encoding_errors", "protocol")  # options with which no reply could be read
_IGNORED = ("max_connections", "timeout", "socket_timeout")  # and with which replicas wait too shortly, or for ever
_RETRIES = 12  # about 6 s with the backoff below: a restart of Redis is a stall, not an error

_log = logger(__name__)


class Link:
    """State that all connections of one client share."""

    def __init__(self, auth_patience_s: float) -> None:
        self.generation = 0  # connections of an older one are made anew before their next use
        self._patience_s = auth_patience_s
        self._refused_since: float | None = None
        self._given_up: str | None = None

    def suspect(self, generation: int) -> None:
        """Have all connections up to `generation` made anew: their server is no longer the right one, or is gone."""
        self.generation = max(self.generation, generation + 1)

    def accepted(self) -> None:
        """Note that a connection was let in."""
        self._refused_since = None

    def refused(self, why: str) -> None:
        """Note that user or password was refused.

        Raises:
            SignInError: they have been refused for longer than the patience.
        """
        now = time.monotonic()
        self._refused_since = now if self._refused_since is None else self._refused_since
        if now - self._refused_since >= self._patience_s:
            self._given_up = (
                f"Redis has refused our user or password for {self._patience_s:g} s ({why}); correct the URL of Redis "
                "that this replica is started with, or the user in Redis"
            )
        self.check()

    def is_current(self, generation: int) -> bool:
        """Return True if nothing was said against the connections of a generation, nor against user and password."""
        return generation >= self.generation and self._given_up is None

    def check(self) -> None:
        """
        Raises:
            SignInError: user or password had been refused for longer than the patience.
        """
        if self._given_up is not None:
            raise SignInError(self._given_up)


def connect(url: str, auth_patience_s: float = AUTH_PATIENCE_S) -> Redis:
    """Return an asyncio client that returns bytes, with hiredis, and reconnects with backoff.

    A command whose connection broke is sent again, so Redis may run it twice (at least once): every caller must allow
    for that. When all connections are in use a command waits for one. Close the client with `aclose()`.

    Raises:
        ConfigError: the URL is malformed.
    """
    try:
        _check_sign_in(url)
        by_sentinel = sentinel.parse(url)
        plain = url if by_sentinel is None else by_sentinel.primary
        pool = BlockingConnectionPool.from_url(
            _without_ours(plain),
            max_connections=_CONNECTIONS,
            timeout=_FREE_CONNECTION_S,
            protocol=2,  # one reply format for Redis 7 and Valkey 9, with fewer bytes than RESP3's maps
            retry=Retry(
                ExponentialWithJitterBackoff(cap=1.0, base=0.01), _RETRIES, (RedisConnectionError, RedisTimeoutError)
            ),
            socket_timeout=MAX_BLOCK_MS / 1000 + REPLY_S,
            socket_connect_timeout=_CONNECT_S,
            health_check_interval=30,
            **_keepalive(url),
        )
        primary = None if by_sentinel is None else _primary(by_sentinel, pool)
        pool.connection_class = _linked(pool.connection_class, Link(auth_patience_s), primary)
        pool.make_connection()  # type: ignore[no-untyped-call]  # opens nothing; refuses unknown options in the URL's query
    except (ValueError, TypeError, RedisError) as error:
        # The library's message may quote the URL, and with it a password.
        raise ConfigError(
            f"malformed Redis URL ({type(error).__name__}); expected redis://, rediss://, unix:// or redis+sentinel://"
            f", {_ENCODED}"
        ) from None
    return Redis.from_pool(pool)


def connect_blobs(settings: CommonSettings, redis: Redis) -> Redis:
    """Return a client of the Redis for media and embeddings: `redis` itself, unless they have one of their own.

    Raises:
        ConfigError: its URL is malformed.
    """
    url = settings.blob_redis_url
    return redis if url is None else connect(url, settings.auth_patience_s)


def suspect(redis: Redis) -> None:
    """Have all connections of a client made anew before their next use."""
    link: Link = redis.connection_pool.connection_class.link  # type: ignore[attr-defined]  # of `Linked` below
    link.suspect(link.generation)


def _check_sign_in(url: str) -> None:
    """Refuse a URL whose user and password are not before its host, as a character in them has ended it too soon.

    redis-py would take `redis://user:12?34@host` for the server `user` at port 12, and `redis://user:1@2?34@host` for
    the server 2.

    Raises:
        ConfigError: it is such a one.
        ValueError: it is malformed.
    """
    parts = urlsplit(url)
    if parts.fragment:
        raise ConfigError("malformed Redis URL: a # in its password must be written %23")
    if any("@" in name for name, _ in parse_qsl(parts.query, keep_blank_values=True)):  # even behind another @
        raise ConfigError("malformed Redis URL: a ? in its password must be written %3F, and an @ %40")
    if parts.scheme == "unix" and ("@" in parts.netloc or not parts.netloc):  # a socket's path may have an @
        return
    if "@" in parts.path:
        raise ConfigError("malformed Redis URL: a / in its password must be written %2F, and an @ %40")
    if parts.scheme == "unix":
        raise ConfigError(
            "malformed Redis URL: the path of a socket follows three slashes, as in unix:///run/redis.sock"
        )


def _without_ours(url: str) -> str:
    """Return the URL without the options that we choose ourselves.

    What redis-py takes for something else is refused: `/one` for database 0, `/1/2` for 12, a file that is not there
    for a server that is away.

    Raises:
        ConfigError: such a part is in it. Nothing is quoted that may be a part of a password.
        ValueError: it is malformed.
    """
    parts = urlsplit(url)
    if parts.scheme != "unix" and not _DATABASE.fullmatch(parts.path):
        raise ConfigError("malformed Redis URL: its path is a database's number, as /0")
    options = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(name, value) for name, value in options if not _is_ours(name, value)]
    for name, value in kept:
        if name in _FILES:
            _check_file(name, value)
    return url if kept == options else f"{url.partition('?')[0]}?{urlencode(kept)}"


def _is_ours(name: str, value: str) -> bool:
    """Return True for an option of a URL that changes nothing.

    Raises:
        ConfigError: it would change what nobody may.
    """
    if (name, value) == ("protocol", "2"):
        return True
    if name in _OURS:
        raise ConfigError(f"malformed Redis URL: {name} is chosen by us, and cannot be in it")
    if name in _IGNORED:
        _warn_ignored(name)
    return name in _IGNORED


@cache
def _warn_ignored(name: str) -> None:
    _log.warning("an option of the URL of Redis is ignored; we choose it", extra={"option": name})


def _check_file(name: str, path: str) -> None:
    try:
        Path(path).stat()
    except FileNotFoundError:
        raise ConfigError(f"Redis URL: {name}: {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"Redis URL: {name} cannot be read: {error}") from None


def _primary(url: SentinelUrl, pool: BlockingConnectionPool) -> Primary:
    """Make what finds the primary, with the TLS of the pool."""
    tls = {name: value for name, value in pool.connection_kwargs.items() if name.startswith("ssl_")}
    over_tls = issubclass(pool.connection_class, SSLConnection)
    # Tried once each, or a dead Sentinel would cost seconds before the next is asked; whoever connects tries again.
    limits = {"socket_timeout": REPLY_S, "socket_connect_timeout": _CONNECT_S, "retry": Retry(NoBackoff(), 0)}
    told = {"ssl": over_tls, **tls, **limits, **url.credentials}
    return Primary(Sentinel(url.sentinels, sentinel_kwargs=told), url.name)  # type: ignore[no-untyped-call]


def _linked(base: type[AbstractConnection], shared_link: Link, primary: Primary | None) -> type[AbstractConnection]:
    """Return a subclass of `base` that is made anew when `shared_link` says so, and sends under `asyncio.timeout`.

    With `primary` it connects to wherever that is then.

    redis-py sends under `asyncio.wait_for`, which until Python 3.12 loses a cancellation that arrives just when the
    command has been sent: a loop over commands then goes on for ever, and the task that cancelled it waits for ever.
    """

    class Linked(base):  # type: ignore[misc,valid-type]  # the base depends on the URL
        link = shared_link
        generation = 0
        opened = 0  # times that it was connected

        async def connect_check_health(self, check_health: bool = True, retry_socket_connect: bool = True) -> None:
            if self.is_connected:
                return
            self.link.check()
            self.generation = self.link.generation
            try:
                await super().connect_check_health(check_health, retry_socket_connect)
            except RedisError as error:
                if action_for(error) is Action.SIGN_IN:
                    self.link.refused(str(error))
                raise
            self.link.accepted()
            self.opened += 1

        @property
        def is_current(self) -> bool:
            """True if nothing was said against the server that it was last connected to."""
            return self.link.is_current(self.generation)

        async def ensure_connected(self) -> None:
            """Connect, unless it is connected to the server that is the right one now."""
            self.link.check()
            if self.generation < self.link.generation:
                await self.disconnect(nowait=True)
            if not self.is_connected:
                await self.connect_check_health(check_health=False)

        async def _connect(self) -> None:
            if primary is not None:
                self.host, self.port = await primary.address()
            await super()._connect()

        async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
            await self.ensure_connected()
            if check_health:
                await self.check_health()
            words = [command.encode()] if isinstance(command, str) else command
            try:
                async with asyncio.timeout(self.socket_timeout):
                    await self._send_packed_command([words] if isinstance(words, bytes) else words)
            except TimeoutError as error:
                await self.disconnect(nowait=True)
                self.link.suspect(self.generation)
                raise RedisTimeoutError("Timeout writing to socket") from error
            except OSError as error:
                await self.disconnect(nowait=True)
                raise RedisConnectionError(f"{error} while writing to socket") from error
            except BaseException:
                await self.disconnect(nowait=True)  # half a command may have been sent
                raise

        async def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().read_response(*args, **kwargs)
            except RedisError as error:
                self.note_error(error)
                raise

        def note_error(self, error: RedisError) -> None:
            """Suspect the server if an error says that it is silent, or not the right one any more."""
            if isinstance(error, RedisTimeoutError) or action_for(error) is Action.RECONNECT:
                self.link.suspect(self.generation)

        def take_over(self) -> Replies:
            """Have replies read without redis-py's stream, until they are given back."""
            return Replies(self._writer.transport, self._parser.parse_error)

    return Linked


async def command(redis: Redis, *words: str | bytes | int | float) -> Any:
    """Run one command, given as words; return the reply as redis-py parses it (whose own methods have loose types)."""
    return await redis.execute_command(*words)  # type: ignore[no-untyped-call]


def _keepalive(url: str) -> dict[str, object]:
    """Return the options by which a connection, even one that only listens, notices a vanished peer in about 20 s."""
    if urlsplit(url).scheme == "unix":
        return {}
    options = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 2}
    return {"socket_keepalive": True, "socket_keepalive_options": options}

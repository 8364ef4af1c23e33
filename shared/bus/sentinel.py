"""Primaries found by Redis Sentinel: redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/NAME/DB?options.

The options are redis-py's, as for every other URL; user and password are the primary's. Sentinels that want their own
are told `sentinel_username` and `sentinel_password`. With rediss+sentinel:// the primary and Sentinel speak TLS.
"""

import asyncio
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec
from redis.asyncio.sentinel import Sentinel

SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
PORT = 26379
_OWN = {"sentinel_username": "username", "sentinel_password": "password"}


class SentinelUrl(msgspec.Struct, frozen=True):
    """A URL in its parts."""

    sentinels: tuple[tuple[str, int], ...]  # host and port of each
    name: str  # of the primary, as the Sentinels know it
    primary: str  # a plain URL with all but the primary's address
    credentials: dict[str, str]  # for the Sentinels


def parse(url: str) -> SentinelUrl | None:
    """Return the parts of a URL; None for one of another scheme.

    Raises:
        ValueError: it names no Sentinel or no primary, or a port that is none.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        return None
    user, at, hosts = parts.netloc.rpartition("@")
    addresses = [urlsplit(f"//{host}") for host in hosts.split(",")]
    sentinels = tuple((address.hostname or "", address.port or PORT) for address in addresses)
    name, _, database = parts.path.lstrip("/").partition("/")
    if not name or not all(host for host, _ in sentinels):
        raise ValueError("no Sentinel, or no name of a primary")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    credentials = {_OWN[option]: options.pop(option) for option in list(options) if option in _OWN}
    plain = (SCHEMES[parts.scheme], f"{user}{at}{addresses[0].netloc}", f"/{database}", urlencode(options), "")
    return SentinelUrl(sentinels, name, urlunsplit(plain), credentials)


class Primary:
    """Address of a primary, asked of the first Sentinel that answers."""

    def __init__(self, sentinel: Sentinel, name: str) -> None:
        """`name`: of the primary. Connections to the Sentinels are closed after each question."""
        self._name = name
        self._sentinel = sentinel
        # One question at a time: the library changes its list of Sentinels while it goes through it, and what ends one
        # question would close the connections of all.
        self._asking = asyncio.Lock()

    async def address(self) -> tuple[str, int]:
        """Return host and port.

        Raises:
            RedisError: no Sentinel answers, or none knows a primary of this name.
        """
        async with self._asking:
            try:
                host, port = await self._sentinel.discover_master(self._name)
                return str(host), int(port)
            finally:
                await self._sentinel.aclose()

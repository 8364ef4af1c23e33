"""Fetching of media from the web, guarded against server-side request forgery (SSRF).

Per hop, redirects included: the name is resolved once, every address it resolves to must be global or in a network that
the operator named, and the connection goes to exactly such an address (TLS and Host keep the name). Bytes are counted
while they stream, and one deadline covers all hops. Every failure before a response, a refused address included, has
the same message, so that a client cannot use this process to scan a network.

Of what came with a strong ETag the digest is remembered, so that the server can say that it has not changed, and need
not send it again. It is asked each time. A weak ETag, or a date, stands for bytes that may differ.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpcore
import httpx

from services.mm_encoder.media.refusal import over_limit, refuse
from shared.errors import RequestError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
_UNREACHABLE = "The media's URL cannot be reached, or its address is not allowed."
_MAX_URL = 8192
_STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,256}"')
_REMEMBERED = 4096  # URLs
FETCHED_AT_ONCE = 256  # links of all requests; others wait, within their own time limits
FETCHED_OF_ONE = 16  # links of one request
# A name server that never answers holds a thread for many seconds, and a client may name as many as it likes. These
# threads do nothing else, so that what computes in those of asyncio does not wait for them. Of one request few names
# are looked up at once, so that others find a thread.
_LOOKED_UP_OF_ONE = 4
_THREADS = ThreadPoolExecutor(FETCHED_AT_ONCE, "names")
_HEADERS = (("User-Agent", "millrace"), ("Accept", "*/*"), ("Accept-Encoding", "identity"))


class AddressRefusedError(Exception):
    """Error of a name that resolves to an address which media may not come from. Never shown to a client."""


async def resolve(host: str, port: int) -> list[str]:
    """Return a name's addresses by the system's resolver, in its order."""
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    found = await asyncio.get_running_loop().run_in_executor(_THREADS, look_up)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def allowed(text: str, networks: Sequence[Network]) -> bool:
    """Return True if media may be fetched from this address: it is in `networks`, or global with all it embeds."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    plain = (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address
    return any(plain in network for network in networks) or all(_is_global(each) for each in _with_embedded(address))


def _is_global(address: Address) -> bool:
    # is_global alone lets multicast and some reserved ranges pass.
    odd = address.is_multicast or address.is_reserved or address.is_unspecified
    site_local = isinstance(address, ipaddress.IPv6Address) and address.is_site_local
    return address.is_global and not odd and not site_local


def _with_embedded(address: Address) -> list[Address]:
    """Return the addresses that a packet to this one may reach: through a mapping, a translator or a tunnel."""
    if isinstance(address, ipaddress.IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [ipaddress.IPv4Address(address.packed[-4:])]
    found: list[Address] = [address]
    if address in _V4_COMPATIBLE:
        found.append(ipaddress.IPv4Address(address.packed[-4:]))
    if address.sixtofour is not None:
        found.append(address.sixtofour)
    if address.teredo is not None:
        found.extend(address.teredo)
    return found


class _PinnedBackend(httpcore.AsyncNetworkBackend):
    """Network backend that connects only to addresses which it has resolved and checked itself."""

    def __init__(self, resolver: Resolver, networks: Sequence[Network]) -> None:
        self._resolver = resolver
        self._networks = networks
        self._lookups = asyncio.Semaphore(_LOOKED_UP_OF_ONE)
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        async with self._lookups:
            addresses = await self._resolver(host, port)
        if not addresses or not all(allowed(address, self._networks) for address in addresses):
            raise AddressRefusedError(host)
        for address in addresses[:-1]:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._inner.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Body of a URL; `validator` is the URL that had it, behind all redirects, and its ETag, if that is strong."""

    data: bytes
    validator: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Unchanged:
    """Digest and size of a body that its server says is as it was."""

    digest: bytes
    size: int


class Fetcher:
    """HTTP client for media. One per process."""

    def __init__(
        self,
        *,
        max_bytes: int,
        max_redirects: int,
        timeout_s: float,
        networks: Sequence[Network] = (),
        resolver: Resolver = resolve,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._timeout_s = timeout_s
        self._remembered: dict[str, tuple[str, Unchanged]] = {}  # by URL, with its ETag; the one used last is last
        self._networks = networks
        self._resolver = resolver
        self._ssl = httpx.create_ssl_context(trust_env=False)
        self._slots = asyncio.Semaphore(FETCHED_AT_ONCE)

    def connections(self) -> httpcore.AsyncConnectionPool:
        """Return the connections for the links of one request, of which `FETCHED_OF_ONE` may be fetched at once.

        There is no pool for all requests: for each fetch that begins or ends, and each that it queues, a pool looks at
        all connections, which stops the loop for half a minute with some thousands of fetches. And it keeps for ever
        some of those whose fetch was cancelled.
        """
        return httpcore.AsyncConnectionPool(
            ssl_context=self._ssl,
            max_connections=FETCHED_OF_ONE,
            keepalive_expiry=5.0,
            network_backend=_PinnedBackend(self._resolver, self._networks),
        )

    async def fetch(
        self,
        url: str,
        connections: httpcore.AsyncConnectionPool,
        *,
        anew: bool = False,
        count: Callable[[int], None] = lambda size: None,
    ) -> Fetched | Unchanged:
        """Return the body at `url`; what was remembered of it if it has not changed, unless it is wanted `anew`.

        `count` is told the size of each piece of a body, and may raise to refuse it.

        Raises:
            RequestError: the URL is not allowed, not reachable, not 200, too large, too slow or redirects too often.
        """
        try:
            async with asyncio.timeout(self._timeout_s), self._slots:
                return await self._follow(_parse(url), connections, anew, count)
        except TimeoutError as error:
            raise over_limit("The time to fetch the media", "media_timeout_s", self._timeout_s) from error

    def remember(self, fetched: Fetched, digest: bytes) -> None:
        """Remember the digest of a body, if its server can say later that it is the same."""
        if fetched.validator is None:
            return
        url, etag = fetched.validator
        self._put_last(url, (etag, Unchanged(digest, len(fetched.data))))

    def _put_last(self, url: str, known: tuple[str, Unchanged]) -> None:
        """Remember this of a URL, and forget the one that was used longest ago if there are too many."""
        self._remembered.pop(url, None)
        self._remembered[url] = known
        if len(self._remembered) > _REMEMBERED:
            del self._remembered[next(iter(self._remembered))]

    async def _follow(
        self, url: httpx.URL, connections: httpcore.AsyncConnectionPool, anew: bool, count: Callable[[int], None]
    ) -> Fetched | Unchanged:
        for _ in range(self._max_redirects + 1):
            body = await self._get(url, connections, None if anew else self._remembered.get(str(url)), count)
            if not isinstance(body, httpx.URL):
                return body
            url = body
        what = "The number of redirects of the media's URL"
        raise over_limit(what, "media_max_redirects", self._max_redirects)

    async def _get(
        self,
        url: httpx.URL,
        connections: httpcore.AsyncConnectionPool,
        known: tuple[str, Unchanged] | None,
        count: Callable[[int], None],
    ) -> Fetched | Unchanged | httpx.URL:
        """Return the body, `known` if that is what it still is, or the URL that the response redirects to."""
        wait = {"connect": self._timeout_s, "read": self._timeout_s, "write": self._timeout_s, "pool": self._timeout_s}
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        headers = [("Host", url.netloc.decode("ascii")), *_HEADERS]
        headers += [] if known is None else [("If-None-Match", known[0])]
        try:
            async with connections.stream("GET", target, headers=headers, extensions={"timeout": wait}) as response:
                if known is not None and response.status == 304:
                    self._put_last(str(url), known)
                    return known[1]
                return await self._read(response, url, count)
        except (AddressRefusedError, httpcore.ConnectError, OSError, UnicodeError) as error:
            raise refuse(_UNREACHABLE) from error  # UnicodeError: not a host name
        except httpcore.TimeoutException as error:
            raise TimeoutError from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            raise refuse("The media's server closed the connection early or did not answer in HTTP.") from error

    async def _read(
        self, response: httpcore.Response, url: httpx.URL, count: Callable[[int], None]
    ) -> Fetched | httpx.URL:
        headers = httpx.Headers(response.headers)
        if response.status in _REDIRECTS and "location" in headers:
            return _parse(headers["location"], base=url)
        if response.status != 200:
            raise refuse(f"The media's server answered with status {response.status}.")
        if headers.get("content-encoding", "identity") != "identity":
            raise refuse("The media's server sent the media compressed, although it was asked for `identity`.")
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        async for chunk in response.aiter_stream():
            if len(body) + len(chunk) > self._max_bytes:
                raise self._too_large()
            count(len(chunk))
            body += chunk
        etag = headers.get("etag", "")
        return Fetched(bytes(body), (str(url), etag) if _STRONG_ETAG.fullmatch(etag) else None)

    def _too_large(self) -> RequestError:
        return over_limit("The media's size in bytes", "media_max_bytes", self._max_bytes)


def _parse(text: str, base: httpx.URL | None = None) -> httpx.URL:
    """Parse and check a URL. Nothing else parses it, so the URL that is checked is the one that is connected to.

    Raises:
        RequestError: not an http(s) URL with a host, or one with credentials.
    """
    if len(text) > _MAX_URL or "\\" in text or not text.isprintable():
        raise refuse("The media's URL is malformed.")
    try:
        url = httpx.URL(text) if base is None else base.join(text)
        usable = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, ValueError) as error:  # ValueError: the host is no name in any alphabet
        raise refuse("The media's URL is malformed.") from error
    if not usable:
        raise refuse("The media's URL must start with http:// or https:// and name a host.")
    if url.port is not None and not 0 < url.port < 65536:
        raise refuse("The media's URL is malformed.")
    if url.userinfo:
        raise refuse("The media's URL must not hold credentials.")
    return url

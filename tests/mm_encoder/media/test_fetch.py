"""Fetching: over real sockets on loopback, with the addresses it may not go to, the limits, and the one message."""

import asyncio
import ipaddress
import os
import socket
import threading
from collections.abc import AsyncIterator

import pytest
from loopback import Site, running_site
from machine import PATIENCE_S

from services.mm_encoder.media.fetch import FETCHED_OF_ONE, Fetched, Fetcher, Unchanged, allowed
from shared.errors import RequestError

LOOPBACK = (ipaddress.ip_network("127.0.0.0/8"),)
UNREACHABLE = "The media's URL cannot be reached, or its address is not allowed."


def fetcher(**options: object) -> Fetcher:
    settings = {"max_bytes": 1000, "max_redirects": 3, "timeout_s": PATIENCE_S, "networks": LOOPBACK} | options
    return Fetcher(**settings)  # type: ignore[arg-type]


async def fetch(ours: Fetcher, url: str, **options: object) -> Fetched | Unchanged:
    async with ours.connections() as connections:
        return await ours.fetch(url, connections, **options)  # type: ignore[arg-type]


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    async with running_site() as site:
        yield site


async def refusal(url: str, **options: object) -> RequestError:
    ours = fetcher(**options)
    with pytest.raises(RequestError) as caught:
        await fetch(ours, url)
    assert caught.value.failure.status == 400
    return caught.value


async def body(url: str, **options: object) -> bytes:
    ours = fetcher(**options)
    fetched = await fetch(ours, url)
    assert isinstance(fetched, Fetched)
    return fetched.data


async def test_the_body_comes_back(site: Site) -> None:
    assert await body(site.serve("/a?b=c", b"picture")) == b"picture"
    [head] = site.heads
    assert head.startswith("GET /a?b=c HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{site.port}" in head
    assert "Accept-Encoding: identity" in head


async def test_chunked_bodies_and_exactly_the_limit(site: Site) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1f4\r\n" + b"x" * 500 + b"\r\n"
    site.answers["/chunked"] = answer + b"1f4\r\n" + b"y" * 500 + b"\r\n0\r\n\r\n"
    assert await body(site.url("/chunked")) == b"x" * 500 + b"y" * 500


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.5.4",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fd00::1",
        "ff0e::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::7f00:1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::808:808",
        "2002:7f00:1::1",
        "2002:c0a8:101::1",
        "2001:0:4136:e378:8000:63bf:80ff:fffe",
        "not an address",
    ],
)
def test_addresses_that_are_not_global(address: str) -> None:
    assert not allowed(address, ())


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_that_are_global(address: str) -> None:
    assert allowed(address, ())


def test_networks_that_are_named_are_allowed() -> None:
    networks = (ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00:1::/32"))
    assert allowed("10.1.2.3", networks)
    assert allowed("::ffff:10.1.2.3", networks)
    assert allowed("fd00:1::9", networks)
    assert not allowed("10.2.0.1", networks)
    assert not allowed("fd00:2::9", networks)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "127.1", "[::1]", "[::ffff:127.0.0.1]", "0"]
)
async def test_loopback_is_refused_under_all_its_names(site: Site, host: str) -> None:
    site.serve("/", b"secret")
    error = await refusal(site.url("/", host), networks=())
    assert error.failure.message == UNREACHABLE
    assert site.heads == []


async def test_a_closed_port_and_a_refused_address_sound_the_same(unused_port: int) -> None:
    closed = await refusal(f"http://127.0.0.1:{unused_port}/")
    refused = await refusal(f"http://127.0.0.1:{unused_port}/", networks=())
    impossible = await refusal(f"http://{'a' * 70}.invalid/")
    assert {error.failure.message for error in (closed, refused, impossible)} == {UNREACHABLE}


async def test_a_name_that_does_not_resolve_sounds_the_same() -> None:
    async def resolver(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert (await refusal("http://media.example/", resolver=resolver)).failure.message == UNREACHABLE


async def test_a_name_is_resolved_once_and_connected_to_at_that_address(site: Site) -> None:
    """A name that changes its mind between check and connection gains nothing: it is asked once."""
    site.serve("/", b"picture")
    asked: list[str] = []

    async def resolver(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    assert await body(site.url("/", "media.example"), resolver=resolver) == b"picture"
    assert asked == ["media.example"]
    assert f"Host: media.example:{site.port}" in site.heads[0]


async def test_one_private_address_among_public_ones_is_enough_to_refuse(site: Site) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "10.0.0.1"]

    error = await refusal(site.serve("/", b"picture"), resolver=resolver)
    assert error.failure.message == UNREACHABLE
    assert site.heads == []


async def test_the_next_address_is_tried_where_one_does_not_answer(site: Site) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    assert await body(site.serve("/", b"picture"), resolver=resolver) == b"picture"


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_are_followed(site: Site, status: str) -> None:
    site.serve("/b/picture", b"picture")
    site.redirect("/b/hop", "picture", status)
    assert await body(site.redirect("/a", "/b/hop", status)) == b"picture"


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest/meta-data/", "http://10.0.0.1/", "http://[::1]/", "//192.168.0.1/x"]
)
async def test_every_hop_is_checked(site: Site, target: str) -> None:
    error = await refusal(site.redirect("/", target))
    assert error.failure.message == UNREACHABLE


async def test_a_redirect_to_loopback_is_refused_where_only_the_first_hop_is_allowed(site: Site) -> None:
    """As in production, where the first hop is a public address: here the only allowed one."""
    site.serve("/secret", b"secret")

    async def resolver(host: str, port: int) -> list[str]:
        return {"public.example": ["127.0.0.1"]}.get(host, ["127.0.0.2"])

    only = (ipaddress.ip_network("127.0.0.1/32"),)
    site.redirect("/", site.url("/secret", "internal.example"))
    error = await refusal(site.url("/", "public.example"), resolver=resolver, networks=only)
    assert error.failure.message == UNREACHABLE
    assert len(site.heads) == 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://x", "data:image/png;base64,AA"])
async def test_a_redirect_to_another_scheme_is_refused(site: Site, target: str) -> None:
    error = await refusal(site.redirect("/", target))
    assert "http:// or https://" in error.failure.message


async def test_redirects_are_counted(site: Site) -> None:
    error = await refusal(site.redirect("/", "/"))
    assert "media_max_redirects = 3" in error.failure.message
    assert len(site.heads) == 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "http:// or https://"),
        ("http://", "name a host"),
        ("http:///path", "name a host"),
        ("//example.com/", "http:// or https://"),
        ("http://user:password@example.com/", "credentials"),
        ("http://user@example.com/", "credentials"),
        ("http://example.com\\@127.0.0.1/", "malformed"),
        ("http://example.com/\r\nHost: x", "malformed"),
        ("http://example.com:99999/", "malformed"),
        ("http://example.com:0/", "malformed"),
        ("http://[::1", "malformed"),
        ("http://xn--/", "malformed"),
        ("http://xn--zz--zz/", "malformed"),
        ("http://example.com/" + "a" * 9000, "malformed"),
    ],
)
async def test_urls_that_are_refused_before_anything_is_resolved(url: str, message: str) -> None:
    async def resolver(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was resolved")

    error = await refusal(url, resolver=resolver)
    assert message in error.failure.message
    assert "password" not in error.failure.message


async def test_an_announced_size_over_the_limit_is_refused_unread(site: Site) -> None:
    site.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n"
    error = await refusal(site.url("/"))
    assert "media_max_bytes = 1000" in error.failure.message


async def test_bytes_are_counted_while_they_come(site: Site) -> None:
    """The server would send for ever; the connection is closed soon after the limit."""
    gone = asyncio.Event()

    async def endless(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        finally:
            gone.set()

    site.handlers["/"] = endless
    error = await refusal(site.url("/"))
    assert "media_max_bytes = 1000" in error.failure.message
    async with asyncio.timeout(PATIENCE_S):
        await gone.wait()


async def test_one_clock_runs_over_everything(site: Site) -> None:
    release = asyncio.Event()

    async def silent(path: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123")
        await writer.drain()
        await release.wait()

    site.handlers["/"] = silent
    error = await refusal(site.url("/"), timeout_s=0.2)
    release.set()
    assert "media_timeout_s = 0.2" in error.failure.message


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Partial Content", "304 Same"])
async def test_other_statuses_are_told(site: Site, status: str) -> None:
    error = await refusal(site.serve("/", b"", status))
    assert f"status {status[:3]}" in error.failure.message


async def test_compressed_bodies_are_refused(site: Site) -> None:
    error = await refusal(site.serve("/", b"bomb", Content_Encoding="gzip"))
    assert "compressed" in error.failure.message


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n123"])
async def test_what_is_not_http_or_breaks_off_is_refused(site: Site, answer: bytes) -> None:
    site.answers["/"] = answer
    error = await refusal(site.url("/"))
    assert "closed the connection early" in error.failure.message


async def test_proxies_of_the_environment_are_not_used(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert await body(site.serve("/", b"picture")) == b"picture"


NOT_MODIFIED = b"HTTP/1.1 304 Not Modified\r\nConnection: close\r\n\r\n"


async def again(site: Site, url: str, path: str, **options: object) -> Fetched | Unchanged:
    """Fetch a URL, remember it, and fetch it again from a server that says only that `path` has not changed."""
    ours = fetcher()
    first = await fetch(ours, url)
    assert isinstance(first, Fetched)
    ours.remember(first, b"digest")
    assert "If-None-Match" not in "".join(site.heads)
    site.answers[path] = NOT_MODIFIED
    return await fetch(ours, url, **options)


async def test_what_has_not_changed_is_not_sent_again(site: Site) -> None:
    url = site.redirect("/", site.serve("/a", b"picture", ETag='"1"'))
    assert await again(site, url, "/a") == Unchanged(b"digest", 7)
    assert "If-None-Match" not in site.heads[2], "the one that redirects has no body to be known"
    assert 'If-None-Match: "1"\r\n' in site.heads[3]


@pytest.mark.parametrize("etag", ['W/"1"', "1", '""', '"1', '"\x01"', "", f'"{"1" * 257}"'])
async def test_only_a_strong_etag_stands_for_bytes(site: Site, etag: str) -> None:
    url = site.serve("/a", b"picture", ETag=etag, Last_Modified="Sun, 29 Nov 2026 12:00:00 GMT")
    with pytest.raises(RequestError, match="answered with status 304"):
        await again(site, url, "/a")
    assert "If-" not in "".join(site.heads)


async def test_what_is_wanted_anew_is_asked_for_without_the_etag(site: Site) -> None:
    with pytest.raises(RequestError, match="answered with status 304"):
        await again(site, site.serve("/a", b"picture", ETag='"1"'), "/a", anew=True)


async def test_what_has_changed_is_sent(site: Site) -> None:
    ours = fetcher()
    url = site.serve("/a", b"picture", ETag='"1"')
    ours.remember(Fetched(b"old", (url, '"0"')), b"digest")
    assert await fetch(ours, url) == Fetched(b"picture", (url, '"1"'))
    assert 'If-None-Match: "0"' in site.heads[0]


async def test_a_bounded_number_of_urls_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.mm_encoder.media.fetch._REMEMBERED", 2)
    ours = fetcher()
    for name in ("a", "b", "a", "c"):
        ours.remember(Fetched(b"x", (name, '"1"')), b"digest")
    assert list(ours._remembered) == ["a", "c"]


async def test_the_url_asked_for_longest_ago_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.mm_encoder.media.fetch._REMEMBERED", 2)
    ours = fetcher()
    url = site.serve("/hot", b"x")
    site.answers["/hot"] = NOT_MODIFIED
    ours.remember(Fetched(b"x", (url, '"1"')), b"digest")
    for name in ("a", "b", "c"):
        ours.remember(Fetched(b"x", (name, '"1"')), b"digest")
        assert await fetch(ours, url) == Unchanged(b"digest", 1)
    assert list(ours._remembered) == ["c", url]


async def test_names_that_are_looked_up_for_long_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncios_own = min(32, (os.cpu_count() or 1) + 4)  # threads, as its documentation says
    loop, began, answering = asyncio.get_running_loop(), asyncio.Semaphore(0), threading.Event()

    def look_up(host: str, port: int, **kwargs: object) -> list[object]:
        loop.call_soon_threadsafe(began.release)
        answering.wait()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    ours = fetcher()
    fetching = [asyncio.create_task(fetch(ours, f"http://{i}.example.com/")) for i in range(64)]
    try:
        async with asyncio.timeout(PATIENCE_S):
            for _ in range(asyncios_own):
                await began.acquire()
            assert await asyncio.to_thread(lambda: "computed") == "computed"
    finally:
        answering.set()
        refused = await asyncio.gather(*fetching, return_exceptions=True)
    assert all(isinstance(each, RequestError) for each in refused)


async def test_one_request_leaves_threads_to_look_up_names_for_others(site: Site) -> None:
    looked_up: list[str] = []
    began, answering = asyncio.Semaphore(0), asyncio.Event()

    async def resolver(host: str, port: int) -> list[str]:
        looked_up.append(host)
        began.release()
        if host != "quick.example.com":
            await answering.wait()
        return ["127.0.0.1"]

    ours = fetcher(resolver=resolver)
    url = site.serve("/", b"picture")
    slow, quick = (url.replace("127.0.0.1", f"{name}.example.com") for name in ("slow", "quick"))
    async with ours.connections() as connections:
        fetching = [asyncio.create_task(ours.fetch(slow, connections)) for _ in range(FETCHED_OF_ONE)]
        for _ in range(4):
            await began.acquire()
        assert await fetch(ours, quick) == Fetched(b"picture")
        assert looked_up == ["slow.example.com"] * 4 + ["quick.example.com"]
        answering.set()
        assert await asyncio.gather(*fetching) == [Fetched(b"picture")] * FETCHED_OF_ONE


async def test_a_fetch_waits_for_its_turn_within_its_own_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.mm_encoder.media.fetch.FETCHED_AT_ONCE", 1)
    asked, answering = asyncio.Event(), asyncio.Event()

    async def silent(path: str, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await answering.wait()

    site.handlers["/silent"] = silent
    ours = fetcher()
    first = asyncio.create_task(fetch(ours, site.url("/silent")))
    await asked.wait()
    ours._timeout_s = 0.05
    with pytest.raises(RequestError, match="media_timeout_s"):
        await fetch(ours, site.serve("/quick", b"picture"))
    assert len(site.heads) == 1
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    ours._timeout_s = PATIENCE_S
    assert await fetch(ours, site.url("/quick")) == Fetched(b"picture")
    answering.set()

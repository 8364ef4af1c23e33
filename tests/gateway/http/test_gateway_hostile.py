"""Clients that are hostile on the level of connections and of HTTP itself: real sockets, raw bytes."""

import asyncio
import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from gateway_stages import Running, Stages, running, until
from machine import PATIENCE_S, free_port
from prometheus_client import Counter, Gauge

from services.gateway.http.connections import HEALTH_ROOM, ConnectionLimits, Connections, network_of
from services.gateway.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from shared.metrics import value
from shared.open_files import raise_file_limit

BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
ASK = CHAT + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
PING = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"
CHUNKED = CHAT + b"transfer-encoding: chunked\r\n\r\n"


class Wire:
    """Client that writes bytes and reads answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers, body."""
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
            body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, body

    async def status(self) -> int:
        return (await self.answer())[0]

    async def refused(self) -> tuple[int, str]:
        """Status and code of an answer in OpenAI's form, after which the server closes."""
        status, headers, body = await self.answer()
        assert headers["connection"] == "close"
        assert await self.closed()
        return status, json.loads(body)["error"]["code"]

    async def closed(self) -> bool:
        """Wait until the server has closed; return False if it said something instead."""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return await self.reader.read(1) == b""
            except ConnectionResetError:
                return True


@asynccontextmanager
async def wire(server: Running) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rpartition(":")[2]))
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def closed(server: Running, reason: str) -> int:
    return round(server.metric(f'millrace_connections_closed_total{{reason="{reason}"}}'))


# ------------------------------------------------------------------------------------------------ heads and trailers


@pytest.mark.parametrize(
    "head",
    [
        b"GET /ping HTTP/1.1\r\nx: " + b"a" * (3 * MAX_HEAD_BYTES),
        b"GET /" + b"a" * (3 * MAX_HEAD_BYTES),
        b"GET /ping HTTP/1.1\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        CHUNKED + b"0\r\nx: " + b"a" * (3 * MAX_HEAD_BYTES),
        CHUNKED + b"0\r\n" + b"a: b\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        CHUNKED + b"1;x=" + b"a" * (3 * MAX_HEAD_BYTES),
    ],
)
async def test_heads_trailers_and_extensions_without_end(server: Running, head: bytes) -> None:
    """Where the route is already at work on the request, there is nothing to say beside its answer."""
    async with wire(server) as client:
        client.write(head)
        if head.startswith(CHUNKED):
            assert await client.closed()
            await until(lambda: closed(server, "invalid") == 1)
        else:
            assert await client.refused() == (431, "head_too_large")
    await until(server.idle)


async def test_a_long_head_beside_a_long_body_is_fine(server: Running, stages: Stages) -> None:
    body = BODY + b" " * (3 * MAX_HEAD_BYTES)
    long = b"x: " + b"a" * (MAX_HEAD_BYTES // 2) + b"\r\n"
    async with wire(server) as client:
        client.write(CHAT + long + b"content-length: %d\r\n\r\n" % len(body) + body)
        await stages.answer(await stages.request(), "x")
        assert await client.status() == 200


async def test_chunks_with_extensions_and_trailers(server: Running, stages: Stages) -> None:
    """They are HTTP, and mean nothing to us; a trailer is no header."""
    chunks = b"".join(b"1;a=b;c\r\n%c\r\n" % byte for byte in BODY)
    async with wire(server) as client:
        client.write(CHUNKED + chunks + b"0\r\nx-trailer: 1\r\ncontent-encoding: gzip\r\n\r\n" + PING)
        await stages.answer(await stages.request(), "x")
        assert [await client.status(), await client.status()] == [200, 200]


async def test_a_head_that_drips(checkpoint: Path, redis_url: str) -> None:
    async with running(checkpoint, redis_url, head_timeout_s=0.3) as server, wire(server) as client:
        client.write(PING)
        assert await client.status() == 200
        ended = asyncio.create_task(client.closed())
        drip = iter(b"GET /ping HTTP/1.1\r\nx: " + b"a" * 10_000)
        while not ended.done():
            client.write(bytes([next(drip)]))
            await asyncio.wait([ended], timeout=0.01)
        assert await ended
        assert closed(server, "timeout") == 1


@pytest.mark.parametrize("path", [b"/ping", b"/nowhere"])
async def test_a_body_that_nobody_reads(checkpoint: Path, redis_url: str, path: bytes) -> None:
    """It may come to its end, after the answer, but not for ever."""
    head = b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n\r\n"
    async with running(checkpoint, redis_url, head_timeout_s=PATIENCE_S) as server, wire(server) as client:
        client.write(head)
        assert await client.status() in (200, 404)
        client.write(b"x" * 300_000 + head)
        assert await client.status() in (200, 404)
    async with running(checkpoint, redis_url, head_timeout_s=0.3) as server, wire(server) as client:
        client.write(head)
        assert await client.status() in (200, 404)
        ended = asyncio.create_task(client.closed())
        while not ended.done():
            client.write(b"x")
            await asyncio.wait([ended], timeout=0.01)
        assert await ended


# ------------------------------------------------------------------------------------------------------- oddities


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET /ping HTTP/1.1\r\nhost: x\r\nx y: z\r\n\r\n",
        b"GET /p\xffing HTTP/1.1\r\nhost: x\r\n\r\n",
        CHAT + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        CHAT + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        CHAT + b"content-length: 99999999999999999999999\r\n\r\n",
        CHAT + b"content-length: -1\r\n\r\n",
        CHAT + b"content-length: \r\n\r\n",
        CHAT + b"content-length: 5, 5\r\n\r\nhello",
        CHAT + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    ],
)
async def test_what_is_no_http(server: Running, request_: bytes) -> None:
    """Among it all ways to say two lengths, with which requests are smuggled past proxies."""
    async with wire(server) as client:
        client.write(request_)
        assert await client.refused() == (400, "invalid_http")
    await until(server.idle)


async def test_a_chunk_that_is_none(server: Running) -> None:
    async with wire(server) as client:
        client.write(CHUNKED + b"zz\r\n")
        assert await client.closed()
    await until(server.idle)


async def test_a_length_that_is_too_short(server: Running) -> None:
    """What is left over is no request."""
    async with wire(server) as client:
        client.write(CHAT + b"content-length: 2\r\n\r\n{}{}{}{}")
        assert await client.closed() or await client.refused()
    await until(server.idle)


@pytest.mark.parametrize("length", [b"content-length: 10000", b"transfer-encoding: chunked"])
async def test_clients_that_leave_within_a_body(server: Running, length: bytes) -> None:
    for leave in (asyncio.StreamWriter.close, asyncio.StreamWriter.write_eof):
        async with wire(server) as client:
            client.write(CHAT + length + b"\r\n\r\n5\r\nhello\r\n")
            await until(lambda: server.gateway.load()["requests"] == 1)
            leave(client.writer)
            await until(server.idle)


async def test_continue_is_said_to_those_who_may(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    async with running(checkpoint, redis_url, max_body_bytes=1000) as server:
        async with wire(server) as client:
            client.write(CHAT + b"expect: 100-continue\r\ncontent-length: 1001\r\n\r\n")
            assert await client.status() == 413
        async with wire(server) as client:
            client.write(CHAT + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % len(BODY))
            assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.write(BODY)
            await stages.answer(await stages.request(), "x")
            assert await client.status() == 200


async def test_http_1_0(server: Running, stages: Stages) -> None:
    async with wire(server) as client:
        client.write(ASK.replace(b"HTTP/1.1", b"HTTP/1.0"))
        await stages.answer(await stages.request(), "x")
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await client.closed()


async def test_http_1_0_has_no_chunks(server: Running, stages: Stages) -> None:
    """RFC 9112, 6.1: such a client would take their lengths for text. The end of the connection is the body's."""
    body = json.dumps({**json.loads(BODY), "stream": True}).encode()
    async with wire(server) as client:
        client.write(CHAT.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: %d\r\n\r\n" % len(body) + body)
        await stages.answer(await stages.request(), *"xyz")
        async with asyncio.timeout(PATIENCE_S):
            head, _, events = (await client.reader.read()).partition(b"\r\n\r\n")
    fields = head.lower().split(b"\r\n")
    assert b"connection: close" in fields
    assert not any(field.startswith((b"transfer-encoding", b"content-length")) for field in fields)
    *chunks, done, rest = events.split(b"\n\n")
    assert (done, rest) == (b"data: [DONE]", b"")
    deltas = [json.loads(chunk.removeprefix(b"data: "))["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == "xyz"


async def test_http_2_without_asking_is_refused_by_name(server: Running) -> None:
    """A client with prior knowledge (curl's, h2load): the preface, and an empty SETTINGS frame."""
    async with wire(server) as client:
        client.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000"))
        status, _, body = await client.answer()
        assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")
        assert "HTTP/1.1, not HTTP/2" in json.loads(body)["error"]["message"]
        assert await client.closed()


async def test_a_client_that_would_rather_speak_http_2(server: Running, stages: Stages) -> None:
    """Java's does, unless it is told not to."""
    upgrade = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
    async with wire(server) as client:
        for _ in range(2):
            client.write(ASK.replace(b"host: x\r\n", b"host: x\r\n" + upgrade))
            await stages.answer(await stages.request(), "x")
            assert await client.status() == 200


async def test_an_upgrade_hides_no_body_without_a_length(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """The parser looks at none of it for the other protocol, and ours has to."""
    head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\n"
    for framing in (b"transfer-encoding: gzip", b"transfer-encoding: chunked, gzip", b"transfer-encoding: xchunked"):
        async with wire(server) as client:
            client.write(head + framing + b"\r\n\r\n{}" + PING)
            answered = await client.reader.read()  # until it is closed
            assert b" 200 " not in answered
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_pipelined_requests(server: Running, stages: Stages) -> None:
    """Some are answered in their order; with very many waiting behind one, the client is up to no good."""
    async with wire(server) as client:
        client.write(ASK + PING * 5)
        await stages.answer(await stages.request(), "x")
        assert [await client.status() for _ in range(6)] == [200] * 6
    async with wire(server) as client:
        client.write(ASK + PING * (MAX_PIPELINED + 2))
        assert await client.closed()
    assert closed(server, "invalid") == 1
    await until(server.idle)


async def test_who_leaves_with_requests_behind_the_first_is_noticed(server: Running, stages: Stages) -> None:
    async with wire(server) as client:
        client.write(ASK + PING * 3)
        request = await stages.request()
        client.write(PING)
        client.writer.close()
        assert await stages.cancelled() == {request.id}
    await until(server.idle)


# ----------------------------------------------------------------------------------------------------- too many


async def test_idle_connections_make_room(checkpoint: Path, redis_url: str, stages: Stages) -> None:
    """So do heads that never end. Nobody who is answered is cut off."""
    async with running(checkpoint, redis_url, max_connections=8) as server, AsyncExitStack() as stack:
        asking = await stack.enter_async_context(wire(server))
        asking.write(ASK)
        request = await stages.request()
        wires = [await stack.enter_async_context(wire(server)) for _ in range(100)]
        for each in wires:
            each.write(b"GET / HTTP/1.1\r\nx:")
        async with wire(server) as client:
            client.write(PING)
            assert await client.status() == 200
        await stages.answer(request, "still here")
        assert await asking.status() == 200
        assert closed(server, "evicted") >= 90
        assert server.metric("millrace_connections") <= 8


async def test_where_nobody_is_idle(checkpoint: Path, redis_url: str) -> None:
    """Whoever comes is told, and health is answered all the same."""
    patient = {"body_stall_s": PATIENCE_S, "body_timeout_s": PATIENCE_S}
    async with running(checkpoint, redis_url, max_connections=8, **patient) as server, AsyncExitStack() as stack:
        for _ in range(8):
            slow = await stack.enter_async_context(wire(server))
            slow.write(CHAT + b"content-length: 1000\r\n\r\n{")
        await until(lambda: server.gateway.load()["requests"] == 8)
        for _ in range(3):
            async with wire(server) as client:
                client.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
                status, headers, body = await client.answer()
                assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
                assert json.loads(body)["error"]["code"] == "too_many_connections"
            async with wire(server) as client:
                client.write(PING)
                assert await client.status() == 200
        idle = [await stack.enter_async_context(wire(server)) for _ in range(2 * HEALTH_ROOM)]
        async with wire(server) as client:
            client.write(PING)
            assert await client.status() == 200
        assert await idle[0].closed()
        assert server.metric("millrace_connections") <= 8 + HEALTH_ROOM


async def test_too_many_from_one_address(checkpoint: Path, redis_url: str) -> None:
    patient = {"body_stall_s": PATIENCE_S, "body_timeout_s": PATIENCE_S}
    async with (
        running(checkpoint, redis_url, max_connections_per_address=2, **patient) as server,
        AsyncExitStack() as stack,
    ):
        for _ in range(2):
            slow = await stack.enter_async_context(wire(server))
            slow.write(CHAT + b"content-length: 1000\r\n\r\n{")
        await until(lambda: server.gateway.load()["requests"] == 2)
        async with wire(server) as client:
            client.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await client.refused() == (429, "too_many_connections")


@pytest.mark.system
async def test_more_connections_than_files(checkpoint: Path, redis_url: str) -> None:
    """A process that may have 150 files, of which it was given 60."""
    port = free_port()
    told = {"REDIS_URL": redis_url, "MODEL": str(checkpoint), "HOST": "127.0.0.1", "PORT": str(port)}
    environ = os.environ | {f"MILLRACE_{name}": text for name, text in told.items()}
    limited = f"ulimit -Hn 150; ulimit -Sn 60; exec {sys.executable} -m services.gateway"
    process = await asyncio.create_subprocess_exec("bash", "-c", limited, env=environ)
    try:
        async with AsyncExitStack() as stack, asyncio.timeout(PATIENCE_S):
            while await asyncio.to_thread(is_dead, port):  # it says so to nobody else
                assert process.returncode is None
            for _ in range(300):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.callback(writer.close)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            stack.callback(writer.close)
            client = Wire(reader, writer)
            for path in (b"/ping", b"/v1/models"):
                client.write(b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n")
                assert await client.status() == 200
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def is_dead(port: int) -> bool:
    """Return True if nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("system", "limits", "wanted"),
    [("linux", (1024, 4096), (4096, 4096)), ("darwin", (256, 2**63 - 1), (10_240, 2**63 - 1))],
)
def test_the_limit_on_files_is_raised_as_far_as_the_system_lets_it(
    monkeypatch: pytest.MonkeyPatch, system: str, limits: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """macOS refuses a soft limit beyond OPEN_MAX, whatever the hard one is."""
    told = []
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: told.append(both))
    raise_file_limit()
    assert told == [wanted]


# ----------------------------------------------------------------------------------------------------- the registry


class Peer:
    """Connection that only its registry knows."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def registry(total: int, per_address: int) -> tuple[Connections, Callable[[], float], Callable[[], float]]:
    gauge = Gauge("open", "Of this test", registry=None)
    counter = Counter("closed", "Of this test", ("reason",), registry=None)
    limits = ConnectionLimits(total, per_address, head_s=0.0, idle_s=1000.0)
    return Connections(limits, gauge, counter), lambda: value(gauge), lambda: value(counter)


def test_an_address_makes_room_for_itself_alone() -> None:
    connections, count, _ = registry(100, 2)
    other, first, second, third, fourth = (Peer(name) for name in ("b", "a", "a", "a", "a"))
    for peer in (other, first, second):
        assert connections.enter(peer) is None
        connections.wait(peer, 1000)
    connections.work(first)
    assert connections.enter(third) is None
    assert [peer.aborted for peer in (other, first, second, third)] == [False, False, True, False]
    refusal = connections.enter(fourth)
    assert refusal is not None
    assert (refusal.status, count()) == (429, 4)
    for peer in (other, first, second, third, fourth):
        connections.leave(peer)
        connections.wait(peer, 1000)
        connections.work(peer)
    assert count() == 0


@pytest.mark.parametrize(("total", "per_address"), [(1, 100), (100, 1)])
def test_the_last_of_an_address_makes_room_for_the_next(total: int, per_address: int) -> None:
    connections, count, _ = registry(total, per_address)
    first, second = Peer("a"), Peer("a")
    assert connections.enter(first) is None
    connections.wait(first, 1000)
    assert connections.enter(second) is None
    assert (first.aborted, count()) == (True, 1)
    connections.wait(second, 0)
    connections.close_overdue()
    assert (second.aborted, count()) == (True, 0)


def test_the_longest_waiting_makes_room_and_the_overdue_go() -> None:
    connections, count, ended = registry(2, 100)
    first, second, third = Peer("a"), Peer("b"), Peer("c")
    connections.enter(first)
    connections.wait(first, 1000)
    connections.enter(second)
    connections.wait(second, 1000)
    connections.wait(first, 0)  # it has been asking something meanwhile
    assert connections.enter(third) is None
    assert second.aborted
    connections.close_overdue()
    assert (first.aborted, third.aborted, count(), ended()) == (True, False, 1, 2)


def test_the_room_for_health_is_bounded() -> None:
    connections, _, _ = registry(1, 1000)
    peers = [Peer(str(i)) for i in range(HEALTH_ROOM + 2)]
    statuses = [failure.status if (failure := connections.enter(peer)) else 200 for peer in peers]
    assert statuses == [200] + [503] * (HEALTH_ROOM + 1)
    assert [peer.aborted for peer in peers] == [False] * (HEALTH_ROOM + 1) + [True]


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("::ffff:10.1.2.3", "::ffff:10.1.2.3"),
    ],
)
def test_an_address_of_ipv6_is_its_network(host: str, network: str) -> None:
    assert network_of(host) == network

"""The token path's connections over TLS, on the loop of the standard library and on that of the services."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, ResponseError, TimeoutError
from tls_proxy import TlsProxy

from shared.bus import client as redis_client
from shared.bus import wire as wire_module
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.bus.streams import LogReader, LogWriter
from shared.bus.wire import Wire
from shared.messages import TokenRun, Tokens

pytestmark = pytest.mark.system

BIG = bytes(range(256)) * (40 << 10)  # 10 MiB: hundreds of records, and more than the kernel's buffers
Script = Callable[[Redis, Wire], Awaitable[None]]
Run = Callable[[Script], None]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture
def proxy(redis: Redis, redis_url: str, directory: Path) -> Iterator[TlsProxy]:
    """Before the tests' Redis, which is empty."""
    with TlsProxy(directory, redis_url.removeprefix("unix://")).running() as proxy:
        yield proxy


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, proxy: TlsProxy) -> Run:
    """Run a script with a client and a wire of its own over TLS."""

    def run(script: Script) -> None:
        async def scripted() -> None:
            client = connect(proxy.url())
            wire = Wire(client)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await script(client, wire)
            finally:
                await wire.close()
                await client.aclose()

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(scripted())

    return run


async def blocked(wire: Wire, client: Redis) -> "asyncio.Future[object]":
    """Return a call that Redis blocks."""
    call = asyncio.ensure_future(wire.call("BLPOP", "list", PATIENCE_S, wait_s=PATIENCE_S))
    while (await client.info("clients"))["blocked_clients"] != 1:
        assert not call.done()
        await asyncio.sleep(0)
    return call


def test_calls_and_replies_of_all_kinds_and_sizes(run: Run, proxy: TlsProxy) -> None:
    async def script(client: Redis, wire: Wire) -> None:
        assert await wire.call("SET", b"k\r\n", b"\x00\xff") == b"OK"
        assert await wire.call("GET", b"k\r\n") == b"\x00\xff"
        assert await wire.call("INCRBY", "n", 5) == 5
        assert await wire.call("GET", "absent") is None
        with pytest.raises(ResponseError, match="unknown command"):
            await wire.call("NONSENSE")
        entry = await wire.call("XADD", "s", "*", "f", BIG)
        for size in (1, 16_383, 16_384, 16_385, len(BIG)):  # a record of TLS has 16,384 bytes at most
            assert await wire.call("ECHO", BIG[:size]) == BIG[:size]
            assert await wire.call("ECHO", "next") == b"next"
        assert await wire.call("XREAD", "STREAMS", "s", "0") == [[b"s", [[entry, [b"f", BIG]]]]]
        number = await wire.call("CLIENT", "ID")
        await wire.close()
        assert await client.client_id() == number, "it went back to the pool, and works there"
        assert await client.get("k\r\n") == b"\x00\xff"

    run(script)
    assert proxy.accepted == 1


def test_a_read_that_blocks_is_woken(run: Run) -> None:
    async def script(client: Redis, wire: Wire) -> None:
        call = await blocked(wire, client)
        await client.rpush("list", BIG)
        assert await call == [b"list", BIG]
        call = await blocked(wire, client)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await wire.call("ECHO", "mine") == b"mine"

    run(script)


@pytest.mark.parametrize("politely", [True, False], ids=["closed", "reset"])
def test_links_that_break_are_made_anew(run: Run, proxy: TlsProxy, politely: bool) -> None:
    async def script(client: Redis, wire: Wire) -> None:
        await wire.call("PING")
        await asyncio.to_thread(proxy.break_links, politely)
        assert await wire.call("ECHO", "mine") == b"mine"
        call = await blocked(wire, client)
        await asyncio.to_thread(proxy.break_links, politely)
        await client.rpush("list", "x")
        assert await call == [b"list", b"x"]

    run(script)
    assert proxy.accepted >= 3


@pytest.mark.parametrize("after", [1, 5, 20_000, 9 << 20])
def test_a_peer_that_ends_within_a_reply_is_asked_again(run: Run, proxy: TlsProxy, after: int) -> None:
    async def script(client: Redis, wire: Wire) -> None:
        await wire.call("SET", "big", BIG)
        await asyncio.to_thread(proxy.break_in_reply, after)
        assert await wire.call("GET", "big") == BIG
        assert await wire.call("ECHO", "next") == b"next"

    run(script)
    assert proxy.accepted == 2


@pytest.mark.parametrize("with_a_reply", [False, True])
def test_what_comes_unasked_is_no_reply_to_the_next_command(run: Run, proxy: TlsProxy, with_a_reply: bool) -> None:
    async def script(client: Redis, wire: Wire) -> None:
        number = await wire.call("CLIENT", "ID")
        theirs = b"$6\r\ntheirs\r\n"
        if with_a_reply:
            await asyncio.to_thread(proxy.say_after_reply, theirs)
            assert await wire.call("ECHO", "first") == b"first"
        else:
            await asyncio.to_thread(proxy.say, theirs)
        assert await wire.call("ECHO", "mine") == b"mine"
        assert await wire.call("CLIENT", "ID") != number

    run(script)


def test_a_link_that_falls_silent_is_given_up(run: Run, proxy: TlsProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 0)

    async def script(client: Redis, wire: Wire) -> None:
        await wire.call("PING")
        await asyncio.to_thread(proxy.fall_silent, True)
        monkeypatch.setattr(wire_module, "LIMIT_S", 0.05)
        with pytest.raises(TimeoutError, match="no reply to 'ECHO'"):
            await wire.call("ECHO", "mine")
        await asyncio.to_thread(proxy.fall_silent, False)
        monkeypatch.setattr(wire_module, "LIMIT_S", PATIENCE_S)
        assert await wire.call("ECHO", "mine") == b"mine"

    run(script)


def test_tokens_are_written_and_read(run: Run, proxy: TlsProxy) -> None:
    key = Keys("test").tokens(0)

    async def script(client: Redis, wire: Wire) -> None:
        writer, reader = LogWriter(client, key), LogReader(client, {key: "0"})
        sent = [Tokens((), (TokenRun("r", 1, index, tuple(range(5000)), None, None),)) for index in range(20)]
        found: list[object] = []
        for index, message in enumerate(sent):
            if index % 7 == 6:
                await asyncio.to_thread(proxy.break_links, index == 6)
            await writer.send(message)
        while len(found) < len(sent):
            found += [message for _, _, message in await reader.read(100, 100)]
        runs = [one.runs[0].index for one in found if isinstance(one, Tokens)]
        assert sorted({*runs}) == list(range(20))

    run(script)


def test_an_authority_that_is_not_trusted_is_named(proxy: TlsProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_client, "_RETRIES", 0)

    async def calls() -> None:
        client = connect(proxy.url().partition("?")[0])
        with pytest.raises(ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await Wire(client).call("PING")
        await client.aclose()

    uvloop.run(calls())

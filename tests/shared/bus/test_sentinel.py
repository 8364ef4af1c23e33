"""Primaries that move, with real Sentinels."""

import asyncio
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from machine import PATIENCE_MS, PATIENCE_S, free_ports
from redis.asyncio import Redis
from redis.asyncio.sentinel import Sentinel
from redis.exceptions import ConnectionError, ResponseError

from cli.redis_server import RedisServer
from shared.bus import client as redis_client
from shared.bus.client import command, connect
from shared.bus.retry import retry_until_available
from shared.bus.sentinel import Primary, SentinelUrl, parse
from shared.bus.wire import Wire

HASTE = ("INFO-PERIOD", 200, "PUBLISH-PERIOD", 200, "ASK-PERIOD", 100, "MIN-LINK-RECONNECT-PERIOD", 100)  # ms


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("redis://localhost", None),
        (
            "redis+sentinel://a:1,b/main",
            SentinelUrl((("a", 1), ("b", 26379)), "main", "redis://a:1/", {}),
        ),
        (
            "rediss+sentinel://me:p%40ss@[::1]:5/main/2?ssl_ca_certs=/ca.crt&sentinel_username=s&sentinel_password=t",
            SentinelUrl(
                (("::1", 5),),
                "main",
                "rediss://me:p%40ss@[::1]:5/2?ssl_ca_certs=%2Fca.crt",
                {"username": "s", "password": "t"},
            ),
        ),
    ],
)
def test_the_parts_of_a_url(url: str, parts: SentinelUrl | None) -> None:
    assert parse(url) == parts


async def test_a_dead_sentinel_is_asked_once(monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    """The next one is asked at once: a host that dies takes a primary and a Sentinel with it."""
    monkeypatch.setattr(redis_client, "_RETRIES", 0)
    asked = []

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer)
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", unused_port):
        client = connect(f"redis+sentinel://127.0.0.1:{unused_port}/main")
        with pytest.raises(ConnectionError, match="No master found"):
            await client.ping()
        await client.aclose()
    assert len(asked) == 1


@contextmanager
def sentinel(directory: Path, binary: str, port: int, primary_port: int) -> Iterator[None]:
    """A Sentinel that takes a primary which stands still for a while for no dead one."""
    config = directory / f"sentinel-{port}.conf"
    config.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {directory}\nsentinel monitor main 127.0.0.1 {primary_port} 1\n"
        f"sentinel down-after-milliseconds main {PATIENCE_MS}\nsentinel failover-timeout main 2000\n"
    )
    process = subprocess.Popen([binary, str(config), "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
async def moving() -> AsyncIterator[tuple[RedisServer, RedisServer, str]]:
    """A primary, its replica, and the URL by which a Sentinel tells which is which."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="millrace-")))
        first, second, watch = free_ports(3)
        servers = [
            stack.enter_context(RedisServer(directory / name, port=port))
            for name, port in (("a", first), ("b", second))
        ]
        replica, watcher = connect(servers[1].url), connect(f"redis://127.0.0.1:{watch}")
        for server in servers:
            server.command("CONFIG SET repl-diskless-sync-delay 0")
        await replica.replicaof("127.0.0.1", first)
        async with asyncio.timeout(PATIENCE_S):
            while not await _in_step(replica):  # noqa: ASYNC110 - Redis has no event for it
                await asyncio.sleep(0.01)
            # Not before: it asks for replicas when it begins.
            stack.enter_context(sentinel(directory, servers[0].binary, watch, first))
            while not await _hurries(watcher):  # noqa: ASYNC110 - it has not begun to listen
                await asyncio.sleep(0.01)
            while not await _may_fail_over(watcher):  # noqa: ASYNC110 - Sentinel has no event for it
                await asyncio.sleep(0.01)
        yield servers[0], servers[1], f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watch}/main/0"
        await watcher.aclose()
        await replica.aclose()


def watcher_of(url: str) -> Redis:
    """A client of the Sentinel itself."""
    return connect(f"redis://{url.split(',')[1].split('/')[0]}")


async def _in_step(replica: Redis) -> bool:
    return bool((await replica.info("replication"))["master_link_status"] == "up")


async def _hurries(watcher: Redis) -> bool:
    """Have it look ten times as often as it would, for a failover takes many of its looks."""
    with suppress(ConnectionError):
        return bool(await command(watcher, "SENTINEL", "DEBUG", *HASTE))
    return False


async def _may_fail_over(watcher: Redis) -> bool:
    return [each["flags"] for each in await watcher.sentinel_slaves("main")] == ["slave"]


@pytest.mark.system
async def test_the_new_primary_is_found_when_the_old_one_dies(moving: tuple[RedisServer, RedisServer, str]) -> None:
    first, _, url = moving
    client, watcher = connect(url), watcher_of(url)
    wire = Wire(client)
    assert await client.set("key", "before")
    await command(client, "WAIT", 1, PATIENCE_MS)
    assert await wire.call("GET", "key") == b"before"
    first.kill()
    await command(watcher, "SENTINEL", "SET", "main", "down-after-milliseconds", 300)
    async with asyncio.timeout(PATIENCE_S):
        assert await retry_until_available("test", lambda: client.set("key", "after"))
        assert await retry_until_available("test", lambda: wire.call("GET", "key")) == b"after"
    for each in (client, watcher):
        await each.aclose()


@pytest.mark.system
async def test_connections_that_ask_at_the_same_time_are_all_answered(tmp_path: Path) -> None:
    port, watch = free_ports(2)
    with RedisServer(tmp_path / "a", port=port) as server, sentinel(tmp_path, server.binary, watch, port):
        asked = Sentinel([("127.0.0.1", 1), ("127.0.0.1", watch)])  # type: ignore[no-untyped-call]
        primary = Primary(asked, "main")
        async with asyncio.timeout(PATIENCE_S):
            await retry_until_available("test", primary.address)  # it may not have begun to listen
            asked.sentinels.reverse()
            found = await asyncio.gather(*(primary.address() for _ in range(20)))
        assert set(found) == {("127.0.0.1", port)}
        assert len(set(asked.sentinels)) == 2
        await asked.aclose()


@pytest.mark.system
@pytest.mark.slow
async def test_a_primary_that_sentinel_moves_is_left(moving: tuple[RedisServer, RedisServer, str]) -> None:
    first, second, url = moving
    client, watcher = connect(url), watcher_of(url)
    wire = Wire(client)
    assert await wire.call("SET", "key", "before")
    await command(client, "WAIT", 1, PATIENCE_MS)
    before = await client.info("server")
    assert before["tcp_port"] == first.port
    async with asyncio.timeout(PATIENCE_S):
        while (await retry_until_available("test", lambda: client.info("server")))["tcp_port"] != second.port:
            with suppress(ResponseError):  # it does so, or finds that the replica stands still
                await command(watcher, "SENTINEL", "FAILOVER", "main")
            with suppress(ConnectionError):
                await retry_until_available("test", lambda: wire.call("SET", "key", "after"))
            await asyncio.sleep(0.05)
        assert await retry_until_available("test", lambda: wire.call("SET", "key", "after")) == b"OK"
    assert await client.get("key") == b"after"
    for each in (client, watcher):
        await each.aclose()

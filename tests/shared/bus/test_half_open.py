"""Links to Redis that stay open and let nothing through."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis_proxy import Proxy

from cli.redis_server import RedisServer
from shared.bus import client as redis_client
from shared.bus import leases
from shared.bus.client import MAX_BLOCK_MS, REPLY_S, Link, command, connect
from shared.bus.keys import Keys
from shared.bus.streams import LogReader, send
from shared.bus.wire import Wire
from shared.config import CommonSettings
from shared.messages import Cancel
from shared.service import Life


@pytest.fixture
async def proxy(redis_server: RedisServer, redis_url: str) -> AsyncIterator[Proxy]:
    with tempfile.TemporaryDirectory(prefix="millrace-") as directory:
        proxy = Proxy(Path(directory) / "proxy.sock", redis_server.unix_socket)
        await proxy.start()
        yield proxy
        await proxy.close()


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[Redis]:
    client = connect(proxy.url)
    yield client
    await client.aclose()


def test_silence_is_noticed_within_the_default_lease() -> None:
    assert CommonSettings(redis_url="", model="").lease_ms / 1000 > MAX_BLOCK_MS / 1000 + REPLY_S


async def test_commands_go_on_over_new_links(proxy: Proxy, client: Redis) -> None:
    await asyncio.gather(*(client.set(f"{n}", n) for n in range(5)))
    wire = Wire(client)
    await wire.call("GET", "0")
    assert proxy.swallow() >= 2
    assert await asyncio.gather(*(client.get(f"{n}") for n in range(5))) == [b"0", b"1", b"2", b"3", b"4"]
    assert await wire.call("GET", "0") == b"0"


async def test_one_silent_link_makes_all_others_suspect(
    proxy: Proxy, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a pool's links would cost as much again."""
    noticed, suspect = [], Link.suspect

    def note(link: Link, generation: int) -> None:
        noticed.append(generation)
        suspect(link, generation)

    monkeypatch.setattr(Link, "suspect", note)
    await asyncio.gather(*(client.client_id() for _ in range(8)))
    assert proxy.swallow() == 8
    for n in range(8):
        await client.set(f"{n}", n)
    assert noticed == [0], "it was noticed once, and not eight times"


async def test_a_reader_gets_what_came_meanwhile(proxy: Proxy, client: Redis, redis: Redis) -> None:
    reader = LogReader(client, {"log": "0"})
    assert await reader.read(1, 1) == []
    proxy.swallow()
    await send(redis, "log", Cancel(("r",)))
    assert [message for _, _, message in await reader.read(1, 100)] == [Cancel(("r",))]


class Idle:
    async def startup(self) -> None: ...

    async def serve(self) -> None:
        await asyncio.Event().wait()

    async def drain(self) -> None: ...

    async def close(self) -> None: ...

    def load(self) -> dict[str, float]:
        return {}


async def test_a_lease_is_renewed_over_a_new_link(
    proxy: Proxy, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its renewal does not wait as long as a reply may take."""
    monkeypatch.setattr(redis_client, "REPLY_S", 2 * PATIENCE_S)
    client = connect(proxy.url)
    life = Life("engine", Idle(), CommonSettings(redis_url="", model="", name="e", namespace=keys.ns), client)
    running = asyncio.create_task(life.run())
    lease = keys.replica("engine", "e")
    async with asyncio.timeout(PATIENCE_S):
        while [each.state for each in await leases.live(redis, keys, "engine")] != ["ready"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.swallow()
        before = await command(redis, "PEXPIRETIME", lease)
        while await command(redis, "PEXPIRETIME", lease) <= before:  # noqa: ASYNC110 - Redis has no event for it
            await asyncio.sleep(0.01)
    life.stop.set()
    assert await running == 0
    await client.aclose()

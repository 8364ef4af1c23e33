"""A Redis that takes no writes is told of once, and so is its end."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from machine import PATIENCE_S
from redis.asyncio import Redis
from redis_refusals import REFUSALS

from cli.redis_server import RedisServer
from cli.refusal import Refusals
from shared.bus.client import command, connect
from shared.bus.keys import Keys

KEYS = Keys("test")


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """One whose disk can be full."""
    with (
        tempfile.TemporaryDirectory(prefix="millrace-") as name,
        RedisServer(Path(name), persistence=True, dies_with_us=True) as started,
    ):
        yield started


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(server.url)
    yield client
    await client.aclose()


@pytest.mark.system
@pytest.mark.parametrize(
    ("code", "words"),
    [("MISCONF", "MISCONF"), ("OOM", "command not allowed when used memory"), ("NOREPLICAS", "NOREPLICAS")],
)
async def test_a_refusal_and_its_end(server: RedisServer, redis: Redis, code: str, words: str) -> None:
    said: list[str] = []
    refusals = Refusals(said.append, Path("/data"))
    await refusals.look(redis, KEYS)
    assert (said, refusals.explain()) == ([], [])
    async with REFUSALS[code](server, redis):
        for _ in range(2):
            await refusals.look(redis, KEYS)
        [told] = said
        assert told.startswith(f"redis takes no writes, and requests stand still until it does: {words}")
        assert told.endswith(" (its data are in /data)")
        [why] = refusals.explain()
        assert f"as redis took no writes: {words}" in why
    async with asyncio.timeout(PATIENCE_S):
        while refusals.reason:  # it looks once a second whether its disk has room
            await refusals.look(redis, KEYS)
    await refusals.look(redis, KEYS)
    assert said[1:] == ["redis takes writes again"]
    assert refusals.explain() == []
    assert await redis.keys("test:*") == []


@pytest.mark.system
async def test_a_user_that_may_not_write_is_no_refusal(server: RedisServer, redis: Redis) -> None:
    said: list[str] = []
    await command(redis, "ACL", "SETUSER", "shy", "on", "nopass", "~*", "+@all", "-set")
    shy = connect(server.url.replace("unix://", "unix://shy:x@"))
    await Refusals(said.append, None).look(shy, KEYS)
    assert said == []
    await shy.aclose()
    await command(redis, "ACL", "DELUSER", "shy")

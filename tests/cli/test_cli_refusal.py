"""A Redis that takes no writes is told of once, and so is its end."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis_refusals import configured

from cli.redis_server import RedisServer
from cli.refusal import Refusals
from shared.bus.client import command, connect
from shared.bus.keys import Keys

KEYS = Keys("test")


@pytest.fixture
async def said(redis: Redis) -> AsyncIterator[list[str]]:
    yield []
    await redis.config_set("min-replicas-to-write", "0")


async def test_a_refusal_and_its_end(redis_server: RedisServer, redis: Redis, said: list[str]) -> None:
    refusals = Refusals(said.append, Path("/data"))
    await refusals.look(redis, KEYS)
    assert (said, refusals.explain()) == ([], [])
    async with configured("min-replicas-to-write", "1", "0")(redis_server, redis):
        for _ in range(2):
            await refusals.look(redis, KEYS)
        [told] = said
        assert told.startswith("redis takes no writes, and requests stand still until it does: NOREPLICAS")
        assert told.endswith(" (its data are in /data)")
        [why] = refusals.explain()
        assert "as redis took no writes: NOREPLICAS" in why
    for _ in range(2):
        await refusals.look(redis, KEYS)
    assert said[1:] == ["redis takes writes again"]
    assert refusals.explain() == []
    assert await redis.keys() == []


async def test_a_user_that_may_not_delete_is_no_refusal(redis_url: str, redis: Redis, said: list[str]) -> None:
    await command(redis, "ACL", "SETUSER", "shy", "on", "nopass", "~*", "+@all", "-del")
    shy = connect(redis_url.replace("unix://", "unix://shy:x@"))
    await Refusals(said.append, None).look(shy, KEYS)
    assert said == []
    await shy.aclose()
    await command(redis, "ACL", "DELUSER", "shy")

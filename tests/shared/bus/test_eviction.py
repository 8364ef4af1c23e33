"""A Redis that evicts: refused or warned of at the start, and what it leaves alone where it may evict a part."""

import logging
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import cast

import pytest
from redis.asyncio import Redis

from cli.redis_server import RedisServer
from shared.bus.client import command, connect
from shared.bus.eviction import check_eviction, check_eviction_of_blobs
from shared.bus.keys import GENERATE, Keys
from shared.bus.pipeline_view import problems, read
from shared.bus.records import Records
from shared.config import CommonSettings
from shared.errors import ConfigError
from shared.messages import Generate, Output, Request, Sampling, pack_ids
from shared.service import MISCONFIGURED, Life, Service

pytestmark = pytest.mark.system

POLICIES = ("lru", "lfu", "random")
VOLATILE = tuple(f"volatile-{name}" for name in (*POLICIES, "ttl"))
ALL_KEYS = tuple(f"allkeys-{name}" for name in POLICIES)


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="millrace-") as directory, RedisServer(Path(directory)) as server:
        yield server


@pytest.fixture
async def own_redis(own_server: RedisServer) -> AsyncIterator[Redis]:
    client = connect(own_server.url)
    await client.flushall()
    await client.config_resetstat()
    yield client
    await client.config_set("maxmemory", 0)
    await client.config_set("maxmemory-policy", "noeviction")
    await client.aclose()


async def limited(redis: Redis, policy: str, more: int = 1 << 20) -> None:
    """Let a Redis have this policy, and so many bytes more than it uses."""
    await redis.config_set("maxmemory-policy", policy)
    await redis.config_set("maxmemory", (await redis.info("memory"))["used_memory"] + more)


@pytest.mark.parametrize("policy", ALL_KEYS)
async def test_one_that_may_evict_any_key_is_refused(own_redis: Redis, policy: str) -> None:
    await limited(own_redis, policy)
    with pytest.raises(ConfigError, match=f"maxmemory-policy {policy}.*Set maxmemory-policy noeviction"):
        await check_eviction(own_redis)
    assert f"Redis evicts keys when it is full ({policy}, 0 so far)" in problems(await read(own_redis, Keys("test")))
    await own_redis.config_set("maxmemory", 0)
    await check_eviction(own_redis)
    assert not any("evicts" in problem for problem in problems(await read(own_redis, Keys("test"))))


class Idle:
    """A service that has nothing to do, and must not be begun."""

    startup = serve = None

    async def close(self) -> None:
        pass


async def test_a_replica_does_not_start_beside_it(
    own_redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    await limited(own_redis, "allkeys-lru")
    settings = CommonSettings(redis_url="", model="", namespace="test", name="a")
    life = Life("engine", cast(Service, Idle()), settings, own_redis)
    assert await life.run() == MISCONFIGURED
    assert "noeviction" in caplog.records[-1].__dict__["reason"]
    assert await own_redis.keys() == []


@pytest.mark.parametrize("policy", ["noeviction", *VOLATILE])
async def test_one_that_may_evict_a_part_is_warned_of(
    own_redis: Redis, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    await limited(own_redis, policy)
    with caplog.at_level(logging.WARNING):
        await check_eviction(own_redis)
    assert [policy in record.message for record in caplog.records] == ([] if policy == "noeviction" else [True])
    assert not any("evicts" in problem for problem in problems(await read(own_redis, Keys("test"))))


@pytest.mark.parametrize("policy", ["noeviction", *VOLATILE, *ALL_KEYS])
async def test_of_one_with_blobs_alone_uploads_are_what_can_be_lost(
    own_redis: Redis, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    await limited(own_redis, policy)
    with caplog.at_level(logging.WARNING):
        await check_eviction_of_blobs(own_redis)
        await own_redis.config_set("maxmemory", 0)
        await check_eviction_of_blobs(own_redis)
    said = [record.message for record in caplog.records]
    assert [f"maxmemory-policy {policy}" in line and "upload" in line for line in said] == (
        [] if policy == "noeviction" else [True]
    )


async def test_a_user_that_may_not_ask_is_believed(own_server: RedisServer, own_redis: Redis) -> None:
    await limited(own_redis, "allkeys-lru")
    await command(own_redis, "ACL", "SETUSER", "shy", "on", "nopass", "~*", "+@all", "-info")
    shy = connect(f"unix://shy:x@{own_server.unix_socket}")
    await check_eviction(shy)
    await check_eviction_of_blobs(shy)
    await shy.aclose()


async def test_one_that_nobody_may_ask_is_believed(own_redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some services rename commands away, to which Redis says what it says to any word."""
    await limited(own_redis, "allkeys-lru")
    monkeypatch.setattr(own_redis, "info", lambda _: own_redis.execute_command("NO-INFO"))
    await check_eviction(own_redis)


@pytest.mark.parametrize("policy", VOLATILE)
async def test_the_volatile_policies_leave_requests_under_way_alone(own_redis: Redis, policy: str) -> None:
    keys = Keys("test")
    records = Records(own_redis, keys)
    for number in range(50):
        name = f"{number:016x}"
        request = Request(name, "g", 0, 0.0, Sampling(seed=1), Output(thinking=True))
        await records.submit(GENERATE, Generate(request, pack_ids([1]), max_tokens=5))
    await limited(own_redis, policy)
    for number in range(400):
        await own_redis.set(f"filler:{number}", bytes(10_000), ex=3600)
    assert (await own_redis.info("stats"))["evicted_keys"] > 0
    found = problems(await read(own_redis, keys))
    assert any(problem.startswith(f"Redis evicts keys when it is full ({policy}, ") for problem in found)
    assert len(await own_redis.keys("filler:*")) < 400
    assert len(await own_redis.keys(keys.request("*"))) == 50
    assert await own_redis.xlen(keys.stream(GENERATE)) == 50
    assert not await records.lost([f"{number:016x}" for number in range(50)])

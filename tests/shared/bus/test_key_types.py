"""Keys that somebody else has written: named, each of them, with what it is and should be."""

import logging
import re
from typing import cast

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus import keys as schema
from shared.bus import retry
from shared.bus.client import command
from shared.bus.key_types import check_types
from shared.bus.keys import Keys
from shared.config import CommonSettings
from shared.redis_errors import code_of
from shared.service import Life, Service


async def test_each_is_named(redis: Redis, keys: Keys) -> None:
    await check_types(redis, keys)
    for key, kind in keys.types().items():
        await redis.set(key, "x")
        told = rf"{re.escape(key)} is a string and not a {kind}: .*delete it"
        with pytest.raises(ResponseError, match=told) as raised:
            await check_types(redis, keys)
        assert code_of(raised.value) == "WRONGTYPE"
        await redis.delete(key)


async def test_those_of_ours_are_left_alone(redis: Redis, keys: Keys) -> None:
    writes = {"stream": "XADD {} * a 1", "hash": "HSET {} a 1", "set": "SADD {} a", "zset": "ZADD {} 1 a"}
    for key, kind in keys.types().items():
        await command(redis, *writes[kind].format(key).split())
    await check_types(redis, keys)
    await redis.set(keys.request("r"), "x")  # of one request, which fails alone
    await check_types(redis, keys)


def test_all_that_the_schema_says_is_there_once_has_a_type() -> None:
    lines = re.findall(r"^    \{ns\}(:[a-z:]+) +(stream|hash|zset|set) ", schema.__doc__ or "", re.MULTILINE)
    written = {f"n{name}": kind for name, kind in lines}
    types = Keys("n").types()
    assert len(written) > 8
    assert {key: types[key] for key in written} == written


class Idle:
    """A service that does nothing, and is told to stop."""

    def __init__(self) -> None:
        self.life: Life | None = None

    async def startup(self) -> None:
        assert self.life is not None
        self.life.stop.set()

    async def serve(self) -> None:
        pass

    async def drain(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def test_a_replica_says_which_when_it_starts_and_goes_on(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture
) -> None:
    await redis.set(keys.files(), "x")
    service = Idle()
    settings = CommonSettings(redis_url="", model="", namespace=keys.ns, name="a")
    service.life = Life("engine", cast(Service, service), settings, redis)
    with caplog.at_level(logging.ERROR):
        assert await service.life.run() == 0
    [record] = caplog.records
    assert f"WRONGTYPE {keys.files()} is a string and not a zset" in record.__dict__["reason"]


async def test_who_waits_for_one_says_where_it_is_named(
    redis: Redis, keys: Keys, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.0)
    await redis.set(keys.shards(), "x")

    async def mended() -> int:
        try:
            return await redis.hlen(keys.shards())
        finally:
            await redis.delete(keys.shards())

    assert await retry.retry_until_available("test", mended) == 0
    [record] = caplog.records
    assert record.__dict__["reason"].endswith("; millrace status names the key")

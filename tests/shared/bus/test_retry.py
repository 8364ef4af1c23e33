"""What is waited for, and what is not."""

from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.bus.retry import retry_until_available


async def test_a_script_that_redis_lost_between_its_loading_and_its_call(
    redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, lost = redis.script_load, []

    async def load_and_lose_once(script: str) -> Any:
        sha = await load(script)
        if not lost:
            lost.append(sha)
            await redis.script_flush()
        return sha

    monkeypatch.setattr(redis, "script_load", load_and_lose_once)
    assert await retry_until_available("answer", redis.register_script("return 7")) == 7
    assert len(lost) == 1


async def test_a_script_that_fails_is_not_waited_for(redis: Redis) -> None:
    script = redis.register_script("return redis.call('no such command')")
    with pytest.raises(ResponseError):
        await retry_until_available("answer", script)

"""Settings that no type can check."""

from pathlib import Path

import pytest
from redis.asyncio import Redis

from services.gateway.__main__ import build
from services.gateway.settings import GatewaySettings
from shared.errors import ConfigError


async def test_an_empty_key_is_refused_before_anything_starts(checkpoint: Path, redis: Redis, redis_url: str) -> None:
    settings = GatewaySettings(redis_url=redis_url, model=str(checkpoint), port=0, api_keys=("secret", ""))
    with pytest.raises(ConfigError, match="MILLRACE_API_KEYS: a key is empty") as refused:
        build(settings, redis)
    assert "secret" not in str(refused.value)

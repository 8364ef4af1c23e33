"""Two gateways over one Redis, with two keys."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_stages import Running, running


@pytest.fixture
async def server(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, api_keys=("key-1", "key-2")) as started:
        yield started


@pytest.fixture
async def other(checkpoint: Path, redis_url: str) -> AsyncIterator[Running]:
    async with running(checkpoint, redis_url, name="other", api_keys=("key-1", "key-2")) as started:
        yield started

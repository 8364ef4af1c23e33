"""The fixture of tests of workers. As a root it also puts this directory on the import path of those in `text/`."""

from collections.abc import AsyncIterator

import pytest
from postproc_system import System
from redis.asyncio import Redis
from redis_clients import signed_in

from services.postproc.owned_shards import SERVICE
from shared.bus.keys import Keys


@pytest.fixture
async def system(redis: Redis, keys: Keys) -> AsyncIterator[System]:
    async with signed_in(redis, SERVICE) as own:
        yield System(redis, keys, own)

"""The fixture of tests of workers. As a root it also puts this directory on the import path of those in `text/`."""

import pytest
from postproc_system import System
from redis.asyncio import Redis

from shared.bus.keys import Keys


@pytest.fixture
def system(redis: Redis, keys: Keys) -> System:
    return System(redis, keys)

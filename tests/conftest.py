"""What many tests need: a real Redis of their own, empty at the start of each."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from machine import free_port
from redis.asyncio import Redis

from cli.redis_server import RedisServer
from shared.bus.client import connect
from shared.bus.keys import Keys
from shared.reproducible import fix_order_of_sums

# Triton decides when it is imported whether kernels are compiled or interpreted; several tests import it by the way.
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"

# Torch's threads, here and in the processes that tests start: sums are then cut in the same way on any number of cores.
os.environ["OMP_NUM_THREADS"] = "1"
fix_order_of_sums(os.environ)

# Where this is set, each of the many processes that tests start would compile our sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Property tests, the same examples in every run of `make test`; `make test-random` draws others, prints what fails in a
# form to be added as an @example, and how to draw it again. No clock, which would make them fail on a busy machine, and
# no file of examples, by which one machine would know more than another.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("random", settings.get_profile("fixed"), derandomize=False, print_blob=True)
settings.load_profile("fixed")

# Taken out of the environment: a service under test would refuse a MILLRACE_ variable it does not know.
SERVER_BINARY = os.environ.pop("MILLRACE_TEST_REDIS_SERVER", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "redis_server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.redis)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the session, on a unix socket only. Its path is short, as socket paths must be."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-"))
    with RedisServer(directory, binary=SERVER_BINARY) as server:
        yield server
    shutil.rmtree(directory)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of an empty Redis."""
    assert redis_server.command("FLUSHALL").startswith(b"+OK")
    return redis_server.url


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client as the services have it."""
    client = connect(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


@pytest.fixture
def unused_port() -> int:
    return free_port()

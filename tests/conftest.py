"""Fixtures of many tests: a real Redis of their own, empty at the start of each; and the marks that `make check` reads.

`system` marks every test that starts a process. Fixtures and places below bring the mark with them, any other such test
carries it itself, and a test that starts a process without the mark fails. `slow` marks what computes for long.
"""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from machine import free_port
from redis.asyncio import Redis
from redis_clients import patient

from cli.redis_server import RedisServer
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


TESTS = Path(__file__).resolve().parent
SYSTEM_FIXTURES = ("redis_server",)
SYSTEM_PLACES = (  # folders and files of which most tests start processes
    *("browser", "chaos", "clients", "cluster", "images", "pipeline"),
    *("cli/test_cli_gateways.py", "cli/test_cli_serve.py", "cli/test_cli_supervisor.py", "cli/test_redis_server.py"),
    *("helm/test_chart_autoscaler.py", "helm/test_chart_redis.py"),
    *("helm/test_chart_runs.py", "helm/test_chart_scripts.py"),
    *("engine/test_engine_benchmark.py", "engine/kernels/test_kernel_compiles.py"),
    *("shared/test_shared_crash_points.py", "demo_model/test_demo_answers.py"),
)
SLOW_PLACES = (
    "engine/kernels",  # interpreted
    "mm_encoder/vision/test_vision_memory.py",  # passes of full size
    "engine/run/test_sampler.py",  # many draws
    "helm/test_chart_network.py",  # many renderings
)
STARTS_A_PROCESS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn")  # audit events
processes_started: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "redis_server" in fixtures:
            item.add_marker(pytest.mark.redis)
        if _within(item.path, SYSTEM_PLACES) or any(name in fixtures for name in SYSTEM_FIXTURES):
            item.add_marker(pytest.mark.system)
        if _within(item.path, SLOW_PLACES):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over all that is imported by now: hundreds of thousands of objects, each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def collected_garbage() -> Iterator[None]:
    """What a module's tests have left open warns when it is collected: now, and not in a test of another module."""
    yield
    gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let workers of pytest-xdist, where it is used, start what tests share once."""
    from workers import SharedScheduling

    return SharedScheduling(config, log)


def _within(path: Path, places: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(TESTS / place) for place in places)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    processes_started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    result = yield
    if processes_started and item.get_closest_marker("system") is None:
        pytest.fail(f"mark this test with pytest.mark.system: it starts a process, {processes_started[0]}")
    return result


def _note_process(event: str, details: tuple[object, ...]) -> None:
    if event in STARTS_A_PROCESS:
        processes_started.append(f"{event}{details[:2]}")


sys.addaudithook(_note_process)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """One server for the session, on a unix socket only. Its path is short, as socket paths must be."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-"))
    with RedisServer(directory, binary=SERVER_BINARY, dies_with_us=True, namespace="test") as server:
        yield server
    shutil.rmtree(directory)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> Iterator[str]:
    """The URL of an empty Redis. In the end nobody may have been refused what it asked for (shared/bus/users.acl)."""
    assert redis_server.command("FLUSHALL").startswith(b"+OK")
    assert redis_server.command("ACL LOG RESET").startswith(b"+OK")
    yield redis_server.url
    assert (refused := redis_server.command("ACL LOG")) == b"*0\r\n", refused


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client as the services have it, but patient, and with all rights."""
    client = patient(redis_url)
    yield client
    await client.aclose()


@pytest.fixture
def keys() -> Keys:
    return Keys("test")


@pytest.fixture
def unused_port() -> int:
    return free_port()

"""Chaos, a little of it each time: one seed of the day with two replicas of each service, and one with one.

`make chaos SEEDS=n SECONDS=s` is as much of it as one likes. CHAOS_DAY=n takes the seeds of day n.
"""

import os
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chaos_requests import KINDS, files_to_serve
from chaos_storm import ONE_OF_EACH, TWO_OF_EACH, World, quiet_world, replay, storm
from system import file_server

DAY = int(os.environ.get("CHAOS_DAY", time.time() // 86400))
SECONDS = 12.0
CLIENTS = 8

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    with file_server(files_to_serve()) as files:
        yield await quiet_world(tmp_path_factory.mktemp("chaos"), files, 2 * len(KINDS))


@pytest.mark.parametrize("odd", [0, 1], ids=["two of each service", "one of each service"])
async def test_nothing_is_lost(world: World, tmp_path_factory: pytest.TempPathFactory, odd: int) -> None:
    seed = 2 * DAY + odd
    totals = await storm(
        tmp_path_factory.mktemp("storm"), world, seed, SECONDS, CLIENTS, ONE_OF_EACH if odd else TWO_OF_EACH
    )
    assert not totals.failures, "\n".join([*totals.failures, *totals.story, replay(seed, SECONDS, CLIENTS)])
    assert totals.requests >= CLIENTS
    assert totals.faults.total() > 0

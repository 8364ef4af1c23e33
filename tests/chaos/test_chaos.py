"""Chaos, a little of it: one seed with two replicas of each service, and one with one.

`make chaos SEEDS=n SECONDS=s` is as much of it as one likes.
"""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chaos_requests import KINDS, files_to_serve
from chaos_storm import ONE_OF_EACH, TWO_OF_EACH, World, quiet_world, replay, storm
from system import file_server

SECONDS = 12.0
CLIENTS = 8

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    with file_server(files_to_serve()) as files:
        yield await quiet_world(tmp_path_factory.mktemp("chaos"), files, 2 * len(KINDS))


@pytest.mark.parametrize(
    ("seed", "replicas"), [(2, TWO_OF_EACH), (3, ONE_OF_EACH)], ids=["two of each service", "one of each service"]
)
async def test_nothing_is_lost(
    world: World, tmp_path_factory: pytest.TempPathFactory, seed: int, replicas: dict[str, int]
) -> None:
    totals = await storm(tmp_path_factory.mktemp("storm"), world, seed, SECONDS, CLIENTS, replicas)
    assert not totals.failures, "\n".join([*totals.failures, *totals.story, replay(seed, SECONDS, CLIENTS)])
    assert totals.requests >= CLIENTS
    assert totals.faults.total() > 0

"""Chaos, a little of it: one seed with two replicas of each service, and one with one.

`make chaos SEEDS=n SECONDS=s` is as much of it as one likes.
"""

import pytest
from chaos_quiet import ONE_OF_EACH
from chaos_storm import TWO_OF_EACH, World, replay, storm

SECONDS = 12.0
CLIENTS = 8


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

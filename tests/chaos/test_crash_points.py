"""A death, and a halt until another has taken over, at each named moment of a request's way, one by one.

Which moments there are is read from the services' sources; one without a scenario that leads to it fails here. All of
them take long, so a run takes some; CHAOS_ALL=1 (as in `make chaos`) takes all.
"""

import os
from collections.abc import AsyncIterator

import chaos_crash as crash
import httpx
import pytest
import pytest_asyncio
from chaos_crash import Expected, Scenario, Stage, by_kind, play, points
from chaos_quiet import ONE_OF_EACH
from chaos_storm import World
from chaos_system import System, running
from machine import PATIENCE_S

SOME = 6
# step: which scenario leads to it, and the how manyeth time to fail.
STEPS: dict[str, list[tuple[Scenario, int]]] = {
    "gateway.submit": [(crash.text, 1), (crash.whole, 1), (crash.picture, 1)],
    "gateway.cancel": [(crash.leaves, 1)],
    "gateway.attach": [(crash.breaks, 1)],
    "gateway.batch_claim": [(crash.batch, 1)],
    "gateway.batch_result": [(crash.batch, 1), (crash.batch, 3)],
    "gateway.batch_status": [(crash.batch, 1), (crash.batch, 2), (crash.batch, 3)],
    "gateway.batch_publish": [(crash.batch, 1)],
    "gateway.batch_cancel": [(crash.cancelled_batch, 1)],
    "mm_encoder.take": [(crash.picture, 1)],
    "mm_encoder.look": [(crash.picture, 1)],
    "mm_encoder.accepted": [(crash.picture, 1)],
    "mm_encoder.take_off": [(crash.picture, 1)],
    "mm_encoder.store": [(crash.picture, 1)],
    "mm_encoder.land": [(crash.picture, 1)],
    "mm_encoder.ahead": [(crash.picture, 1)],
    "mm_encoder.hand_on": [(crash.picture, 1)],
    "mm_encoder.leave": [(crash.bad_picture, 1)],
    "mm_encoder.condemn": [(crash.bad_picture, 1)],
    "mm_encoder.end": [(crash.bad_picture, 1), (crash.left_before_the_encoder, 1), (crash.poison_of_the_encoder, 1)],
    "engine.take": [(crash.text, 1)],
    "engine.look": [(crash.text, 1)],
    "engine.claim": [(crash.text, 1)],
    "engine.tokens": [(crash.text, 1), (crash.text, 40)],
    "engine.finish": [(crash.text, 1)],
    "engine.announce": [(crash.resumed, 1)],
    "engine.drop": [(crash.left_before_the_engine, 1)],
    "engine.send_back": [(crash.evicted, 1), (crash.damaged, 1)],
    "engine.step": [(crash.text, 1), (crash.text, 40)],
    "mm_encoder.tower": [(crash.picture, 1)],
    "postproc.deltas": [(crash.text, 1), (crash.text, 40), (crash.logprobs, 10)],
    "postproc.journal": [(crash.text, 1), (crash.logprobs, 2)],
    "postproc.trim": [(crash.text, 1)],
    "postproc.cancel": [(crash.stop_string, 1)],
    "postproc.retain": [(crash.text, 1)],
    "postproc.delete": [(crash.leaves, 1)],
}
CASES = [
    pytest.param(f"{point}:{times}{how}", scenario, id=f"{point}:{times}{how} {scenario.__name__}")
    for point in points()
    for scenario, times in STEPS.get(point.rpartition(".")[0], [])
    # A gateway has nothing that another would take over while its client is still there.
    for how in ([""] if point.startswith("gateway.") else ["", ":stop"])
]
# In the threads that compute: the event loop goes on, and nothing but the watchdog notices.
HANGS = [
    pytest.param(f"{point}:hang", scenario, id=f"{point}:hang {scenario.__name__}")
    for point, scenario in (("engine.step.before:40", crash.text), ("mm_encoder.tower.before:1", crash.picture))
]
ALL = bool(os.environ.get("CHAOS_ALL"))
CHOSEN = CASES + HANGS if ALL else CASES[:: -(-len(CASES) // SOME)] + HANGS[:1]

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_every_point_has_a_scenario() -> None:
    assert {point.rpartition(".")[0] for point in points()} == STEPS.keys()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running_system(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[System, Expected]]:
    """One for all cases, and the answers of another in which nothing fails."""
    # Answers are kept for a moment only, so that each case can see that its own is gone.
    directory = tmp_path_factory.mktemp("crash")
    async with running(directory, world.model, ONE_OF_EACH, gateway={"retain_s": 2}) as system:
        yield system, by_kind(world.answered)


@pytest.mark.parametrize(("crash_at", "scenario"), CHOSEN)
async def test_a_request_does_not_care(
    running_system: tuple[System, Expected], crash_at: str, scenario: Scenario
) -> None:
    system, expected = running_system
    await system.make_whole()
    async with httpx.AsyncClient(timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as http:
        await play(Stage(system, expected, http, crash_at), scenario)

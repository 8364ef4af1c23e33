"""A Redis that comes back without its data, or without the last of them: all are told or answered, and it goes on."""

import asyncio
import random
import time
from pathlib import Path

import httpx
from chaos_client import Broken, Client, Manner
from chaos_crash import Expected, by_kind
from chaos_leftovers import wait_until_clean
from chaos_quiet import ONE_OF_EACH
from chaos_storm import World
from chaos_system import REQUEST_TIMEOUT_S, System, running
from machine import PATIENCE_S

from shared.bus.streams import LOST_S

# So many that some are under way when a test that had to wait for the machine looks.
ASKED = (*["long"] * 6, "choices", "image", "tools")


async def ask(system: System, kind: str, expected: Expected, stream: bool) -> str:
    """Return what went wrong with an answer, if anything did."""
    request, answer = expected[kind]
    async with httpx.AsyncClient(timeout=PATIENCE_S) as http:
        client = Client(http, lambda: [gateway.url for gateway in system.of("gateway")], random.Random(0))
        try:
            got = await client.ask(request, Manner(stream=stream), REQUEST_TIMEOUT_S)
        except Broken as broken:
            return f"told: {broken}"
        return got.differs(answer)


async def test_every_client_is_told_and_the_services_go_on(world: World, tmp_path: Path) -> None:
    expected = by_kind(world.answered)
    async with running(tmp_path / "system", world.model, ONE_OF_EACH, persistence=False) as system:
        asking = [asyncio.create_task(ask(system, kind, expected, n != 1)) for n, kind in enumerate(ASKED)]
        await system.generating()
        await system.restart_redis(0)
        back = time.monotonic()
        ends = await asyncio.gather(*asking)
        took = time.monotonic() - back
        assert [end for end in ends if end and not end.startswith("told: ")] == [], system.tails()
        assert [end for end in ends if "no answer within" in end] == [], system.tails()
        assert any(end.startswith("told: ") for end in ends), "Redis was killed when all was over"
        assert took < PATIENCE_S < REQUEST_TIMEOUT_S, (took, ends)
        # Everything that the services had made in Redis is made again.
        await system.ready(system.replicas)
        for kind in ("long", "image"):
            assert await ask(system, kind, expected, True) == "", system.tails()
        assert await wait_until_clean(system, PATIENCE_S) == []


async def test_tokens_that_a_failover_has_lost_are_said_again(world: World, tmp_path: Path) -> None:
    """A request that only the dead server knew is lost, and its client told; one that goes on lacks nothing."""
    expected = by_kind(world.answered)
    async with running(tmp_path / "system", world.model, ONE_OF_EACH) as system:
        replica = await system.replicated()
        asking = [asyncio.create_task(ask(system, kind, expected, n != 1)) for n, kind in enumerate(ASKED)]
        await system.generating()
        lost_s = await system.fail_over_late(replica)
        ends = await asyncio.gather(*asking)
        wrong = [end for end in ends if end and "lost this request" not in end]
        if lost_s > LOST_S:  # on a machine so busy that a step takes seconds; that is told
            wrong = [end for end in wrong if "of the answer were lost" not in end]
        assert wrong == [], system.tails()
        assert "" in ends or lost_s > LOST_S, ends
        assert await wait_until_clean(system, PATIENCE_S) == []
